"""Ring attention: keys and values stay split over devices, and travel around them.

Each device keeps its queries. It starts with its own keys and values; while it works on what it has, what its neighbour
had is under way. Nobody ever has all keys, and only neighbours talk. In the backward pass the gradients of keys and
values travel with them, and come home at the end.

Reference:
    Liu, Zaharia and Abbeel, Ring Attention with Blockwise Transformers for Near-Infinite Context,
    https://arxiv.org/abs/2310.01889, section 3.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Optional, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from axlearn.common.attention_kernels._refusals import (
    first_of,
    no_empty_rows,
    no_explicit_bias,
    no_float_dtype,
    no_plain_maths,
)
from axlearn.common.attention_kernels._residuals import with_named_residuals
from axlearn.common.attention_kernels._ring_blocks import (
    Queries,
    Softmax,
    add_keys,
    block_gradients,
    empty_softmax,
)
from axlearn.common.attention_kernels._ring_plan import RingPlan, make_plan
from axlearn.common.attention_kernels._task import AttentionArrays, AttentionTask

T = TypeVar("T")


def refusal(task: AttentionTask) -> Optional[str]:
    """Why this kernel cannot compute an attention. None: it can."""
    return first_of(
        no_plain_maths(task),
        _no_ring(task),
        no_explicit_bias(task),
        no_float_dtype(task, dtypes=("float32", "bfloat16", "float16")),
        _no_plan(task),
        no_empty_rows(task),
    )


def _no_ring(task: AttentionTask) -> Optional[str]:
    if task.num_source_shards == 1:
        return "needs keys that are split over devices"
    targets, sources = (task.target_axes, task.num_target_shards), (task.source_axes, task.num_source_shards)
    if targets != sources:
        found = f"{task.target_axes} and {task.source_axes}"
        return f"needs queries and keys that are split over the same axes, not over {found}"
    return None


def _no_plan(task: AttentionTask) -> Optional[str]:
    if make_plan(task) is None:
        lengths = f"{task.target_len} queries and {task.source_len} keys"
        return (
            f"needs at most {task.tpu_block_size} or a multiple of 128, and there are {lengths} on a device"
        )
    return None


class _Targets(NamedTuple):
    """Queries of a device, in blocks: `[blocks, batch, kv_heads, group, target, per_head_dim]`, and their segments."""

    query: jax.Array
    segment_ids: Optional[jax.Array]


class _Sources(NamedTuple):
    """What travels, in blocks: `[blocks, batch, kv_heads, source, per_head_dim]`, and segments of the keys."""

    key: jax.Array
    value: jax.Array
    segment_ids: Optional[jax.Array]


def attend(task: AttentionTask, arrays: AttentionArrays) -> jax.Array:
    """Attends; to be called within `shard_map`.

    Args:
        task: What is known; `refusal(task)` is None.
        arrays: The arrays.

    Returns:
        The context `[batch, target, heads, per_head_dim]`.
    """
    plan = make_plan(task)
    assert plan is not None, "A task without a plan is refused."
    batch = arrays.query.shape[0]
    group = task.num_heads // task.num_kv_heads
    target_shape = (batch, -1, plan.target_block, task.num_kv_heads, group, task.per_head_dim)
    source_shape = (batch, -1, plan.source_block, task.num_kv_heads, task.per_head_dim)
    targets = _Targets(
        query=arrays.query.reshape(target_shape).transpose(1, 0, 3, 4, 2, 5),
        segment_ids=_blocks_of_ids(arrays.target_segment_ids, block=plan.target_block),
    )
    key, value = (x.reshape(source_shape).transpose(1, 0, 3, 2, 4) for x in (arrays.key, arrays.value))
    sources = _Sources(key, value, _blocks_of_ids(arrays.source_segment_ids, block=plan.source_block))
    sink = None if arrays.sink is None else arrays.sink.reshape(task.num_kv_heads, group)
    named = with_named_residuals(functools.partial(_ring_attention, plan), name=task.residual_name)
    context = named(targets, sources, sink, jnp.asarray(arrays.target_shard, jnp.int32))
    return context.transpose(1, 0, 4, 2, 3, 5).reshape(arrays.query.shape).astype(arrays.value.dtype)


def _blocks_of_ids(segment_ids: Optional[jax.Array], *, block: int) -> Optional[jax.Array]:
    """`[blocks, batch, block]`."""
    if segment_ids is None:
        return None
    return segment_ids.reshape(segment_ids.shape[0], -1, block).transpose(1, 0, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring_attention(
    plan: RingPlan, targets: _Targets, sources: _Sources, sink: Optional[jax.Array], shard: jax.Array
) -> jax.Array:
    """The context, in blocks as the queries are. `shard` is the device's place on the ring."""
    return _forward(plan, targets, sources, sink, shard)[0]


