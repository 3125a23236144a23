"""Reading one checkpoint: nothing is believed that was not verified."""

import logging
import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, Optional, Protocol, runtime_checkable

import jax

from axlearn.common.checkpointer._index import CheckpointIndex, CheckpointValidationType, check_index
from axlearn.common.checkpointer._layout import PathLike
from axlearn.common.checkpointer._open import open_stored
from axlearn.common.checkpointer._peers import ALONE, Conversation
from axlearn.common.checkpointer._snapshot import Leaves, Stateful, split_leaves
from axlearn.common.checkpointer._storage import StateStorage
from axlearn.common.checkpointer._stored import Share, StoredCheckpoint
from axlearn.common.utils import Nested, TensorSpec, flatten_items, set_recursively

# Says of each path of a state whether it is restored.
PathFilter = Callable[[str], bool]
# Makes the state to ask for from what the checkpoint that is about to be read holds.
StateFn = Callable[[CheckpointIndex], Nested[Any]]


@runtime_checkable
class StatefulByStep(Stateful, Protocol):
    """A leaf whose state follows from the step, where a checkpoint does not hold it."""

    def set_step(self, step: int) -> None:
        """Continues behind `step`."""
        ...


def read_checkpoint(
    ckpt_dir: pathlib.Path,
    *,
    state: Nested[Any],
    storage: StateStorage,
    validation: CheckpointValidationType,
    keep_path: Optional[PathFilter] = None,
    state_fn: Optional[StateFn] = None,
    talk: Conversation = ALONE,
) -> Nested[Any]:
    """Reads a state.

    Everything that is needed is checked before anything is loaded, and everything is loaded before the first
    stateful leaf is told to continue from what was saved.

    Args:
        ckpt_dir: The folder of the checkpoint.
        state: What to read: a tree of `TensorSpec` (or anything with a shape, a dtype or None, and a
            sharding) and of stateful leaves. A stateful leaf that the checkpoint does not hold, or not in a form
            that can be read, is an error unless it can continue from the step alone (`StatefulByStep`).
        storage: What reads the arrays.
        validation: How the checkpoint and `state` must agree. Where the checkpoint may hold more, only what
            is read is verified; else all of it.
        keep_path: Tells which leaves to read; the others, of `state` and of the checkpoint, are left as they
            are. None: all of them.
        state_fn: Makes the state to read from what the checkpoint holds. None: `state` is read.
        talk: The processes that read; each of them verifies a share of the files, and reads what its devices
            need.

    Returns:
        A tree like `state`, with arrays in the place of specs.

    Raises:
        CorruptCheckpointError: If the checkpoint is not what was written.
        CheckpointMismatchError: If it is one of another state.
        FileNotFoundError: If another process does not see the checkpoint that process 0 sees.
    """
    opened = talk.together(
        lambda: _open_and_compare(
            ckpt_dir, state=state, state_fn=state_fn, validation=validation, keep_path=keep_path, talk=talk
        )
    )
    stored, arrays, statefuls = opened.stored, opened.arrays, opened.statefuls
    talk.check_equal(
        {"the list of its files": stored.identity()} if talk.count > 1 else {},
        where=str(ckpt_dir),
        advice="See whether all processes have the same folder before them",
    )
    is_whole = not validation.is_partial and keep_path is None
    paths = None if is_whole else list(arrays)
    # A decoder believes sizes, so nobody decodes anything before all have verified their share.
    talk.together(lambda: stored.check(paths=paths, share=Share(index=talk.index, count=talk.count)))
    documents, values = talk.together(
        lambda: (
            {path: stored.read_document(path) for path in statefuls},
            storage.read_arrays(arrays, stored=stored),
        )
    )
    for path, leaf in statefuls.items():
        leaf.set_state(documents[path])
    for by_step_leaf in opened.by_step.values():
        by_step_leaf.set_step(stored.step)
    if is_whole:
        _log_documents(stored, by_step=opened.by_step)
    leaves = [values.get(path, leaf) for path, leaf in flatten_items(opened.state)]
    return jax.tree.unflatten(jax.tree.structure(opened.state), leaves)


