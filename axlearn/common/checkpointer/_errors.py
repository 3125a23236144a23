"""What goes wrong with checkpoints, told apart so that callers can act on it."""

import pathlib


class CheckpointSaveError(RuntimeError):
    """A checkpoint could not be written. Those written before it are as they were.

    Attributes:
        step: The step whose checkpoint is missing now.
    """

    def __init__(self, message: str, *, step: int):
        super().__init__(message)
        self.step = step


class CorruptCheckpointError(RuntimeError):
    """A checkpoint does not hold what was written.

    Attributes:
        ckpt_dir: The folder of the checkpoint.
        file: The first file that was found wrong, relative to `ckpt_dir`.
        reason: Which check failed, as a part of a file name, such as "hash-mismatch".
        detail: What is wrong with the file, as a sentence that begins behind its name.
    """

    def __init__(self, *, ckpt_dir: pathlib.Path, file: str, reason: str, detail: str):
        super().__init__(f"{ckpt_dir / file}: {detail} The checkpoint {ckpt_dir.name} cannot be used.")
        self.ckpt_dir = ckpt_dir
        self.file = file
        self.reason = reason
        self.detail = detail


class NoUsableCheckpointError(RuntimeError):
    """There are checkpoints, and none of them can be used.

    It stands in the way of a run that would otherwise start from scratch without anybody having decided so.
    """


class CheckpointMismatchError(ValueError):
    """A checkpoint is whole, but it is one of another state than the one asked for."""


class DirectoryInUseError(RuntimeError):
    """Somebody else writes checkpoints to the same folder."""
