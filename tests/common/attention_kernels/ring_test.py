"""Tests of axlearn.common.attention_kernels._ring: several blocks a device, and what travels.

`tests/common/flash_attention/mesh_test.py` runs it in the layer, beside other axes.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from axlearn.common.attention_bias import ZeroAttentionBias, causal_mask, or_masks, truncated_key_mask
from axlearn.common.attention_kernels import AttentionArrays, AttentionTask, Window, _ring
from axlearn.common.attention_kernels._ring_plan import make_plan
from axlearn.common.compiled_program import collectives_of
from axlearn.common.sequence_order import head_tail_indices
from axlearn.common.utils import build_mesh

pytestmark = pytest.mark.usefixtures("compiling_anew")

_BATCH, _SEQ, _HEADS, _KV_HEADS, _DIM = 2, 64, 4, 2, 8
_WHOLE = P()
_IDS = np.stack([np.repeat([1, 2, 3], [25, 17, 22]), np.repeat([1, 2], [60, 4])]).astype(np.int32)


def _task(num_devices: int, *, seq_len: int = _SEQ, block: int = 8, **changes) -> AttentionTask:
    task = AttentionTask(
        platform="cpu",
        dtype=jnp.float32,
        target_len=seq_len // num_devices,
        source_len=seq_len // num_devices,
        num_heads=_HEADS,
        num_kv_heads=_KV_HEADS,
        per_head_dim=_DIM,
        num_target_shards=num_devices,
        num_source_shards=num_devices,
        target_axes=("seq",),
        source_axes=("seq",),
        tpu_block_size=block,
    )
    return dataclasses.replace(task, **changes)


def _mesh(task: AttentionTask):
    num_devices, axes = task.num_source_shards, task.source_axes
    shape = (num_devices,) if len(axes) == 1 else (2, num_devices // 2)
    return build_mesh(mesh_shape=shape, mesh_axis_names=axes, devices=jax.devices()[:num_devices])


def _split(task: AttentionTask) -> P:
    return P(None, task.source_axes)


def _attend(task: AttentionTask, floats: dict, segment_ids=None) -> jax.Array:
    """Ring attention of whole arrays."""
    assert _ring.refusal(task) is None
    split = _split(task)
    ids = split if task.has_segment_ids else None
    sink = _WHOLE if task.has_sink else None
    bias = ZeroAttentionBias()
    specs = AttentionArrays(split, split, split, bias, ids, ids, sink, None)

    def attend(arrays):
        return _ring.attend(task, arrays._replace(target_shard=jax.lax.axis_index(task.source_axes)))

    mapped = jax.shard_map(attend, mesh=_mesh(task), in_specs=(specs,), out_specs=split, check_vma=False)
    return mapped(
        AttentionArrays(
            bias=bias,
            target_segment_ids=segment_ids,
            source_segment_ids=segment_ids,
            target_shard=None,
            **floats,
        )
    )


def _reference(task: AttentionTask, floats: dict, segment_ids=None) -> jax.Array:
    """Attention in the order of the text, all at once."""
    floats = {name: x.astype(jnp.float32) for name, x in floats.items()}
    key, value = (
        jnp.repeat(floats[name], task.num_heads // task.num_kv_heads, 2) for name in ("key", "value")
    )
    logits = jnp.einsum("bthd,bshd->bhts", floats["query"], key)
    if task.logit_cap is not None:
        logits = task.logit_cap * jnp.tanh(logits / task.logit_cap)
    t, s = (jnp.arange(x.shape[1]) for x in (floats["query"], key))
    distance = t[:, None] - s[None]
    left, right = task.window
    seen = (distance <= (len(t) if left is None else left)) & (
        -distance <= (len(s) if right is None else right)
    )
    for mask_fn in task.mask_fns:
        seen &= mask_fn(t[:, None], s[None])
    seen = seen[None, None]
    if segment_ids is not None:
        seen = seen & (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    logits = jnp.where(seen, logits, -1e9)
    if task.has_sink:
        sink = jnp.broadcast_to(floats["sink"][None, :, None, None], (*logits.shape[:3], 1))
        logits = jnp.concatenate([logits, sink], axis=-1)
    probs = jax.nn.softmax(logits, axis=-1)[..., : key.shape[1]]
    return jnp.einsum("bhts,bshd->bthd", probs, value)


def _floats(task: AttentionTask) -> dict:
    rng = np.random.default_rng(0)
    target, source = task.total_target_len, task.total_source_len
    shapes = {
        "query": (_BATCH, target, _HEADS, _DIM),
        "key": (_BATCH, source, _KV_HEADS, _DIM),
        "value": (_BATCH, source, _KV_HEADS, _DIM),
    }
    shapes |= {"sink": (_HEADS,)} if task.has_sink else {}
    return {name: jnp.asarray(rng.standard_normal(shape), task.dtype) for name, shape in shapes.items()}


def _grad_fn(attend, task: AttentionTask):
    def loss(floats, segment_ids):
        context = attend(task, floats, segment_ids)
        return jnp.sum(jnp.sin(context.astype(jnp.float32))), context

    return jax.jit(jax.grad(loss, has_aux=True))


@functools.cache
def _compiled(task: AttentionTask):
    """Gradients and context of arrays that are split already, and those arrays."""
    floats, ids = _floats(task), jnp.asarray(_IDS) if task.has_segment_ids else None
    if task.num_chunks > 1:
        indices = head_tail_indices(task.total_target_len, num_chunks=task.num_chunks)
        floats = {name: x if name == "sink" else x[:, indices] for name, x in floats.items()}
        ids = None if ids is None else ids[:, indices]
    mesh = _mesh(task)
    split, whole = NamedSharding(mesh, _split(task)), NamedSharding(mesh, _WHOLE)
    floats = {name: jax.device_put(x, whole if name == "sink" else split) for name, x in floats.items()}
    arguments = (floats, None if ids is None else jax.device_put(ids, split))
    return _grad_fn(_attend, task).lower(*arguments).compile(), arguments


def _travels(task: AttentionTask) -> dict[tuple[str, int], int]:
    """How often arrays of so many bytes move, by kind of collective."""
    found: dict[tuple[str, int], int] = {}
    for collective in collectives_of(
        _compiled(task)[0].as_text(), mesh_shape={"seq": task.num_source_shards}
    ):
        kind = collective.kind, collective.whole_bytes
        found[kind] = found.get(kind, 0) + collective.num_runs
    return found


_CAUSAL = Window(right=0)
_PREFIX = or_masks(causal_mask, truncated_key_mask(20))
_EVERYTHING = {"has_segment_ids": True, "logit_cap": 2.0, "has_sink": True}
_TWO_AXES = dict.fromkeys(("target_axes", "source_axes"), ("fsdp", "seq"))
_NEAR = _task(4, window=Window(10, 0))
_TASKS = {
    "causal": _task(4, window=_CAUSAL),
    "everything": _task(4, window=_CAUSAL, **_EVERYTHING),
    "everything in head-tail order": _task(4, window=_CAUSAL, num_chunks=8, **_EVERYTHING),
    "near": _NEAR,
    "two-sided, head-tail order, two axes": _task(
        4, window=Window(30, 9), num_chunks=8, has_sink=True, **_TWO_AXES
    ),
    "prefix, bfloat16": _task(2, mask_fns=(_PREFIX,), dtype=jnp.bfloat16, has_segment_ids=True),
    "more keys than queries": _task(4, target_len=8, block=16),
}
# Each takes a second or two; the others go with the slow tests.
_ALWAYS = ("everything in head-tail order", "near")


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[] if x in _ALWAYS else pytest.mark.scale) for x in _TASKS]
)
def test_context_and_gradients_are_those_of_attention_all_at_once(name):
    task = _TASKS[name]
    compiled, arguments = _compiled(task)
    grads, context = compiled(*arguments)
    ids = jnp.asarray(_IDS) if task.has_segment_ids else None
    floats = {name: x.astype(jnp.float32) for name, x in _floats(task).items()}
    expected_grads, expected = _grad_fn(_reference, task)(floats, ids)
    for path, reference in {**expected_grads, "context": expected}.items():
        actual = np.asarray({**grads, "context": context}[path], np.float32)
        if task.num_chunks > 1 and path != "sink":
            indices = head_tail_indices(reference.shape[1], num_chunks=task.num_chunks)
            reference = reference[:, indices]
        error = np.abs(actual - reference).max() / np.abs(reference).max()
        assert error < (2e-2 if task.dtype == jnp.bfloat16 else 2e-5), f"{path}: {error}"


def test_nothing_goes_farther_than_a_window_sees():
    array = _BATCH * _SEQ // 4 * _KV_HEADS * _DIM * 4
    # 10 positions before, of 16 on a device: keys and values move once, which the backward pass need not do again, and
    # their gradients once, and straight home.
    assert make_plan(_NEAR).num_steps == 2
    assert _travels(_NEAR) == {("collective-permute", array): 2 + 2 * 2}


def test_keys_and_values_go_round_once_and_again_with_their_gradients_which_come_home():
    travels = _travels(_TASKS["everything in head-tail order"])
    array, ids = _BATCH * _SEQ // 4 * _KV_HEADS * _DIM * 4, _BATCH * _SEQ // 4 * 4
    assert travels == {
        # Of 4 devices, 3 times each for keys and values, twice, and 4 times each for their gradients.
        ("collective-permute", array): 2 * 3 + 2 * 3 + 2 * 4,
        ("collective-permute", ids): 3 + 3,
        # The gradient of the sink, a number for each head: nothing else is of all devices.
        ("all-reduce", _HEADS * 4): 1,
    }


@pytest.mark.parametrize("packed", [False, True])
def test_blocks_that_nobody_sees_are_not_computed_and_a_second_call_does_not_trace_again(packed):
    """What is no number would spoil products even with 0: it does not, where it is masked by index or by document."""
    task = _task(4, window=_CAUSAL, has_segment_ids=packed)
    floats = _floats(task)
    floats["value"] = floats["value"].at[:, 32:].set(jnp.nan)
    ids = None
    if packed:
        floats["value"] = floats["value"].at[1, :8].set(jnp.nan)
        ids = jnp.asarray(np.repeat([1, 2], [8, _SEQ - 8])[None].repeat(_BATCH, axis=0), jnp.int32)
    num_traces = []

    @jax.jit
    def attend(floats, ids):
        num_traces.append(1)
        return _attend(task, floats, ids)

    context = [attend(floats, ids) for _ in range(2)][1]
    assert len(num_traces) == 1
    assert np.isfinite(context[:, 8:32]).all()
    assert not np.isfinite(context[:, 32:]).any()


@pytest.mark.parametrize("num_devices", [2, 4, 8])
def test_in_head_tail_order_all_devices_have_the_same_work_in_every_step(num_devices):
    def work(num_chunks: int) -> np.ndarray:
        task = _task(num_devices, seq_len=4096, block=128, window=_CAUSAL, num_chunks=num_chunks)
        plan = make_plan(task)
        return np.stack(
            [
                plan.in_window(
                    plan.target_starts[:, :, None], np.roll(plan.source_starts, step, axis=0)[:, None, :]
                ).sum(axis=(1, 2))
                for step in range(num_devices)
            ]
        )

    balanced, in_order = work(2 * num_devices), work(1)
    assert (balanced == balanced[:, :1]).all()
    assert balanced.sum() == in_order.sum()
    blocks = 4096 // num_devices // 128
    # Half of the pairs; a row that is cut in order has all of them on the last device, in every step.
    np.testing.assert_array_equal(balanced[1:], blocks**2 // 2)
    assert (in_order[1:].max(axis=1) == blocks**2).all()


def test_blocks_divide_chunks_and_lengths():
    assert make_plan(_task(4, seq_len=4096, block=512, num_chunks=8)).target_block == 512
    assert make_plan(_task(4, seq_len=4096, block=512, num_chunks=16)).target_block == 256
    assert make_plan(_task(4, seq_len=4 * 640, block=512)).target_block == 128
    assert make_plan(_task(4, seq_len=4 * 600, block=512)) is None
    assert make_plan(_task(4, seq_len=96, block=512, num_chunks=36)) is None


def _temporary_bytes(num_devices: int, seq_len: int, *, attend) -> int:
    """Of the gradients, on a device, by the compiler's own sum."""
    task = _task(num_devices, seq_len=seq_len, block=128, window=_CAUSAL)
    split = NamedSharding(_mesh(task), _split(task))
    floats = jax.eval_shape(lambda: _floats(task))
    floats = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split) for name, x in floats.items()}
    compiled = _grad_fn(attend, task).lower(floats, None).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.scale
def test_memory_is_that_of_a_part_of_the_sequence_whatever_the_whole():
    def gathered(task, floats, _):
        keys = {
            name: jax.lax.with_sharding_constraint(floats[name], NamedSharding(_mesh(task), _WHOLE))
            for name in ("key", "value")
        }
        return _reference(task, {**floats, **keys})

    half, full, of_eight = ((4, 1024), (4, 2048), (8, 2048))
    ring = [_temporary_bytes(*sizes, attend=_attend) for sizes in (half, full, of_eight)]
    # Twice the sequence on twice the devices takes what it did; on as many, at most twice: blocks of logits stay.
    assert ring[2] < 1.01 * ring[0]
    assert ring[1] < 2.01 * ring[0]
    others = [_temporary_bytes(*sizes, attend=gathered) for sizes in (half, full, of_eight)]
    assert others[2] > 1.9 * others[0]
    assert others[1] > 3.5 * others[0]
    assert ring[2] < others[2] / 8