def _forward(
    plan: RingPlan, targets: _Targets, sources: _Sources, sink: Optional[jax.Array], shard: jax.Array
) -> tuple[jax.Array, tuple[Any, ...]]:
    def step(i: Any, carry: tuple[_Sources, Softmax]) -> tuple[_Sources, Softmax]:
        sources, softmax = carry
        # What is sent first can travel while the rest is computed.
        following = _pass_on(plan, sources)
        return following, _add_sources(plan, softmax, targets, sources, shard=shard, step=i)

    last = plan.num_steps - 1
    carry = (sources, empty_softmax(targets.query, sink))
    last_sources, softmax = lax.fori_loop(0, last, step, carry)
    softmax = _add_sources(plan, softmax, targets, last_sources, shard=shard, step=last)
    context = (softmax.context / softmax.total[..., None]).astype(targets.query.dtype)
    log_total = softmax.largest + jnp.log(softmax.total)
    return context, (targets, sources, sink, shard, context, log_total)


def _backward(
    plan: RingPlan, residuals: tuple[Any, ...], d_context: jax.Array
) -> tuple[_Targets, _Sources, Optional[jax.Array], None]:
    targets, sources, sink, shard, context, log_total = residuals
    correction = (context.astype(jnp.float32) * d_context.astype(jnp.float32)).sum(axis=-1)
    queries = Queries(targets.query, d_context, log_total, correction)

    def differentiate(i: Any, sources: _Sources, d_query: jax.Array) -> tuple[jax.Array, Any]:
        return _source_gradients(plan, d_query, queries, targets.segment_ids, sources, shard=shard, step=i)

    def step(i: Any, carry: Any) -> Any:
        sources, d_sources, d_query = carry
        # The gradients of these keys from devices before this one are under way while its own are computed.
        following, arriving = _pass_on(plan, sources), _pass_on(plan, d_sources)
        d_query, d_here = differentiate(i, sources, d_query)
        return following, jax.tree.map(jnp.add, arriving, d_here), d_query

    last = plan.num_steps - 1
    d_query = jnp.zeros(targets.query.shape, jnp.float32)
    following = _pass_on(plan, sources) if last > 0 else sources
    d_query, d_sources = differentiate(0, sources, d_query)
    if last > 0:
        following, d_sources, d_query = lax.fori_loop(1, last, step, (following, d_sources, d_query))
        arriving = _pass_on(plan, d_sources)
        d_query, d_here = differentiate(last, following, d_query)
        d_sources = jax.tree.map(jnp.add, arriving, d_here)
    dtype = targets.query.dtype
    d_key, d_value = jax.tree.map(lambda x: x.astype(dtype), d_sources)
    if last > 0:
        # Sums are complete, so that they may travel home as they will be used.
        d_key, d_value = _pass_on(plan, (d_key, d_value), num_places=plan.num_devices - last)
    d_targets = _Targets(d_query.astype(dtype), None)
    return d_targets, _Sources(d_key, d_value, None), _sink_gradient(sink, queries), None


_ring_attention.defvjp(_forward, _backward)


def _sink_gradient(sink: Optional[jax.Array], queries: Queries) -> Optional[jax.Array]:
    """The gradient of the sink from the queries of this device; the sum over devices is up to `shard_map`."""
    if sink is None:
        return None
    probs = jnp.exp(sink.astype(jnp.float32)[None, None, :, :, None] - queries.log_total)
    return -(probs * queries.correction).sum(axis=(0, 1, 4)).astype(sink.dtype)


def _pass_on(plan: RingPlan, tree: T, *, num_places: int = 1) -> T:
    """Sends arrays to a device further on; all transfers of a step go the same way."""
    size = plan.num_devices
    places = [(i, (i + num_places) % size) for i in range(size)]
    return jax.tree.map(lambda x: lax.ppermute(x, plan.task.source_axes, places), tree)


