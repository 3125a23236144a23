"""Gathering a weight before it is multiplied."""

import math
from collections.abc import Sequence
from typing import Any, Optional

import jax

from axlearn.common.utils import current_mesh, maybe_shard


def gather_weight(weight: jax.Array, spec: Optional[Sequence[Any]], *, dims: Sequence[int]) -> jax.Array:
    """Gathers a weight along dims that are split for storage only, where XLA must not be left to do it.

    A weight may be split along one dim over axes that also split the batch (to store less of it on each
    device), along another dim over axes that split the computation. The compiler gathers the first before a
    product. If further axes split the batch, XLA's partitioner can permute the batch without permuting it
    back: outputs are wrong, without any error (measured with jax 0.10.2 and 0.12.0.1: `h @ v` on a mesh
    (data=2, fsdp=2, model=2) with h, v and outputs split by (("data", "fsdp"), "model"), ("model", "fsdp"),
    (("data", "fsdp"), "model")). A weight that is gathered already leaves nothing to get wrong.

    Args:
        weight: The weight.
        spec: Its partition spec; None: replicated.
        dims: The dims that are split for storage only.

    Returns:
        The weight, gathered along `dims` on meshes of the kind described, and as it is on all others.
    """
    mesh = current_mesh()
    if mesh is None or spec is None:
        return weight
    entries = [_axes_of(entry) for entry in spec]
    storage_axes = {axis for dim in dims for axis in entries[dim]}
    compute_axes = {axis for entry in entries for axis in entry} - storage_axes
    other_axes = set(mesh.axis_names) - storage_axes - compute_axes

    def num_shards(axes: set[str]) -> int:
        return math.prod(mesh.shape[axis] for axis in axes if axis in mesh.axis_names)

    if min(num_shards(axes) for axes in (storage_axes, compute_axes, other_axes)) == 1:
        return weight
    return maybe_shard(weight, tuple(None if dim in dims else entry for dim, entry in enumerate(spec)))


def place_output_table(
    table: jax.Array, spec: Optional[Sequence[Any]], *, logits_partition_spec: Sequence[Any]
) -> jax.Array:
    """Places a table [vocab, dim] so that scores [batch, seq, vocab] come out where they are to lie.

    It is small beside them: it moves, they do not.

    Args:
        table: The table.
        spec: How it is stored; None: replicated.
        logits_partition_spec: How the scores are to lie; it need not name the last dims.
    """
    ids_axes = logits_partition_spec[2] if len(logits_partition_spec) > 2 else None
    # First whole in ids, then in parts of them: in one step, XLA for TPU moves scores between slices in place
    # of the table (gspmd-16B-2x16x8 in small on 2 x v5p:2x2x1: 29.4 GiB of temporary memory, now 6.5).
    table = maybe_shard(table, (None, *(spec or (None, None))[1:]))
    return maybe_shard(table, (ids_axes, None))


def dims_split_by_batch_axes(
    spec: Optional[Sequence[Any]], output_spec: Optional[Sequence[Any]]
) -> list[int]:
    """The dims of a weight that are split over axes which split the outputs along any dim but the last."""
    if spec is None or output_spec is None:
        return []
    batch_axes = {axis for entry in tuple(output_spec)[:-1] for axis in _axes_of(entry)}
    return [dim for dim, entry in enumerate(spec) if batch_axes.intersection(_axes_of(entry))]


def _axes_of(entry: Any) -> tuple[str, ...]:
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)
