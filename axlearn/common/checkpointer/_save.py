"""Writing one checkpoint, from a snapshot to the rename that makes it one."""

import dataclasses
import json
import logging
import pathlib
import threading
import time
from collections.abc import Callable
from typing import Any, Optional, Protocol

from axlearn.common.checkpointer._commit import check_not_foreign, commit, remove_attempt
from axlearn.common.checkpointer._errors import CheckpointSaveError, CorruptCheckpointError
from axlearn.common.checkpointer._file_ops import FileEntry, FileOps, StepFolder, is_out_of_space
from axlearn.common.checkpointer._index import build_index
from axlearn.common.checkpointer._layout import (
    DOCUMENTS_DIR,
    checkpoint_paths,
    new_attempt_path,
    step_dir_name,
)
from axlearn.common.checkpointer._manifest import Manifest, verify_files
from axlearn.common.checkpointer._peers import ALONE, Conversation
from axlearn.common.checkpointer._snapshot import Snapshot
from axlearn.common.checkpointer._storage import StateStorage
from axlearn.common.config import error_message
from axlearn.common.processes import PeerTimeoutError


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
    talk: Conversation = ALONE,
) -> int:
    """Writes a checkpoint under a name that nobody reads, verifies it, and gives it its own name.

    Args:
        base_dir: The folder of all checkpoints.
        step: The step.
        snapshot: Its state.
        storage: What writes the arrays.
        files: What changes the file system.
        index_writer: What makes the text of the index.
        talk: The processes that write it; each one its own parts.

    Returns:
        How many bytes were written by all of them.

    Raises:
        OSError: If something could not be written. Nothing is left of the attempt, unless removing it fails
            too.
        CorruptCheckpointError: If what was written does not read back. Nothing is left of it.
        PeerTimeoutError: If another process does not do its part. Nothing is left of it.
        ValueError: If the processes do not have the same state.
    """
    attempt = _Attempt(
        final_dir=base_dir / step_dir_name(step),
        tmp_dir=new_attempt_path(base_dir, step=step, kind="tmp"),
        step=step,
        snapshot=snapshot,
        files=files,
        talk=talk,
    )
    try:
        folder = attempt.write_parts(storage)
        return attempt.finish(folder, index_writer)
    except BaseException:
        # The other processes have stopped writing, or are given up.
        if talk.is_first:
            remove_attempt(attempt.tmp_dir, files=files)
        raise


