"""Finding the checkpoint to continue from: the newest one that verifies."""

import json
import logging
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Optional

from axlearn.common.checkpointer._errors import CorruptCheckpointError, NoUsableCheckpointError
from axlearn.common.checkpointer._index import CheckpointValidationType
from axlearn.common.checkpointer._layout import (
    PathLike,
    checkpoint_paths,
    checkpoint_steps,
    corrupt_paths,
    is_ours,
    linked_steps,
    parse_step_from_dir,
    set_aside,
    step_dir_name,
)
from axlearn.common.checkpointer._peers import ALONE, Conversation
from axlearn.common.checkpointer._restore import PathFilter, read_checkpoint
from axlearn.common.checkpointer._storage import StateStorage, TensorStoreStateStorage
from axlearn.common.config import error_message
from axlearn.common.utils import Nested


class Restored(NamedTuple):
    """What was found.

    Attributes:
        step: The step; None where there is no checkpoint.
        state: The state; what was asked for, unchanged, where there is no checkpoint.
    """

    step: Optional[int]
    state: Nested[Any]


def read_step(
    base_dir: pathlib.Path,
    *,
    step: int,
    read: Callable[[pathlib.Path], Nested[Any]],
    talk: Conversation = ALONE,
) -> Nested[Any]:
    """Reads the checkpoint of one step; no other one will do.

    Args:
        base_dir: The folder of all checkpoints.
        step: The step.
        read: Reads the checkpoint in a folder; where several processes read, it fails on all of them or on none.
        talk: The processes that read.

    Returns:
        What `read` returns.

    Raises:
        ValueError: If there is no checkpoint of this step.
        CorruptCheckpointError: If it is not what was written. It keeps its name.
    """

    def find() -> str:
        steps = checkpoint_steps(base_dir)
        if step not in steps:
            raise ValueError(
                error_message(
                    where=str(base_dir),
                    what=f"There is no checkpoint of step {step}",
                    expected=f"one of {', '.join(map(str, steps))}" if steps else None,
                    advice=None if steps else "There is no checkpoint here at all.",
                )
            )
        return step_dir_name(step)

    return read(base_dir / talk.first(find))


def read_newest(
    base_dir: pathlib.Path,
    *,
    state: Nested[Any],
    read: Callable[[pathlib.Path], Nested[Any]],
    is_owner: bool,
    talk: Conversation = ALONE,
) -> Restored:
    """Reads the newest checkpoint that verifies.

    Args:
        base_dir: The folder of all checkpoints.
        state: What is asked for.
        read: Reads the checkpoint in a folder; where several processes read, it fails on all of them or on none.
        is_owner: Whether to set aside those of ours that do not verify, by renaming them. Nothing is deleted.
        talk: The processes that read; process 0 says what there is, and renames.

    Returns:
        The step and the state.

    Raises:
        NoUsableCheckpointError: If there are checkpoints, and none verifies; also if there are only links to some.
        CheckpointMismatchError: If the newest that verifies is one of another state.
    """
    failures: list[str] = []
    names = talk.first(lambda: json.dumps([pathlib.Path(path).name for path in checkpoint_paths(base_dir)]))
    for name in reversed(json.loads(names)):
        ckpt_dir = base_dir / name
        try:
            return Restored(step=parse_step_from_dir(ckpt_dir), state=read(ckpt_dir))
        except CorruptCheckpointError as e:
            failures.append(str(e))
            logging.error("%s", e)
            if is_owner and talk.is_first:
                # All processes have heard of the error, so nobody reads here any more.
                _put_away(ckpt_dir, reason=e.reason)
    talk.first(lambda: _check_none_is_lost(base_dir, failures=failures))
    return Restored(step=None, state=state)


