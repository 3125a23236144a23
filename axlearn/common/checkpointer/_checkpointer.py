"""The checkpointer of a run: when to save, in the background; what to continue from; what to keep."""

import logging
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any, Optional

from axlearn.common.checkpointer._errors import CheckpointSaveError
from axlearn.common.checkpointer._file_ops import FileOps
from axlearn.common.checkpointer._garbage import GarbageCollector
from axlearn.common.checkpointer._index import CheckpointValidationType
from axlearn.common.checkpointer._layout import sweep_leftovers
from axlearn.common.checkpointer._lease import WriterLease
from axlearn.common.checkpointer._peers import Peers
from axlearn.common.checkpointer._policies import CheckpointPolicy, every_n_steps_policy
from axlearn.common.checkpointer._restore import PathFilter, StateFn, read_checkpoint
from axlearn.common.checkpointer._save import BackgroundSave, IndexWriter, index_as_json
from axlearn.common.checkpointer._select import Restored, read_newest, read_step
from axlearn.common.checkpointer._snapshot import take_snapshot
from axlearn.common.checkpointer._storage import StateStorage, TensorStoreStateStorage
from axlearn.common.config import (
    REQUIRED,
    ConfigOr,
    InstantiableConfig,
    Required,
    config_class,
    config_for_function,
    error_message,
    maybe_instantiate,
)
from axlearn.common.module import Module, nowrap
from axlearn.common.summary_writer import BaseWriter
from axlearn.common.utils import Nested