class _Opened(NamedTuple):
    """A checkpoint that holds what is asked for.

    Attributes:
        stored: The checkpoint.
        state: What is asked for.
        arrays: The arrays in it, by path.
        statefuls: Its stateful leaves that the checkpoint holds, by path.
        by_step: Those that continue from the step alone, by path.
    """

    stored: StoredCheckpoint
    state: Nested[Any]
    arrays: Mapping[str, Any]
    statefuls: Mapping[str, Stateful]
    by_step: Mapping[str, StatefulByStep]


def _open_and_compare(
    ckpt_dir: pathlib.Path,
    *,
    state: Nested[Any],
    state_fn: Optional[StateFn],
    validation: CheckpointValidationType,
    keep_path: Optional[PathFilter],
    talk: Conversation,
) -> _Opened:
    """Opens a checkpoint; what it takes and raises is said at `read_checkpoint`."""
    talk.check_visible(ckpt_dir)
    stored = open_stored(ckpt_dir)
    if state_fn is not None:
        state = state_fn(stored.index)
    leaves = split_leaves(state, where="checkpointer.restore", keep_path=keep_path)
    by_step = _find_by_step(stored, leaves)
    statefuls = {path: leaf for path, leaf in leaves.statefuls.items() if path not in by_step}
    check_index(
        stored.index,
        Leaves(arrays=leaves.arrays, statefuls=statefuls),
        where=str(ckpt_dir),
        validation=validation,
        keep_path=keep_path,
    )
    return _Opened(stored, state=state, arrays=leaves.arrays, statefuls=statefuls, by_step=by_step)


def _find_by_step(stored: StoredCheckpoint, wanted: Leaves) -> dict[str, StatefulByStep]:
    """The stateful leaves that have to continue from the step alone."""
    held = {*stored.index.arrays, *stored.index.documents}
    return {
        path: leaf
        for path, leaf in wanted.statefuls.items()
        if path not in held and isinstance(leaf, StatefulByStep)
    }


def _log_documents(stored: StoredCheckpoint, *, by_step: Collection[str]) -> None:
    """Says what became of leaves that the checkpoint does not hold, or not in a form that can be read."""
    for path, kind in stored.unreadable_documents.items():
        logging.warning(
            "%s: %s is stored as %s, which only its writer can read; it is ignored.",
            stored.ckpt_dir,
            path,
            kind,
        )
    for path in by_step:
        logging.warning("%s: %s continues behind step %d.", stored.ckpt_dir, path, stored.step)


def read_state_spec(ckpt_dir: PathLike) -> Nested[TensorSpec]:
    """The arrays that a checkpoint holds.

    Args:
        ckpt_dir: Its folder.

    Returns:
        Nested dicts of `TensorSpec` with shapes and dtypes, without shardings.

    Raises:
        CorruptCheckpointError: If the manifest or the index is not what was written.
        ValueError: If it is not the folder of a checkpoint.
    """
    specs: dict[str, Any] = {}
    for path, entry in open_stored(pathlib.Path(ckpt_dir)).index.arrays.items():
        set_recursively(specs, value=TensorSpec(shape=entry.shape, dtype=entry.dtype), path=path)
    return specs


def verify_checkpoint(ckpt_dir: PathLike) -> None:
    """Reads every file of a checkpoint and compares it with what was written, as far as that is known.

    Of ours every byte is compared with the manifest. AXLearn's have no hashes: every chunk must be there and
    decode, and metadata and index must agree.

    Args:
        ckpt_dir: Its folder.

    Raises:
        CorruptCheckpointError: For the first file that is not what was written.
        ValueError: If it is not the folder of a checkpoint.
    """
    open_stored(pathlib.Path(ckpt_dir)).verify()