@dataclasses.dataclass(frozen=True)
class _Attempt:
    """One attempt to write a checkpoint, with whoever has a part of it.

    Attributes:
        final_dir: The name to be.
        tmp_dir: What the folder is called until then; only that of process 0 counts.
        step: The step.
        snapshot: The part of this process.
        files: What changes the file system.
        talk: All processes.
    """

    final_dir: pathlib.Path
    tmp_dir: pathlib.Path
    step: int
    snapshot: Snapshot
    files: FileOps
    talk: Conversation

    def write_parts(self, storage: StateStorage) -> StepFolder:
        """Writes what this process has; returns when all have."""
        shared_dir = self.tmp_dir.with_name(self.talk.first(self._make_folder))
        self.talk.check_equal(
            self.snapshot.common,
            where=f"checkpoint of step {self.step}",
            advice="What is not split between processes has to be the same everywhere",
        )
        return self.talk.together(lambda: self._write_part(shared_dir, storage))

    def _make_folder(self) -> str:
        check_not_foreign(self.final_dir)
        self.files.make_dir(self.tmp_dir)
        return self.tmp_dir.name

    def _write_part(self, shared_dir: pathlib.Path, storage: StateStorage) -> StepFolder:
        self.talk.check_visible(shared_dir)
        folder = StepFolder(shared_dir, files=self.files, is_made=True, is_shared=self.talk.count > 1)
        storage.write_arrays(self.snapshot.arrays, folder=folder)
        if self.talk.is_first:
            for path, text in sorted(self.snapshot.documents.items()):
                folder.write(f"{DOCUMENTS_DIR}/{path}", text.encode("utf-8"))
        else:
            # Process 0 does the same for its part when it finishes the whole.
            folder.sync()
            verify_files(shared_dir, Manifest(step=self.step, files=folder.entries), names=folder.entries)
        return folder

    def finish(self, folder: StepFolder, index_writer: IndexWriter) -> int:
        """Lets process 0 commit what all have written; says on every process how many bytes that is."""
        others = self._entries_of_others(folder)
        num_bytes: list[int] = []

        def commit_all() -> str:
            index = index_writer(build_index(self.snapshot, step=self.step))
            manifest = commit(
                folder, self.final_dir, step=self.step, index=index, files=self.files, others=others
            )
            num_bytes.append(sum(entry.size for entry in manifest.files.values()))
            return str(num_bytes[0])

        try:
            return int(self.talk.first(commit_all))
        except PeerTimeoutError as e:
            if not num_bytes:
                raise
            # The next thing that all do together will fail for those who are missing.
            logging.error(
                "The checkpoint of step %d is complete, but not all could be told. %s", self.step, e
            )
            return num_bytes[0]

    def _entries_of_others(self, folder: StepFolder) -> dict[str, FileEntry]:
        """Tells process 0 what this one wrote; on process 0, returns what the others did."""
        if self.talk.count == 1:
            return {}
        own = {} if self.talk.is_first else {name: [*entry] for name, entry in folder.entries.items()}
        said = self.talk.gather(json.dumps(own)) or []
        return {name: FileEntry(*entry) for text in said for name, entry in json.loads(text).items()}


class BackgroundSave(threading.Thread):
    """One save, on its way to the disk.

    The thread is no daemon: a process that comes to its end waits for it.

    Attributes:
        step: The step.
        num_bytes: How much was written, by all processes; None before the end, and after a failure.
        write_seconds: How long it took.
        is_shared: Whether other processes write parts of it.
    """

    def __init__(
        self,
        base_dir: pathlib.Path,
        *,
        step: int,
        on_commit: Callable[[int], None],
        talk: Conversation,
        **kwargs: Any,
    ):
        """Makes the thread; `start` starts it.

        Args:
            base_dir: The folder of all checkpoints.
            step: The step.
            on_commit: Is told the step when the checkpoint is there and verified; only on process 0.
            talk: As for `write_checkpoint`.
            kwargs: As for `write_checkpoint`.
        """
        super().__init__(name=f"checkpoint-of-step-{step}")
        self.step = step
        self.num_bytes: Optional[int] = None
        self.write_seconds = 0.0
        self.is_shared = talk.count > 1
        self._started_at = time.monotonic()
        self._base_dir = base_dir
        self._on_commit = on_commit
        self._kwargs = {**kwargs, "talk": talk}
        self._talk = talk
        self._error: Optional[BaseException] = None

    def run(self) -> None:
        try:
            self.num_bytes = write_checkpoint(self._base_dir, step=self.step, **self._kwargs)
            if self._talk.is_first:
                self._on_commit(self.step)
        except BaseException as e:
            self._error = e
            if self.is_shared:
                # It is raised where all processes come together again, which may be much later.
                logging.error("checkpoint of step %d: %s", self.step, e)
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
        assert self.num_bytes is not None
        return {"num_bytes": float(self.num_bytes), "write_seconds": self.write_seconds}

    def failure(self) -> Optional[CheckpointSaveError]:
        """What went wrong, as an error to raise; None for success. Only after the end."""
        assert not self.is_alive()
        if self._error is None:
            return None
        paths = checkpoint_paths(self._base_dir)
        earlier = f"the newest is {pathlib.Path(paths[-1]).name}" if paths else "there is none so far"
        todo = "Free space on the disk; the" if is_out_of_space(self._error) else "The"
        known = isinstance(self._error, OSError | CorruptCheckpointError | PeerTimeoutError)
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
