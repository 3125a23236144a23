"""Opening the files of a checkpoint, which come from anywhere: nothing is followed out of it, nothing hangs."""

import errno
import os
import pathlib
import stat
import threading
from collections.abc import Callable
from typing import BinaryIO

from axlearn.common.checkpointer._errors import CorruptCheckpointError

# Reading waits for the disk as much as for the processor.
_NUM_THREADS = 4


def open_regular(ckpt_dir: pathlib.Path, name: str) -> BinaryIO:
    """Opens a file of a checkpoint for reading; links, also on the way to it, count as damage.

    Args:
        ckpt_dir: The folder of the checkpoint.
        name: The path in it, with slashes.

    Returns:
        The file, which the caller closes.

    Raises:
        CorruptCheckpointError: If there is no such file, it is none, or the disk cannot read it.
    """

    def corrupt(reason: str, detail: str) -> CorruptCheckpointError:
        return CorruptCheckpointError(ckpt_dir=ckpt_dir, file=name, reason=reason, detail=detail)

    try:
        folder = pathlib.PurePosixPath(name).parent
        for parent in (folder, *folder.parents):
            if not stat.S_ISDIR(os.lstat(ckpt_dir / parent).st_mode):
                raise corrupt("missing-file", f"{parent} is not a folder.")
        # Not blocking: the file may have been replaced by a pipe that nobody writes to.
        fd = os.open(ckpt_dir / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as e:
        if e.errno in (errno.ENOENT, errno.ENOTDIR):
            raise corrupt("missing-file", "is missing.") from e
        if e.errno in (errno.ELOOP, errno.ENXIO):
            raise corrupt("not-a-file", "is not a regular file.") from e
        if e.errno == errno.EIO:
            raise corrupt("read-error", "cannot be read (input/output error).") from e
        raise
    f = open(fd, "rb")  # noqa: SIM115 (the caller closes it)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        f.close()
        raise corrupt("not-a-file", "is not a regular file.")
    return f


def read_small_file(ckpt_dir: pathlib.Path, name: str, *, max_bytes: int) -> bytes:
    """Reads a file of a checkpoint that nothing vouches for.

    Args:
        ckpt_dir: The folder of the checkpoint.
        name: The path in it, with slashes.
        max_bytes: What it may hold at most.

    Returns:
        Its contents.

    Raises:
        CorruptCheckpointError: If it cannot be read, or is larger.
    """
    with open_regular(ckpt_dir, name) as f:
        size = os.fstat(f.fileno()).st_size
        if size > max_bytes:
            raise CorruptCheckpointError(
                ckpt_dir=ckpt_dir,
                file=name,
                reason="size-mismatch",
                detail=f"is {size} bytes long. Expected at most {max_bytes}.",
            )
        try:
            return f.read(max_bytes)
        except OSError as e:
            raise unreadable(e, ckpt_dir, name) from e


def unreadable(e: OSError, ckpt_dir: pathlib.Path, name: str) -> Exception:
    """What to raise for a failed read: damage if the disk says so; another error may be gone next time."""
    if e.errno != errno.EIO:
        return OSError(e.errno, e.strerror, str(ckpt_dir / name))
    return CorruptCheckpointError(
        ckpt_dir=ckpt_dir, file=name, reason="read-error", detail="cannot be read (input/output error)."
    )


def call_in_threads(fn: Callable[[str], None], names: list[str]) -> None:
    """Calls `fn` for each name in a few threads; raises what it raised for the first of them.

    The calling thread works too. Once the main thread has ended, when a save may still be going on, it is the only
    one: a ThreadPoolExecutor refuses work then, and from Python 3.12 on no thread can be started.
    """
    failures: dict[int, BaseException] = {}
    remaining = iter(enumerate(names))
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                i, name = next(remaining, (None, ""))
            if i is None or failures:
                return
            try:
                fn(name)
            except BaseException as e:
                failures[i] = e

    helpers: list[threading.Thread] = []
    for i in range(1, min(_NUM_THREADS, len(names))):
        helper = threading.Thread(target=work, name=f"checkpoint-reading-{i}")
        try:
            helper.start()
        except RuntimeError:
            break
        helpers.append(helper)
    work()
    for helper in helpers:
        helper.join()
    if failures:
        raise failures[min(failures)]
