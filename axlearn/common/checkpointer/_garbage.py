"""Deleting checkpoints that nobody needs, never at the cost of one that somebody does.

What may be deleted is decided by checkpoints that are known to be whole: those that this process wrote and
read back, and the one that it started from. A checkpoint goes only when `keep_last_n` such checkpoints are
newer than it.
"""

import logging
import pathlib
import threading
from collections.abc import Collection, Sequence
from typing import Optional

from axlearn.common.checkpointer._errors import CorruptCheckpointError
from axlearn.common.checkpointer._file_ops import FileOps
from axlearn.common.checkpointer._layout import (
    PathLike,
    checkpoint_steps,
    is_ours,
    new_attempt_path,
    parse_step_from_dir,
    step_dir_name,
)
from axlearn.common.checkpointer._manifest import check_sizes, read_manifest


def steps_to_delete(
    steps: Sequence[int],
    *,
    verified_steps: Collection[int],
    keep_last_n: int,
    keep_every_n_steps: Optional[int],
) -> list[int]:
    """Which checkpoints may go.

    Args:
        steps: The steps of which there are checkpoints, ascending.
        verified_steps: Those of them that are known to be whole.
        keep_last_n: How many whole ones stay, counted from the newest. Everything newer than the last of them
            stays too.
        keep_every_n_steps: Of older ones, the first at or after each multiple of this number stays. None:
            none of them.

    Returns:
        Steps, ascending.
    """
    verified = sorted(set(steps) & set(verified_steps))
    if len(verified) < keep_last_n:
        return []
    oldest_kept = verified[-keep_last_n]
    deletable = []
    last_period = 0
    for step in steps:
        period = 0 if keep_every_n_steps is None else step // keep_every_n_steps
        is_first_of_period = period > last_period
        last_period = period
        if step < oldest_kept and not is_first_of_period:
            deletable.append(step)
    return deletable


class GarbageCollector:
    """Deletes checkpoints in a thread of its own: deleting can be slow, and no save waits for it."""

    def __init__(
        self,
        base_dir: pathlib.Path,
        *,
        keep_last_n: int,
        keep_every_n_steps: Optional[int],
        interval_seconds: float,
        files: FileOps,
    ):
        """Makes the collector; its thread starts with the first checkpoint that it is told of.

        Args:
            base_dir: The folder of all checkpoints.
            keep_last_n: As in `steps_to_delete`.
            keep_every_n_steps: As in `steps_to_delete`.
            interval_seconds: It looks after each new checkpoint, and at least this often, so that what could
                not be deleted is tried again.
            files: What changes the file system.
        """
        self._base_dir = base_dir
        self._keep_last_n = keep_last_n
        self._keep_every_n_steps = keep_every_n_steps
        self._interval_seconds = interval_seconds
        self._files = files
        self._verified_steps: set[int] = set()
        # What lost its name and is not gone yet.
        self._trash: set[pathlib.Path] = set()
        self._wake = threading.Event()
        self._is_stopping = False
        self._thread: Optional[threading.Thread] = None

    def add_verified(self, step: int) -> None:
        """Tells it of a checkpoint that is whole, and lets it look."""
        self._verified_steps.add(step)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="checkpoint-garbage", daemon=True)
            self._thread.start()
        self._wake.set()

    def stop(self) -> None:
        """Returns when it has looked once more and its thread has ended."""
        if self._thread is not None:
            self._is_stopping = True
            self._wake.set()
            self._thread.join()
            self._thread = None
            self._is_stopping = False

    def _run(self) -> None:
        is_last_round = False
        while not is_last_round:
            self._wake.wait(self._interval_seconds)
            # In this order: what arrives while it looks wakes it again.
            self._wake.clear()
            is_last_round = self._is_stopping
            try:
                self.collect()
            except OSError as e:
                logging.warning(
                    "%s: old checkpoints could not be deleted; it is tried again: %s", self._base_dir, e
                )

    def collect(self) -> None:
        """Deletes what may go, and what could not be deleted before.

        Raises:
            OSError: If something cannot be deleted.
        """
        for step in self._find_deletable():
            self._trash.add(_rename_to_trash(self._base_dir / step_dir_name(step), files=self._files))
            self._verified_steps.discard(step)
        self._empty_trash()

    def _find_deletable(self) -> list[int]:
        """The steps that may go, after another look at those that are the reason."""
        # What somebody else wrote is not ours to delete, and no reason to delete ours.
        steps = [
            step for step in checkpoint_steps(self._base_dir) if is_ours(self._base_dir / step_dir_name(step))
        ]
        verified = set(self._verified_steps)

        def find_deletable() -> list[int]:
            return steps_to_delete(
                steps,
                verified_steps=verified,
                keep_last_n=self._keep_last_n,
                keep_every_n_steps=self._keep_every_n_steps,
            )

        if not find_deletable():
            return []
        verified = {step for step in verified & set(steps) if self._is_still_there(step)}
        return find_deletable()

    def _empty_trash(self) -> None:
        """Removes what can be removed; raises the first OSError at the end."""
        failures = []
        for path in sorted(self._trash):
            try:
                self._files.remove_tree(path)
            except OSError as e:
                if path.exists():
                    failures.append(e)
                    continue
            self._trash.discard(path)
        if failures:
            raise failures[0]

    def _is_still_there(self, step: int) -> bool:
        """Whether a checkpoint that was whole still looks so, without reading all of it."""
        ckpt_dir = self._base_dir / step_dir_name(step)
        try:
            manifest = read_manifest(ckpt_dir, step=step)
            check_sizes(ckpt_dir, manifest, names=manifest.files)
        except CorruptCheckpointError as e:
            logging.warning("%s Older checkpoints are kept in its place.", e)
            return False
        return True


def cleanup_checkpoint(ckpt_dir: PathLike, *, files: Optional[FileOps] = None) -> None:
    """Deletes a checkpoint. It loses its name first, so that no reader finds half of it.

    Args:
        ckpt_dir: Its folder, not a link to one.
        files: What changes the file system. None: what always does.

    Raises:
        OSError: If it cannot be deleted.
        ValueError: If it is not the folder of a checkpoint.
    """
    files = FileOps() if files is None else files
    files.remove_tree(_rename_to_trash(pathlib.Path(ckpt_dir), files=files))


def _rename_to_trash(ckpt_dir: pathlib.Path, *, files: FileOps) -> pathlib.Path:
    if ckpt_dir.is_symlink():
        raise ValueError(f"{ckpt_dir}: this is a link. Expected the folder of a checkpoint itself.")
    trash = new_attempt_path(ckpt_dir.parent, step=parse_step_from_dir(ckpt_dir), kind="trash")
    files.rename(ckpt_dir, trash)
    files.sync_dir(ckpt_dir.parent)
    return trash
