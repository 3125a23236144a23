"""Writing one checkpoint, from a snapshot to the rename that makes it one."""

import json
import logging
import os
import pathlib
import threading
import time
from collections.abc import Callable
from typing import Any, Optional, Protocol

from axlearn.common.checkpointer._errors import CheckpointSaveError, CorruptCheckpointError
from axlearn.common.checkpointer._file_ops import FileOps, StepFolder, is_out_of_space
from axlearn.common.checkpointer._index import build_index
from axlearn.common.checkpointer._layout import (
    DOCUMENTS_DIR,
    INDEX_NAME,
    MANIFEST_NAME,
    checkpoint_paths,
    foreign_checkpoint_exists,
    is_committed,
    new_attempt_path,
    step_dir_name,
)
from axlearn.common.checkpointer._manifest import Manifest, encode_manifest, read_manifest, verify_files
from axlearn.common.checkpointer._snapshot import Snapshot
from axlearn.common.checkpointer._storage import StateStorage
from axlearn.common.config import error_message


class IndexWriter(Protocol):
    """Turns the index of a checkpoint into the text of its file `index`."""

    def __call__(self, index: list[list[Any]]) -> str:
        """The text, as JSON that reads back as `index`."""
        ...


def index_as_json(index: list[list[Any]]) -> str:
    """The text of `index` as AXLearn writes it: JSON with its default separators, without a final newline."""
    return json.dumps(index)


def write_checkpoint(
    base_dir: pathlib.Path,
    *,
    step: int,
    snapshot: Snapshot,
    storage: StateStorage,
    files: FileOps,
    index_writer: IndexWriter = index_as_json,
) -> Manifest:
    """Writes a checkpoint under a name that nobody reads, verifies it, and gives it its own name.

    Args:
        base_dir: The folder of all checkpoints.
        step: The step.
        snapshot: Its state.
        storage: What writes the arrays.
        files: What changes the file system.
        index_writer: What makes the text of the index.

    Returns:
        What was written.

    Raises:
        OSError: If something could not be written. Nothing is left of the attempt, unless removing it fails
            too.
        CorruptCheckpointError: If what was written does not read back. Nothing is left of it.
    """
    check_not_foreign(base_dir / step_dir_name(step))
    tmp_dir = new_attempt_path(base_dir, step=step, kind="tmp")
    try:
        folder = StepFolder(tmp_dir, files=files)
        storage.write_arrays(snapshot.arrays, folder=folder)
        for path, text in sorted(snapshot.documents.items()):
            folder.write(f"{DOCUMENTS_DIR}/{path}", text.encode("utf-8"))
        index = index_writer(build_index(snapshot, step=step))
        return commit(folder, base_dir / step_dir_name(step), step=step, index=index, files=files)
    except BaseException:
        remove_attempt(tmp_dir, files=files)
        raise


def check_not_foreign(final_dir: pathlib.Path) -> None:
    """Refuses to write a step of which there is a checkpoint that somebody else wrote.

    Raises:
        FileExistsError: If there is one.
    """
    if foreign_checkpoint_exists(final_dir):
        raise FileExistsError(
            error_message(
                where=str(final_dir),
                what="This step has a checkpoint in AXLearn's layout already, which we do not replace",
                advice="Move it away, or save in another folder",
            )
        )


def commit(folder: StepFolder, final_dir: pathlib.Path, *, step: int, index: str, files: FileOps) -> Manifest:
    """Finishes a folder that holds all else, verifies it, and gives it its name.

    Args:
        folder: The folder.
        final_dir: Its name to be.
        step: The step.
        index: The text of `index`.
        files: What changes the file system.

    Returns:
        What was written.

    Raises:
        OSError: If something could not be written.
        CorruptCheckpointError: If what was written does not read back.
    """
    folder.write(INDEX_NAME, index.encode("utf-8"))
    manifest = Manifest(step=step, files=dict(folder.entries))
    folder.write(MANIFEST_NAME, encode_manifest(manifest))
    folder.sync()
    verify_files(folder.path, read_manifest(folder.path, step=step), names=manifest.files)
    _give_name(folder.path, final_dir, step=step, files=files)
    return manifest


