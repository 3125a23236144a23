"""How the operands of attention lie on the mesh while a kernel runs, and running it there."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Optional

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from axlearn.common.attention_kernels import AttentionArrays
from axlearn.common.jax_compat import auto_axes_of, default_platform
from axlearn.common.utils import applicable_spec, current_mesh


class Placement(NamedTuple):
    """Which mesh axes split the dims of attention: entries of a partition spec that apply on the current mesh.

    Attributes:
        batch: Of queries, keys and values.
        heads: Of all of them too; keys are repeated where there are fewer.
        target: The queries of a sequence.
        source: The keys of a sequence.
    """

    batch: Any = None
    heads: Any = None
    target: Any = None
    source: Any = None


def find_placement(
    specs: Mapping[str, PartitionSpec], *, query_shape: tuple[int, ...], key_shape: tuple[int, ...]
) -> Placement:
    """Which axes split what, as far as they are on the mesh of the current thread and divide the dims.

    Args:
        specs: At "btnh" the partition spec of the queries, at "bsnh" that of keys and values.
        query_shape: `[batch, target, heads, per_head_dim]`.
        key_shape: `[batch, source, kv_heads, per_head_dim]`.

    Returns:
        The placement. Batch and heads of keys lie as those of the queries do: they meet on the same device.
    """
    query_spec = applicable_spec(specs.get("btnh"), shape=query_shape)
    key_spec = applicable_spec(specs.get("bsnh"), shape=key_shape)
    batch, target, heads, _ = _four(query_spec)
    return Placement(batch=batch, heads=heads, target=target, source=_four(key_spec)[1])


def _four(spec: Optional[PartitionSpec]) -> tuple[Any, ...]:
    entries = () if spec is None else tuple(spec)
    return (*entries, *(None,) * (4 - len(entries)))


def num_shards(entry: Any) -> int:
    """Over how many devices of the current mesh an entry of a partition spec splits a dim."""
    return math.prod(_sizes(entry).values())


def axes_of(entry: Any) -> tuple[str, ...]:
    """The axes of the current mesh by which an entry of a partition spec splits anything, outermost first."""
    return tuple(axis for axis, size in _sizes(entry).items() if size > 1)


def _sizes(entry: Any) -> dict[str, int]:
    mesh = current_mesh()
    axes = (entry,) if isinstance(entry, str) else tuple(entry or ())
    return {} if mesh is None else {axis: mesh.shape[axis] for axis in axes}


def num_devices_here() -> int:
    """Number of devices of the mesh that this program is for, as far as its axes are not manual."""
    return math.prod(auto_axes_of(current_mesh()).values())


def platform_here() -> str:
    """The platform that this program is traced for: "tpu", "gpu" or "cpu"."""
    platform = default_platform(current_mesh())
    return "gpu" if platform in ("cuda", "rocm") else platform


def num_kv_repeats(*, num_heads: int, num_kv_heads: int, num_head_shards: int) -> int:
    """How often each key head is repeated, so that as many devices as split the query heads can split them.

    Args:
        num_heads: Number of query heads, a multiple of the other two.
        num_kv_heads: Number of key heads.
        num_head_shards: Number of devices that split the query heads.

    Returns:
        The smallest number that will do: each device then has the key heads of its query heads and no others.
    """
    return next(
        n
        for n in range(1, num_heads // num_kv_heads + 1)
        if num_kv_heads * n % num_head_shards == 0 and num_heads % (num_kv_heads * n) == 0
    )


def run_placed(
    attend: Callable[[AttentionArrays], jax.Array], arrays: AttentionArrays, *, placement: Placement
) -> jax.Array:
    """Runs a kernel on each device, on what the device has of the arrays.

    Args:
        attend: Takes the arrays of a device, returns its part of the context.
        arrays: The arrays, whole. Key heads are repeated here where they must be.
        placement: How they are cut up.

    Returns:
        The context `[batch, target, heads, per_head_dim]`, cut up as the queries.
    """
    num_repeats = num_kv_repeats(
        num_heads=arrays.query.shape[2],
        num_kv_heads=arrays.key.shape[2],
        num_head_shards=num_shards(placement.heads),
    )
    if num_repeats > 1:
        key, value = (jnp.repeat(x, num_repeats, axis=2) for x in (arrays.key, arrays.value))
        arrays = arrays._replace(key=key, value=value)
    if num_devices_here() == 1:
        return attend(arrays)
    specs = _specs(arrays, placement)

    def attend_here(arrays: AttentionArrays) -> jax.Array:
        target_axes = axes_of(placement.target)
        shard = jax.lax.axis_index(target_axes) if target_axes else 0
        return attend(arrays._replace(target_shard=shard))

    return jax.shard_map(
        attend_here,
        mesh=current_mesh(),
        axis_names=set(auto_axes_of(current_mesh())),
        in_specs=(specs,),
        out_specs=specs.query,
        # Kernels of Pallas do not say over which axes their results differ.
        check_vma=False,
    )(arrays._replace(target_shard=None))


def _specs(arrays: AttentionArrays, placement: Placement) -> AttentionArrays:
    """A partition spec in the place of each array."""
    batch, heads, target, source = placement
    has_segments = arrays.target_segment_ids is not None
    specs: dict[str, Any] = {
        "query": PartitionSpec(batch, target, heads, None),
        "key": PartitionSpec(batch, source, heads, None),
        "value": PartitionSpec(batch, source, heads, None),
        "bias": arrays.bias.partition_spec({"bnts": PartitionSpec(batch, heads, target, source)}),
        "target_segment_ids": PartitionSpec(batch, target) if has_segments else None,
        "source_segment_ids": PartitionSpec(batch, source) if has_segments else None,
        "sink": None if arrays.sink is None else PartitionSpec(heads),
        "target_shard": None,
    }
    return AttentionArrays(**specs)