def _starts(plan: RingPlan, *, shard: jax.Array, step: Any) -> tuple[jax.Array, jax.Array]:
    """Where the blocks of queries start that a device has, and the blocks of keys that it has in this step."""
    owner = jnp.mod(shard - step, plan.num_devices)
    target_starts, source_starts = jnp.asarray(plan.target_starts), jnp.asarray(plan.source_starts)
    return (
        lax.dynamic_index_in_dim(target_starts, shard, keepdims=False),
        lax.dynamic_index_in_dim(source_starts, owner, keepdims=False),
    )


def _add_sources(
    plan: RingPlan, softmax: Softmax, targets: _Targets, sources: _Sources, *, shard: jax.Array, step: Any
) -> Softmax:
    """Adds the keys of a step to the softmax of all queries of the device."""
    target_starts, source_starts = _starts(plan, shard=shard, step=step)

    def per_target_block(_: None, block: Any) -> tuple[None, Softmax]:
        softmax, target, target_start = block

        def per_source_block(softmax: Softmax, block: Any) -> tuple[Softmax, None]:
            source, source_start = block

            def add(softmax: Softmax, mask: Optional[jax.Array]) -> Softmax:
                cap = plan.task.logit_cap
                return add_keys(softmax, target.query, source.key, source.value, mask=mask, logit_cap=cap)

            ids = (target.segment_ids, source.segment_ids)
            return _if_seen(plan, add, softmax, starts=(target_start, source_start), ids=ids), None

        return None, lax.scan(per_source_block, softmax, (sources, source_starts))[0]

    return lax.scan(per_target_block, None, (softmax, targets, target_starts))[1]


def _source_gradients(
    plan: RingPlan,
    d_query: jax.Array,
    queries: Queries,
    target_ids: Optional[jax.Array],
    sources: _Sources,
    *,
    shard: jax.Array,
    step: Any,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Adds to the gradients of queries what the keys of a step give, and returns those of keys and values too."""
    target_starts, source_starts = _starts(plan, shard=shard, step=step)

    def per_source_block(d_query: jax.Array, block: Any) -> tuple[jax.Array, Any]:
        source, source_start = block

        def per_target_block(d_source: Any, block: Any) -> tuple[Any, jax.Array]:
            d_query, queries, target_ids, target_start = block

            def add(grads: Any, mask: Optional[jax.Array]) -> Any:
                cap = plan.task.logit_cap
                added = block_gradients(queries, source.key, source.value, mask=mask, logit_cap=cap)
                return jax.tree.map(jnp.add, grads, tuple(added))

            ids = (target_ids, source.segment_ids)
            d_query, *d_source = _if_seen(
                plan, add, (d_query, *d_source), starts=(target_start, source_start), ids=ids
            )
            return tuple(d_source), d_query

        zeros = jnp.zeros(source.key.shape, jnp.float32)
        blocks = (d_query, queries, target_ids, target_starts)
        d_source, d_query = lax.scan(per_target_block, (zeros, zeros), blocks)
        return d_query, d_source

    return lax.scan(per_source_block, d_query, (sources, source_starts))


def _if_seen(
    plan: RingPlan,
    fn: Callable[[T, Optional[jax.Array]], T],
    x: T,
    *,
    starts: tuple[jax.Array, jax.Array],
    ids: tuple[Optional[jax.Array], Optional[jax.Array]],
) -> T:
    """`fn(x, mask)` where any query of a block sees any key of another; `x` where the block can be skipped.

    Devices branch differently: there are no collectives in here.
    """

    def mask() -> Optional[jax.Array]:
        return plan.mask(*starts, target_ids=ids[0], source_ids=ids[1])

    def compute(x: T) -> T:
        return fn(x, mask())

    def compute_if_any(x: T) -> T:
        if ids[0] is None and not plan.task.mask_fns:
            return compute(x)
        any_pair = mask()
        assert any_pair is not None, "There are segments or masks."
        return lax.cond(any_pair.any(), compute, lambda x: x, x)

    if plan.task.window.is_full:
        return compute_if_any(x)
    return lax.cond(plan.in_window(*starts), compute_if_any, lambda x: x, x)
