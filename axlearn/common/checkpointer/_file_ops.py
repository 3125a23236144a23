"""Every change that a save makes to the file system, in one place, and the folder that it fills."""

import errno
import hashlib
import os
import pathlib
import shutil
from typing import NamedTuple

from axlearn.common.file_system import fsync_dir


class FileEntry(NamedTuple):
    """What the manifest says about a file.

    Attributes:
        size: In bytes.
        sha256: Of its contents, as 64 hexadecimal digits.
    """

    size: int
    sha256: str


class FileOps:
    """The operations of a save. Each one names the file in its error."""

    def make_dir(self, path: pathlib.Path) -> None:
        """Makes a folder, which must not exist."""
        os.mkdir(path)

    def write_file(self, path: pathlib.Path, data: bytes) -> None:
        """Makes a file, which must not exist; its contents are durable then, its name not yet."""
        with open(path, "xb", buffering=0) as f:
            try:
                view = memoryview(data)
                while view:
                    # Linux writes at most 2 GiB at a time, and a full disk may take a part.
                    view = view[f.write(view) :]
                os.fsync(f.fileno())
            except OSError as e:
                # What fails on an open file does not say which one it is.
                raise OSError(e.errno, e.strerror, str(path)) from e

    def sync_dir(self, path: pathlib.Path) -> None:
        """Makes the names in a folder durable."""
        try:
            fsync_dir(path)
        except OSError as e:
            raise OSError(e.errno, e.strerror, str(path)) from e

    def rename(self, source: pathlib.Path, target: pathlib.Path) -> None:
        """Gives a folder another name, in one step for every reader."""
        os.rename(source, target)

    def remove_tree(self, path: pathlib.Path) -> None:
        """Removes a folder and what is in it; links are removed, not followed."""
        shutil.rmtree(path)


class StepFolder:
    """A folder that is being filled, by one process or by several, and what this one has put there so far.

    Attributes:
        path: The folder.
        entries: The files that this process wrote, by path in it.
    """

    def __init__(self, path: pathlib.Path, *, files: FileOps, is_made: bool = False, is_shared: bool = False):
        """Makes the folder.

        Args:
            path: The folder; its parent exists.
            files: What to write with.
            is_made: Whether another process has made it.
            is_shared: Whether other processes make folders in it too.
        """
        self.path = path
        self._ops = files
        self._is_shared = is_shared
        self._dirs: dict[pathlib.PurePosixPath, None] = {}
        self.entries: dict[str, FileEntry] = {}
        if not is_made:
            files.make_dir(path)

    def write(self, name: str, data: bytes) -> None:
        """Writes a file.

        Args:
            name: Its path in the folder, with slashes; folders on the way are made.
            data: Its contents.
        """
        assert name not in self.entries, name
        path = pathlib.PurePosixPath(name)
        for folder in reversed(path.parents[:-1]):
            if folder not in self._dirs:
                self._make_dir(self.path / folder)
                self._dirs[folder] = None
        self._ops.write_file(self.path / path, data)
        self.entries[name] = FileEntry(size=len(data), sha256=hashlib.sha256(data).hexdigest())

    def _make_dir(self, path: pathlib.Path) -> None:
        try:
            self._ops.make_dir(path)
        except FileExistsError:
            if not self._is_shared:
                raise

    def sync(self) -> None:
        """Makes the names of all files that this process wrote durable, from the innermost folder outwards."""
        for folder in sorted(self._dirs, key=lambda path: len(path.parts), reverse=True):
            self._ops.sync_dir(self.path / folder)
        self._ops.sync_dir(self.path)


def is_out_of_space(error: BaseException) -> bool:
    """Whether an error says that the disk, or the user's share of it, is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
