"""Reading one checkpoint: nothing is believed that was not verified."""

import json
import pathlib
from collections.abc import Callable
from typing import Any, Optional

import jax

from axlearn.common.checkpointer._errors import CorruptCheckpointError
from axlearn.common.checkpointer._index import CheckpointValidationType, Index, check_index, parse_index
from axlearn.common.checkpointer._layout import DOCUMENTS_DIR, INDEX_NAME, PathLike, parse_step_from_dir
from axlearn.common.checkpointer._manifest import Manifest, read_manifest, read_verified, verify_files
from axlearn.common.checkpointer._snapshot import split_leaves
from axlearn.common.checkpointer._storage import StateStorage
from axlearn.common.utils import Nested, TensorSpec, flatten_items, set_recursively

# Says of each path of a state whether it is restored.
PathFilter = Callable[[str], bool]


def _read_index(ckpt_dir: pathlib.Path, manifest: Manifest) -> Index:
    data = read_verified(ckpt_dir, manifest, name=INDEX_NAME)
    try:
        index = parse_index(data)
        if index.step != manifest.step:
            raise ValueError(f"is the index of step {index.step}.")
    except ValueError as e:
        raise CorruptCheckpointError(
            ckpt_dir=ckpt_dir, file=INDEX_NAME, reason="bad-index", detail=str(e)
        ) from e
    return index


def read_checkpoint(
    ckpt_dir: pathlib.Path,
    *,
    state: Nested[Any],
    storage: StateStorage,
    validation: CheckpointValidationType,
    keep_path: Optional[PathFilter] = None,
) -> Nested[Any]:
    """Reads a state.

    Everything that is needed verifies before anything is loaded, and everything is loaded before the first
    stateful leaf is told to continue from what was saved.

    Args:
        ckpt_dir: The folder of the checkpoint.
        state: What to read: a tree of `TensorSpec` (or anything with a shape, a dtype or None, and a
            sharding) and of stateful leaves.
        storage: What reads the arrays.
        validation: How the checkpoint and `state` must agree. Where the checkpoint may hold more, only what
            is read is verified; else all of it.
        keep_path: Tells which leaves to read; the others, of `state` and of the checkpoint, are left as they
            are. None: all of them.

    Returns:
        A tree like `state`, with arrays in the place of specs.

    Raises:
        CorruptCheckpointError: If the checkpoint is not what was written.
        CheckpointMismatchError: If it is one of another state.
    """
    wanted = split_leaves(state, where="checkpointer.restore", keep_path=keep_path)
    manifest = read_manifest(ckpt_dir, step=parse_step_from_dir(ckpt_dir))
    index = _read_index(ckpt_dir, manifest)
    check_index(index, wanted, where=str(ckpt_dir), validation=validation, keep_path=keep_path)
    is_whole = not validation.is_partial and keep_path is None
    if is_whole:
        verify_files(ckpt_dir, manifest, names=manifest.files)
    documents = {path: _read_document(ckpt_dir, manifest, path=path) for path in wanted.statefuls}
    arrays = storage.read_arrays(
        wanted.arrays, ckpt_dir=ckpt_dir, manifest=manifest, index=index, is_verified=is_whole
    )
    for path, leaf in wanted.statefuls.items():
        leaf.set_state(documents[path])
    leaves = [arrays.get(path, leaf) for path, leaf in flatten_items(state)]
    return jax.tree.unflatten(jax.tree.structure(state), leaves)


def _read_document(ckpt_dir: pathlib.Path, manifest: Manifest, *, path: str) -> Any:
    name = f"{DOCUMENTS_DIR}/{path}"
    try:
        return json.loads(read_verified(ckpt_dir, manifest, name=name))
    except (ValueError, RecursionError) as e:
        raise CorruptCheckpointError(
            ckpt_dir=ckpt_dir, file=name, reason="bad-document", detail=f"is not JSON ({e})."
        ) from e


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
    ckpt_dir = pathlib.Path(ckpt_dir)
    manifest = read_manifest(ckpt_dir, step=parse_step_from_dir(ckpt_dir))
    specs: dict[str, Any] = {}
    for path, entry in _read_index(ckpt_dir, manifest).arrays.items():
        set_recursively(specs, value=TensorSpec(shape=entry.shape, dtype=entry.dtype), path=path)
    return specs


def verify_checkpoint(ckpt_dir: PathLike) -> None:
    """Reads every file of a checkpoint and compares it with the manifest.

    Args:
        ckpt_dir: Its folder.

    Raises:
        CorruptCheckpointError: For the first file that is not what was written.
        ValueError: If it is not the folder of a checkpoint.
    """
    ckpt_dir = pathlib.Path(ckpt_dir)
    manifest = read_manifest(ckpt_dir, step=parse_step_from_dir(ckpt_dir))
    _read_index(ckpt_dir, manifest)
    verify_files(ckpt_dir, manifest, names=manifest.files)