def _give_name(tmp_dir: pathlib.Path, final_dir: pathlib.Path, *, step: int, files: FileOps) -> None:
    """Renames a finished folder; what has its name already keeps existing until that is durable."""
    base_dir = final_dir.parent
    replaced = None
    if os.path.lexists(final_dir):
        kind = "uncommitted" if _is_unfinished(final_dir) else "replaced"
        replaced = new_attempt_path(base_dir, step=step, kind=kind)
        files.rename(final_dir, replaced)
    try:
        files.rename(tmp_dir, final_dir)
    except OSError:
        if replaced is not None:
            files.rename(replaced, final_dir)
        raise
    files.sync_dir(base_dir)
    if replaced is None:
        return
    if replaced.is_symlink() or not replaced.is_dir():
        logging.warning(
            "%s is no checkpoint and had the name of one; it is called %s now.", final_dir, replaced.name
        )
        return
    if replaced.name.startswith(f"{final_dir.name}.uncommitted-"):
        logging.warning(
            "%s was begun and not finished by somebody else; it is called %s now.", final_dir, replaced.name
        )
        return
    try:
        files.remove_tree(replaced)
    except OSError as e:
        logging.warning(
            "%s was replaced and could not be removed; the next start tries again: %s", replaced, e
        )


def _is_unfinished(final_dir: pathlib.Path) -> bool:
    """Whether a folder holds what somebody else began to write, and did not finish."""
    is_folder = final_dir.is_dir() and not final_dir.is_symlink()
    return is_folder and bool(os.listdir(final_dir)) and not is_committed(final_dir)


def remove_attempt(tmp_dir: pathlib.Path, *, files: FileOps) -> None:
    """Removes what there is of an attempt that failed; what cannot be removed is logged."""
    try:
        if tmp_dir.exists():
            files.remove_tree(tmp_dir)
    except OSError as e:
        logging.warning(
            "%s was not finished and could not be removed; the next start tries again: %s", tmp_dir, e
        )


class BackgroundSave(threading.Thread):
    """One save, on its way to the disk.

    The thread is no daemon: a process that comes to its end waits for it.

    Attributes:
        step: The step.
        manifest: What was written; None before the end, and after a failure.
        write_seconds: How long it took.
    """

    def __init__(self, base_dir: pathlib.Path, *, step: int, on_commit: Callable[[int], None], **kwargs: Any):
        """Makes the thread; `start` starts it.

        Args:
            base_dir: The folder of all checkpoints.
            step: The step.
            on_commit: Is told the step when the checkpoint is there and verified.
            kwargs: As for `write_checkpoint`.
        """
        super().__init__(name=f"checkpoint-of-step-{step}")
        self.step = step
        self.manifest: Optional[Manifest] = None
        self.write_seconds = 0.0
        self._started_at = time.monotonic()
        self._base_dir = base_dir
        self._on_commit = on_commit
        self._kwargs = kwargs
        self._error: Optional[BaseException] = None

    def run(self) -> None:
        try:
            self.manifest = write_checkpoint(self._base_dir, step=self.step, **self._kwargs)
            self._on_commit(self.step)
        except BaseException as e:
            self._error = e
        finally:
            # The snapshot is as large as the state; nobody needs it any more.
            self._kwargs = {}
            self.write_seconds = time.monotonic() - self._started_at

    @property
    def age_seconds(self) -> float:
        """The time since it began."""
        return time.monotonic() - self._started_at

    def summaries(self) -> dict[str, float]:
        """The size and the duration, to log; only after success."""
        assert self.manifest is not None
        num_bytes = sum(entry.size for entry in self.manifest.files.values())
        return {"num_bytes": float(num_bytes), "write_seconds": self.write_seconds}

    def failure(self) -> Optional[CheckpointSaveError]:
        """What went wrong, as an error to raise; None for success. Only after the end."""
        assert not self.is_alive()
        if self._error is None:
            return None
        paths = checkpoint_paths(self._base_dir)
        earlier = f"the newest is {pathlib.Path(paths[-1]).name}" if paths else "there is none so far"
        todo = "Free space on the disk; the" if is_out_of_space(self._error) else "The"
        known = isinstance(self._error, OSError | CorruptCheckpointError)
        detail = str(self._error) if known else f"{type(self._error).__name__}: {self._error}"
        error = CheckpointSaveError(
            error_message(
                where=f"checkpoint of step {self.step}",
                what=f"It could not be written: {detail}",
                advice=f"Earlier checkpoints are as they were, {earlier}. {todo} next save tries again",
            ),
            step=self.step,
        )
        error.__cause__ = self._error
        return error
