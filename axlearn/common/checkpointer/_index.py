"""`index`: the leaves of a checkpoint with their shapes and types, and how they fit what is asked for."""

import enum
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Optional

import numpy as np

from axlearn.common.checkpointer._errors import CheckpointMismatchError
from axlearn.common.checkpointer._snapshot import STORABLE_DTYPES, Leaves, Snapshot


class CheckpointValidationType(enum.Enum):
    """How a checkpoint and the state that is asked for must agree.

    EXACT: in paths, shapes and types. EXACT_UP_TO_DTYPE: in paths and shapes; values are cast.
    CONTAINS_STATE: the checkpoint may have more paths. CONTAINS_STATE_UP_TO_DTYPE: it may have more paths,
    and values are cast.
    """

    EXACT = "EXACT"
    EXACT_UP_TO_DTYPE = "EXACT_UP_TO_DTYPE"
    CONTAINS_STATE = "CONTAINS_STATE"
    CONTAINS_STATE_UP_TO_DTYPE = "CONTAINS_STATE_UP_TO_DTYPE"

    @property
    def is_partial(self) -> bool:
        """Whether the checkpoint may hold more than is asked for."""
        return self in (type(self).CONTAINS_STATE, type(self).CONTAINS_STATE_UP_TO_DTYPE)

    @property
    def is_cast_allowed(self) -> bool:
        """Whether the types of arrays may differ."""
        return self in (type(self).EXACT_UP_TO_DTYPE, type(self).CONTAINS_STATE_UP_TO_DTYPE)


class ArrayEntry(NamedTuple):
    """What the index says about an array."""

    shape: tuple[int, ...]
    dtype: np.dtype


class CheckpointIndex(NamedTuple):
    """The leaves of a checkpoint.

    Attributes:
        step: The step.
        arrays: By path.
        documents: The types of the other leaves, by path.
    """

    step: int
    arrays: Mapping[str, ArrayEntry]
    documents: Mapping[str, str]


def build_index(snapshot: Snapshot, *, step: int) -> list[list[Any]]:
    """The index as a list: the step first, then the leaves in order of their paths.

    Args:
        snapshot: What is being written.
        step: Its step.

    Returns:
        `[["step", step], [path, {"dtype": ..., "shape": "(4, 64)"}], [path, "<class ...>"], ...]`.
    """
    leaves: dict[str, Any] = {
        path: index_entry(array.shape, array.dtype) for path, array in snapshot.arrays.items()
    }
    leaves.update(snapshot.document_types)
    return [["step", step], *([path, leaves[path]] for path in sorted(leaves))]


def index_entry(shape: tuple[int, ...], dtype: np.dtype) -> dict[str, str]:
    """What the index says about an array."""
    return {"dtype": dtype.name, "shape": str(tuple(int(n) for n in shape))}


_SHAPE_PATTERN = re.compile(r"\(((\d{1,18}, )*\d{1,18},?)?\)")


def parse_index(data: bytes) -> CheckpointIndex:
    """Reads what `build_index` made, as JSON.

    Raises:
        ValueError: If it is something else.
    """
    try:
        (name, step), *leaves = json.loads(data)
        if name != "step" or type(step) is not int:
            raise ValueError(f"begins with {name!r}")
        arrays, documents = {}, {}
        for path, value in leaves:
            if isinstance(value, dict):
                if value["dtype"] not in STORABLE_DTYPES:
                    raise ValueError(f"{value['dtype']!r} is not a type of arrays")
                arrays[path] = ArrayEntry(shape=_parse_shape(value["shape"]), dtype=np.dtype(value["dtype"]))
            else:
                documents[path] = str(value)
    except (ValueError, TypeError, KeyError, RecursionError) as e:
        raise ValueError(f"is not an index ({type(e).__name__}: {e}).") from e
    return CheckpointIndex(step=step, arrays=arrays, documents=documents)


def _parse_shape(text: str) -> tuple[int, ...]:
    if not _SHAPE_PATTERN.fullmatch(text):
        raise ValueError(f"{text!r} is not a shape")
    return tuple(int(size) for size in re.findall(r"\d+", text))


def check_index(
    index: CheckpointIndex,
    wanted: Leaves,
    *,
    where: str,
    validation: CheckpointValidationType,
    keep_path: Optional[Callable[[str], bool]] = None,
) -> None:
    """Compares what a checkpoint holds with what is asked for.

    Args:
        index: What it holds.
        wanted: What is asked for.
        where: The checkpoint, for the message.
        validation: How they must agree.
        keep_path: Tells which paths of the checkpoint count. None: all of them.

    Raises:
        CheckpointMismatchError: If they do not, with all differences.
    """
    held = {*index.arrays, *index.documents}
    asked = {*wanted.arrays, *wanted.statefuls}
    if keep_path is not None:
        held = {path for path in held if keep_path(path)}
    missing = (asked - held) | {
        path for path in asked & held if (path in wanted.arrays) != (path in index.arrays)
    }
    unexpected = set() if validation.is_partial else held - asked
    shapes, dtypes = [], []
    for path in sorted(set(wanted.arrays) & set(index.arrays)):
        entry, spec = index.arrays[path], wanted.arrays[path]
        if entry.shape != tuple(spec.shape):
            shapes.append(f"{path}: {entry.shape} in the checkpoint, {tuple(spec.shape)} asked for")
        asked_dtype = entry.dtype if spec.dtype is None else np.dtype(spec.dtype)
        if entry.dtype != asked_dtype and not validation.is_cast_allowed:
            dtypes.append(f"{path}: {entry.dtype.name} in the checkpoint, {asked_dtype.name} asked for")
    _raise_differences(
        {"Missing": sorted(missing), "Unexpected": sorted(unexpected), "Shape": shapes, "Dtype": dtypes},
        where=where,
        validation=validation,
    )


# A model with another width differs everywhere, and the optimizer's arrays as the model's: a few tell the story.
_MAX_LISTED = 5


def _raise_differences(
    differences: Mapping[str, list[str]], *, where: str, validation: CheckpointValidationType
) -> None:
    differences = {kind: items for kind, items in differences.items() if items}
    if not differences:
        return
    lines = [
        f"{where}: the checkpoint holds other arrays than are asked for. Expected what was saved with this config "
        f"(validation {validation.name})."
    ]
    for kind, items in differences.items():
        items = sorted(items, key=lambda item: not item.startswith("model/"))
        lines.append(f"  {kind}:")
        lines.extend(f"    {item}" for item in items[:_MAX_LISTED])
        if len(items) > _MAX_LISTED:
            lines.append(f"    ... and {len(items) - _MAX_LISTED} more")
    lines.append(
        "  Set back what has changed (the run's trainer_config says how it was), or use another directory."
    )
    raise CheckpointMismatchError("\n".join(lines))