class Checkpointer(Module):
    """Saves states as checkpoints that cannot be half there, and restores the newest that is whole.

    `save` copies the state to the host and returns; a thread writes the copy to `step_N.tmp-<attempt>`, reads
    it back, and renames it to `step_N`. While that folder exists, a save is under way. One save is under way
    at a time.

    The first `restore` or `save` makes this object the only writer of its folder, until `stop`.

    With several processes, all of them have a checkpointer for the same folder on a file system that they share, and
    call `restore` and `save` at the same steps. Each one writes and reads its own parts. They come to the same
    end: a save is there for all of them or fails on all, and all of them restore the same step.
    """

    @config_class
    class Config(Module.Config):
        """Configures Checkpointer."""

        # The folder of all checkpoints; made when first needed.
        dir: Required[str] = REQUIRED
        # Decides after each step whether to save.
        save_policy: InstantiableConfig[CheckpointPolicy] = config_for_function(every_n_steps_policy)
        # How many checkpoints that are known to be whole stay, counted from the newest; at least 2.
        keep_last_n: int = 2
        # Of older checkpoints, the first at or after each multiple of this number of steps stays. None: none
        # of them.
        keep_every_n_steps: Optional[int] = None
        # Old checkpoints are deleted after each new one; what could not be deleted is tried again after this
        # time.
        gc_loop_interval_seconds: float = 60
        # How arrays become files.
        storage: StateStorage.Config = TensorStoreStateStorage.default_config()
        # Where to write how long saves take and how large they are. None: nowhere.
        summary_writer: Optional[BaseWriter.Config] = None
        # Makes the text of the index (see `IndexWriter`). None: AXLearn's JSON.
        index_writer: Optional[ConfigOr[IndexWriter]] = None
        # How a checkpoint and the state to restore must agree. None: EXACT.
        validation: Optional[CheckpointValidationType] = None
        # Of several processes: how long the first one that has done its part of a save or a restore waits for
        # the last one, in seconds. None: half as long as a save may take, which is `storage.timeout_secs`.
        peer_timeout_seconds: Optional[float] = None
        # Tells by path which leaves to restore; see `drop_learner_optimizer_cfg`. None: all of them.
        restore_state_filter: Optional[ConfigOr[PathFilter]] = None

    def __init__(self, cfg: Config, *, parent: Optional[Module]):
        super().__init__(cfg, parent=parent)
        _check_config(cfg, where=self.path())
        self._base_dir = pathlib.Path(cfg.dir)
        self._policy = cfg.save_policy.instantiate()
        self._storage: StateStorage = cfg.storage.instantiate()
        self._index_writer: IndexWriter = maybe_instantiate(cfg.index_writer) or index_as_json
        self._keep_path: Optional[PathFilter] = maybe_instantiate(cfg.restore_state_filter)
        self._summary_writer: Optional[BaseWriter] = None
        if cfg.summary_writer is not None:
            self._summary_writer = self._add_child("summary_writer", cfg.summary_writer)
        self._files = FileOps()
        self._lease = WriterLease(self._base_dir)
        self._garbage = GarbageCollector(
            self._base_dir,
            keep_last_n=cfg.keep_last_n,
            keep_every_n_steps=cfg.keep_every_n_steps,
            interval_seconds=cfg.gc_loop_interval_seconds,
            files=self._files,
        )
        self._save_under_way: Optional[BackgroundSave] = None
        timeout = cfg.peer_timeout_seconds
        self._peers = Peers(timeout_seconds=cfg.storage.timeout_secs / 2 if timeout is None else timeout)
        # Whether the folder is this object's, on whichever process holds the lease.
        self._is_owner = False

    # Saving.

    @nowrap
    def is_due(self, *, step: int, evaler_summaries: Optional[Mapping[str, Any]] = None) -> bool:
        """Whether the policy asks for a save.

        Args:
            step: The step that was just finished.
            evaler_summaries: What the evalers found at this step; None where none ran.

        Returns:
            Whether `save` would save.

        Raises:
            CheckpointSaveError: If the save before failed and nobody was told yet. With several processes it waits
                for the next `save`, `wait_until_finished` or `stop`, where all are told at the same step.
        """
        failure = self._poll_failure()
        if failure is not None:
            raise failure
        return bool(self._policy(step=step, evaler_summaries=evaler_summaries or {}))

    @nowrap
    def save(
        self,
        *,
        step: int,
        state: Nested[Any],
        evaler_summaries: Optional[Mapping[str, Any]] = None,
        force: bool = False,
    ) -> None:
        """Saves, if the policy asks for it.

        When this returns, the arrays of `state` may be overwritten. If a save is still under way, this waits
        for it: there is never more than one copy of the state on the host.

        Args:
            step: The step that was just finished.
            state: A tree of arrays and of stateful leaves (`Stateful`).
            evaler_summaries: What the evalers found at this step; None where none ran.
            force: Saves whatever the policy says.

        Raises:
            CheckpointSaveError: If the save before this one failed. This one is under way all the same.
            DirectoryInUseError: If somebody else writes to the same folder.
            TimeoutError: If the save before is under way for longer than `storage.timeout_secs`.
            TypeError: If a leaf cannot be stored.
            ValueError: If the path of a leaf cannot be stored.
        """
        failure = self._poll_failure()
        if force or self._policy(step=step, evaler_summaries=evaler_summaries or {}):
            failure = self._await_failure() or failure
            self._start_save(step, state)
        if failure is not None:
            raise failure

    def _start_save(self, step: int, state: Nested[Any]) -> None:
        self._own()
        talk = self._peers.begin(f"save of step {step}")
        started_at = time.monotonic()
        snapshot = take_snapshot(state)
        self.vlog(1, "step %d was copied to the host in %.3f s", step, time.monotonic() - started_at)
        self._save_under_way = BackgroundSave(
            self._base_dir,
            step=step,
            snapshot=snapshot,
            storage=self._storage,
            files=self._files,
            index_writer=self._index_writer,
            on_commit=self._garbage.add_verified,
            talk=talk,
        )
        self._save_under_way.start()

    def _poll_failure(self) -> Optional[CheckpointSaveError]:
        """What went wrong in the save before, if it has come to an end, and all processes know that it has."""
        save = self._save_under_way
        if save is None or save.is_shared or save.is_alive():
            return None
        return self._end_save(save)

    def _await_failure(self) -> Optional[CheckpointSaveError]:
        """What went wrong in the save before, once it has come to an end."""
        save = self._save_under_way
        if save is None:
            return None
        timeout_secs = self._storage.config.timeout_secs
        save.join(timeout=max(0.0, timeout_secs - save.age_seconds))
        if save.is_alive():
            raise TimeoutError(
                error_message(
                    where=f"checkpoint of step {save.step}",
                    what=f"It is being written for {save.age_seconds:.0f} s now, to {self._base_dir}",
                    expected=f"at most {self.path()}.storage.timeout_secs={timeout_secs} s",
                    advice="See whether the file system hangs",
                )
            )
        return self._end_save(save)

    def _end_save(self, save: BackgroundSave) -> Optional[CheckpointSaveError]:
        self._save_under_way = None
        failure = save.failure()
        if failure is None and self._summary_writer is not None:
            self._summary_writer(save.step, {"checkpointer": save.summaries()})
        return failure

    @nowrap
    def wait_until_finished(self) -> None:
        """Returns when no save is under way.

        Raises:
            CheckpointSaveError: If it failed.
            TimeoutError: If it is under way for longer than `storage.timeout_secs`.
        """
        failure = self._await_failure()
        if failure is not None:
            raise failure

    @nowrap
    def stop(self) -> None:
        """Waits for the save that is under way, deletes what may go, and lets others write to the folder.

        Raises:
            CheckpointSaveError: If the last save failed and nobody was told. While another exception is on
                its way, it is logged instead: the other one came first.
            TimeoutError: As `wait_until_finished`.
        """
        try:
            failure = self._await_failure()
        finally:
            self._garbage.stop()
            if self._save_under_way is None:
                self._lease.release()
                self._is_owner = False
        if failure is not None and sys.exception() is None:
            raise failure
        if failure is not None:
            logging.error("%s", failure)

    # Restoring.

    @nowrap
    def restore(
        self, *, step: Optional[int] = None, state: Nested[Any], state_fn: Optional[StateFn] = None
    ) -> Restored:
        """Restores a state.

        A checkpoint of ours that is damaged is renamed to `step_N.corrupt-<reason>`, and the one before it is
        tried. One in AXLearn's layout keeps its name in any case.

        Args:
            step: The step; then no other one will do, and nothing is renamed. None: the newest that is whole.
            state: What to restore: a tree of `TensorSpec` and of stateful leaves. Each stateful leaf is told
                to continue from what was saved, after everything else is there; where that was not saved, one
                with `set_step(step)` is told the step.
            state_fn: Makes the state to restore from what the checkpoint holds, such as one with fewer parts; it
                is called anew for each checkpoint that is tried. None: `state` is restored.

        Returns:
            `(step, state)`: the step, and the state with arrays in the place of specs, in the memory that
            their shardings say. `(None, state)` where there is no checkpoint.

        Raises:
            NoUsableCheckpointError: If there are checkpoints, and none is whole.
            CheckpointMismatchError: If the checkpoint is one of another state; a ValueError.
            ValueError: If there is no checkpoint of `step`.
            CorruptCheckpointError: If the one of `step` is damaged.
            DirectoryInUseError: If somebody else writes to the same folder; `load_checkpoint` reads next to
                them.
            OSError: If the folder cannot be made, written to or cleared of what killed attempts left.
        """
        self._own()
        talk = self._peers.begin("restore")
        validation = self.config.validation or CheckpointValidationType.EXACT

        def read(ckpt_dir: pathlib.Path) -> Nested[Any]:
            return read_checkpoint(
                ckpt_dir,
                state=state,
                storage=self._storage,
                validation=validation,
                keep_path=self._keep_path,
                state_fn=state_fn,
                talk=talk,
            )

        if step is not None:
            restored = Restored(step=step, state=read_step(self._base_dir, step=step, read=read, talk=talk))
        else:
            restored = read_newest(self._base_dir, state=state, read=read, is_owner=True, talk=talk)
        is_verified = not validation.is_partial and self._keep_path is None
        if restored.step is not None and is_verified and talk.is_first:
            self._garbage.add_verified(restored.step)
        return restored

    def _own(self) -> None:
        """Becomes the only writer of the folder, and clears away what killed ones left behind.

        Of several processes, process 0 holds the lease for all.
        """
        if self._is_owner:
            return
        talk = self._peers.begin("start")

        def take_and_sweep() -> str:
            self._lease.acquire()
            sweep_leftovers(self._base_dir)
            return self._lease.path.name

        try:
            lease_name = talk.first(take_and_sweep)
            talk.together(lambda: talk.check_visible(self._base_dir / lease_name))
        except BaseException:
            # Whoever holds the lease has swept.
            self._lease.release()
            raise
        self._is_owner = True


def _check_config(cfg: Checkpointer.Config, *, where: str) -> None:
    if cfg.keep_last_n < 2:
        raise ValueError(
            error_message(
                where=f"{where}.keep_last_n",
                what=f"{cfg.keep_last_n} is too few",
                expected="at least 2, because a run whose only checkpoint is damaged is lost",
                nearest=2,
            )
        )
    positive = ("gc_loop_interval_seconds", "keep_every_n_steps", "peer_timeout_seconds")
    for name, value in ((name, getattr(cfg, name)) for name in positive):
        if value is not None and value <= 0:
            raise ValueError(error_message(where=f"{where}.{name}", what=f"{value}", expected="more than 0"))
