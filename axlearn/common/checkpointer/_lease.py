"""One writer for each folder of checkpoints.

Who writes, sweeps or deletes holds a record lock on the file `.writer`. The kernel gives it back when the
process ends, however it ends, so that a lease is never stale; child processes do not inherit it. The file
says who holds it, for the message to the next one. Locks on network file systems work where the mount offers
them (NFS 4, Lustre with `flock`).
"""

import errno
import fcntl
import json
import logging
import os
import pathlib
import socket
import threading
import time
from typing import Optional

from axlearn.common.checkpointer._errors import DirectoryInUseError
from axlearn.common.config import error_message

_LEASE_NAME = ".writer"

# A process may lock a file twice, so its own leases are remembered here.
_held_paths: set[str] = set()
_held_paths_lock = threading.Lock()


class WriterLease:
    """The right to write to a folder."""

    def __init__(self, base_dir: pathlib.Path):
        """Makes a lease that is not held; nothing is touched before `acquire`.

        Args:
            base_dir: The folder of all checkpoints.
        """
        self._base_dir = base_dir
        self._fd: Optional[int] = None
        self._key = ""

    @property
    def path(self) -> pathlib.Path:
        """The file; it stays where it is when the lease is given back."""
        return self._base_dir / _LEASE_NAME

    @property
    def is_held(self) -> bool:
        """Whether this object holds the lease."""
        return self._fd is not None

    def acquire(self) -> None:
        """Takes the lease. The folder is made where it does not exist.

        Raises:
            DirectoryInUseError: If somebody else has it.
            OSError: If the folder cannot be made or written to.
        """
        assert not self.is_held
        try:
            self._base_dir.mkdir(parents=True, exist_ok=True)
            path = self.path
            key = str(path.resolve())
            with _held_paths_lock:
                if key in _held_paths:
                    raise _in_use(self._base_dir, holder=f"process {os.getpid()}, this one")
                self._fd = _open_and_lock(path, base_dir=self._base_dir)
                _held_paths.add(key)
                self._key = key
        except OSError as e:
            message = error_message(
                where=str(self._base_dir),
                what=f"Checkpoints cannot be written here ({e.strerror or e})",
                expected="a folder that can be made and written to, on a file system with locks",
            )
            raise OSError(e.errno, message) from e
        self._write_holder()

    def _write_holder(self) -> None:
        """Writes who holds the lease. Only messages need it: on a full disk the lock is as good without."""
        assert self._fd is not None
        holder = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        try:
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, json.dumps(holder).encode("utf-8"), 0)
        except OSError as e:
            logging.warning("%s: cannot say who holds it (%s).", self.path, e)

    def release(self) -> None:
        """Gives the lease back; nothing happens where it is not held. The file stays, unlocked."""
        with _held_paths_lock:
            if self._fd is not None:
                os.close(self._fd)
                self._fd = None
                _held_paths.discard(self._key)


def _open_and_lock(path: pathlib.Path, *, base_dir: pathlib.Path) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        holder = _read_holder(fd)
        os.close(fd)
        if e.errno in (errno.EACCES, errno.EAGAIN):
            raise _in_use(base_dir, holder=holder) from None
        raise
    return fd


def _read_holder(fd: int) -> str:
    """Who wrote the lease file; it may be just being written."""
    try:
        holder = json.loads(os.pread(fd, 4096, 0))
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"


def _in_use(base_dir: pathlib.Path, *, holder: str) -> DirectoryInUseError:
    return DirectoryInUseError(
        error_message(
            where=str(base_dir),
            what=f"Another run writes its checkpoints here ({holder})",
            expected="one writer for each folder",
            advice="Wait for it to end or stop it, or give this run another folder",
        )
    )
