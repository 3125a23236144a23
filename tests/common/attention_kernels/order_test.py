"""Kernels on rows that lie in head-tail order: the context of the plain maths in the order of the text."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axlearn.common.attention_bias import causal_mask, or_masks, truncated_key_mask
from axlearn.common.attention_kernels import TABLE, AttentionArrays, AttentionTask, Window
from axlearn.common.attention_kernels._tpu_splash import _make_kernel
from axlearn.common.sequence_order import head_tail_indices

_SEQ, _NUM_SHARDS, _NUM_CHUNKS = 512, 2, 4
_INDICES = head_tail_indices(_SEQ, num_chunks=_NUM_CHUNKS)
_PREFIX = or_masks(causal_mask, truncated_key_mask(300))
# Masks as a task has them, and what they let be seen.
_MASKS = {
    "causal": {"window": Window(right=0)},
    "window": {"window": Window(100, 0)},
    "prefix": {"mask_fns": (_PREFIX,)},
}
_VISIBLE = {
    "causal": lambda t, s: s <= t,
    "window": lambda t, s: (s <= t) & (t - s <= 100),
    "prefix": lambda t, s: (s <= t) | (s < 300),
}


def _task(**changes) -> AttentionTask:
    task = AttentionTask(
        platform="cpu",
        dtype=jnp.float32,
        target_len=_SEQ // _NUM_SHARDS,
        source_len=_SEQ,
        num_heads=2,
        num_kv_heads=1,
        per_head_dim=16,
        num_target_shards=_NUM_SHARDS,
        num_chunks=_NUM_CHUNKS,
        tpu_block_size=128,
    )
    return dataclasses.replace(task, **changes)


def _reference(query, key, value, *, segments, mask) -> np.ndarray:
    """One row, in the order of the text."""
    positions = np.arange(_SEQ)
    visible = _VISIBLE[mask](positions[:, None], positions[None]) & (segments[:, None] == segments[None])
    logits = np.einsum("thd,sd->hts", query, key[:, 0])
    logits = np.where(visible, logits, -np.inf)
    probs = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("hts,sd->thd", probs / probs.sum(-1, keepdims=True), value[:, 0])


@pytest.mark.parametrize("mask", _MASKS)
def test_splash_attention_honours_the_order_on_every_shard(mask):
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal((_SEQ, heads, 16)).astype(np.float32) for heads in (2, 1, 1))
    segments = np.repeat(np.arange(2, dtype=np.int32), [330, _SEQ - 330])
    expected = _reference(query, key, value, segments=segments, mask=mask)[_INDICES]
    task = _task(has_segment_ids=True, **_MASKS[mask])
    (kernel,) = (row for row in TABLE if row.name == "tpu_splash")
    assert kernel.refusal(task) is None
    attend = jax.jit(lambda arrays: kernel.attend(task, arrays))
    query, key, value, segments = (x[None, _INDICES] for x in (query, key, value, segments))
    for shard in range(_NUM_SHARDS):
        part = slice(shard * task.target_len, (shard + 1) * task.target_len)
        arrays = AttentionArrays(query[:, part], key, value, None, segments[:, part], segments, None, shard)
        error = np.abs(attend(arrays)[0] - expected[part]).max() / np.abs(expected).max()
        assert error < 2e-5, shard


@pytest.mark.parametrize("shards", [2, 4])
def test_masked_blocks_are_skipped_and_every_shard_has_as_many_others(shards):
    lengths = {"target_len": 2048 // shards, "source_len": 2048, "num_target_shards": shards}

    def num_live_blocks(num_chunks):
        task = _task(window=Window(right=0), num_chunks=num_chunks, **lengths)
        kernel = _make_kernel(task)
        infos = (kernel.fwd_mask_info, kernel.dq_mask_info)
        return [(info.block_mask != 0).reshape(shards, -1).sum(axis=1).tolist() for info in infos]

    # 16 blocks of 128 queries, of which number i sees i + 1 blocks of keys.
    (balanced, balanced_dq), (in_order, in_order_dq) = num_live_blocks(2 * shards), num_live_blocks(1)
    assert balanced == balanced_dq == [16 * 17 // 2 // shards] * shards
    assert in_order == in_order_dq
    assert sum(in_order) == sum(balanced)
    assert sorted(set(in_order)) == in_order
