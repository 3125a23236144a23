"""A folder that appears whole or not at all."""

import contextlib
import errno
import os
import pathlib
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import Any, Union

from axlearn.common.config import error_message
from axlearn.common.file_system import fsync_dir

# The shell's status of a process ended by SIGTERM: 128 + 15.
_TERMINATED_STATUS = 143


def check_new_dir(path: Union[str, os.PathLike[str]], *, flag: str) -> pathlib.Path:
    """Checks that nothing is at a path that an empty folder could not be.

    Args:
        path: Where the folder will be.
        flag: What the user gave the path with, for errors.

    Returns:
        The path.

    Raises:
        ValueError: If something is there.
    """
    path = pathlib.Path(os.path.abspath(path))
    # A link could not be replaced by the folder.
    is_dir = path.is_dir() and not path.is_symlink()
    if is_dir and not any(path.iterdir()):
        return path
    if os.path.lexists(path):
        raise ValueError(
            error_message(
                where=f"{flag} {path}",
                what="it exists and is not empty" if is_dir else "it exists and is no folder",
                expected="a folder that does not exist yet",
                advice="Name another one, or move this one away.",
            )
        )
    return path


def check_free_space(path: pathlib.Path, *, num_bytes: int, flag: str) -> None:
    """Checks that a disk has room.

    Args:
        path: Something on the disk, which need not exist yet.
        num_bytes: The room that is needed.
        flag: What the user gave the path with, for errors.

    Raises:
        ValueError: If it has not.
    """
    existing = path
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise ValueError(
            error_message(
                where=f"{flag} {path}",
                what=f"the disk has {format_bytes(free)} left, {format_bytes(num_bytes)} are needed",
                advice="Make room, or name a folder on another disk.",
            )
        )


@contextlib.contextmanager
def new_dir(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A context in which a folder is filled; it gets its name when the block is left without an exception.

    With an exception, SIGTERM included, nothing is left.

    Args:
        path: The folder; see `check_new_dir`.

    Yields:
        The folder to fill, beside its later place.

    Raises:
        OSError: If the folder cannot be made or filled.
    """
    made: list[pathlib.Path] = []
    attempt = None
    try:
        with _sigterm_raises():
            for parent in [parent for parent in reversed(path.parents) if not parent.exists()]:
                parent.mkdir()
                made.append(parent)
            attempt = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}.tmp-", dir=path.parent))
            # mkdtemp makes what only its owner can read; the folder is to be like any other.
            attempt.chmod(0o777 & ~_umask())
            yield attempt
            for folder in (pathlib.Path(root) for root, _, _ in os.walk(attempt)):
                fsync_dir(folder)
            os.rename(attempt, path)
            fsync_dir(path.parent)
    except BaseException as e:
        if attempt is not None:
            shutil.rmtree(attempt, ignore_errors=True)
        for parent in reversed(made):
            with contextlib.suppress(OSError):
                parent.rmdir()
        if isinstance(e, OSError):
            raise _disk_error(e, path) from e
        raise


def _umask() -> int:
    current = os.umask(0o022)
    os.umask(current)
    return current


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """A context in which SIGTERM is an exception, so that what was begun is removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        sys.exit(_TERMINATED_STATUS)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _disk_error(e: OSError, path: pathlib.Path) -> OSError:
    what = "the disk is full" if e.errno in (errno.ENOSPC, errno.EDQUOT) else e.strerror or str(e)
    return OSError(
        error_message(
            where=str(path),
            what=f"it cannot be written: {what}",
            expected="a place with room, that can be written to",
            advice="Nothing is left of it.",
        )
    )


def format_bytes(num_bytes: float) -> str:
    """Returns a size as people read it, such as "1.6 GB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} bytes" if unit == "bytes" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"
