"""Writes that survive a crash: a reader sees the old file or the new one, never a part of either."""

import os
import pathlib
import threading
from typing import Union

PathLike = Union[str, os.PathLike]


def fsync_dir(path: PathLike) -> None:
    """Makes the entries of a folder (files created, renamed or removed in it) durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_bytes_durably(path: PathLike, data: bytes) -> None:
    """Writes a file under a temporary name, makes it durable, and renames it into place.

    Args:
        path: The file; its folder exists.
        data: The contents.

    Raises:
        OSError: If it cannot be written; a file that was there before is still there, whole.
    """
    path = pathlib.Path(path)
    tmp_path = path.with_name(f".{path.name}.tmp-{os.getpid()}-{threading.get_ident()}")
    try:
        with open(tmp_path, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp_path, path)
    except BaseException:
        tmp_path.unlink(missing_ok=True)
        raise
    fsync_dir(path.parent)


def write_text_durably(path: PathLike, text: str) -> None:
    """`write_bytes_durably` of a text, as UTF-8, line ends as they are."""
    write_bytes_durably(path, text.encode("utf-8"))


def make_private_dir(path: PathLike) -> pathlib.Path:
    """Makes a folder that only its owner can read, parents included; one that exists stays as it is.

    Args:
        path: The folder.

    Returns:
        The folder.

    Raises:
        OSError: If it cannot be made, or something else has its name.
    """
    path = pathlib.Path(path)
    for folder in (*reversed(path.parents), path):
        if not folder.is_dir():
            # exist_ok: another process may make it at the same moment.
            folder.mkdir(mode=0o700, exist_ok=True)
    return path


def cache_dir() -> pathlib.Path:
    """The folder of compiled programs, downloads and trained tokenizers.

    `$AXLEARN_CACHE_DIR`, or `~/.cache/axlearn`; it is created with mode 0700 on first use.
    """
    configured = os.environ.get("AXLEARN_CACHE_DIR")
    path = pathlib.Path(configured) if configured else pathlib.Path.home() / ".cache" / "axlearn"
    return make_private_dir(path.expanduser().absolute())