def _check_none_is_lost(base_dir: pathlib.Path, *, failures: Sequence[str]) -> str:
    """Refuses to begin from scratch where there is, or was, something to continue from.

    Args:
        base_dir: The folder of all checkpoints.
        failures: What was wrong with each of those that were tried.

    Returns:
        An empty text.

    Raises:
        NoUsableCheckpointError: If there is.
    """
    earlier = [path for path in corrupt_paths(base_dir) if path.parent == base_dir]
    links = linked_steps(base_dir)
    if links and not failures and not earlier:
        raise NoUsableCheckpointError(
            error_message(
                where=str(base_dir),
                what=f"There are only links to checkpoints ({', '.join(links)}), which are not followed",
                expected="the folders themselves",
                advice="Copy them here; to begin from scratch, remove the links",
            )
        )
    if not failures and not earlier:
        return ""
    names = ", ".join(path.name for path in earlier)
    raise NoUsableCheckpointError(
        error_message(
            where=str(base_dir),
            what="There are checkpoints, but none can be used" + "".join(f"\n  {f}" for f in failures),
            expected=f"at least one that is whole{f'; set aside are {names}' if names else ''}",
            advice="Restore one from a copy; to begin from scratch, move this folder away or choose another",
        )
    )


def _put_away(ckpt_dir: pathlib.Path, *, reason: str) -> None:
    """Sets a checkpoint aside, if it is one of ours."""
    if is_ours(ckpt_dir):
        _set_aside(ckpt_dir, reason=reason)
        return
    logging.error(
        "%s is AXLearn's and keeps its name: step %d cannot be saved until you move it away.",
        ckpt_dir,
        parse_step_from_dir(ckpt_dir),
    )


def _set_aside(ckpt_dir: pathlib.Path, *, reason: str) -> None:
    try:
        logging.error("%s is called %s now.", ckpt_dir, set_aside(ckpt_dir, reason=reason).name)
    except OSError as e:
        # Without its new name it is tried again next time, and fails again: slower, and as safe.
        logging.error("%s could not be renamed: %s", ckpt_dir, e)


def load_checkpoint(
    path: PathLike,
    *,
    state: Nested[Any],
    step: Optional[int] = None,
    validation: CheckpointValidationType = CheckpointValidationType.CONTAINS_STATE,
    keep_path: Optional[PathFilter] = None,
    storage: Optional[StateStorage] = None,
) -> Restored:
    """Reads a state for use, next to a run that may be writing: nothing is renamed, swept or locked.

    Args:
        path: The folder of all checkpoints of a run, or that of one checkpoint.
        state: What to read: a tree of `TensorSpec`, such as `{"model": specs}`.
        step: The step. None: the newest that verifies, or that of `path` where it is one checkpoint.
        validation: How the checkpoint and `state` must agree.
        keep_path: Tells which leaves of `state` to read; the others stay as they are. None: all of them.
        storage: What reads the arrays. None: TensorStoreStateStorage with its defaults.

    Returns:
        The step and the state.

    Raises:
        ValueError: If there is no such checkpoint, or it is one of another state.
        CorruptCheckpointError: If the one that was asked for is not what was written.
        NoUsableCheckpointError: If there are checkpoints, and none can be used.
    """
    base_dir = pathlib.Path(os.path.abspath(path))
    storage = TensorStoreStateStorage.default_config().instantiate() if storage is None else storage

    def read(ckpt_dir: pathlib.Path) -> Nested[Any]:
        return read_checkpoint(
            ckpt_dir, state=state, storage=storage, validation=validation, keep_path=keep_path
        )

    if step is None and base_dir.name.startswith("step_"):
        step, base_dir = parse_step_from_dir(base_dir), base_dir.parent
    if step is not None:
        return Restored(step=step, state=read_step(base_dir, step=step, read=read))
    restored = read_newest(base_dir, state=state, read=read, is_owner=False)
    if restored.step is None:
        raise no_checkpoint(base_dir)
    return restored


def no_checkpoint(base_dir: pathlib.Path) -> ValueError:
    """What to raise where somebody asks for a checkpoint and there is none."""
    return ValueError(
        error_message(
            where=str(base_dir),
            what="There is no checkpoint here",
            expected="the folder `checkpoints` of a run that has saved",
        )
    )
