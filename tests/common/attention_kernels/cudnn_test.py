"""Tests of what cuDNN is asked for. It does not run here: jax.nn's XLA path computes from the same arguments."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axlearn.common.attention import attention_context, attention_logits, attention_probs
from axlearn.common.attention_bias import (
    CausalAttentionBias,
    LeftRightWindowAttentionBias,
    SegmentIdAttentionBias,
    SlidingWindowAttentionBias,
    TensorAttentionBias,
    ZeroAttentionBias,
    alibi_attention_bias,
)
from axlearn.common.attention_kernels import AttentionArrays, AttentionTask, Window, _gpu_cudnn

_BATCH, _LEN, _HEADS, _KV_HEADS, _DIM = 2, 12, 4, 2, 8
_POSITIONS = jnp.arange(_LEN)[None]
_SEGMENTS = SegmentIdAttentionBias(jnp.asarray([[1] * 5 + [2] * 7, [1] * 12]))
_TENSOR = TensorAttentionBias(
    jnp.asarray(np.random.default_rng(1).standard_normal((1, _HEADS, _LEN, _LEN)), jnp.float32)
)
_CAUSAL = CausalAttentionBias(_POSITIONS, _POSITIONS)


def _normal(num_heads: int, seed: int) -> jax.Array:
    shape = (_BATCH, _LEN, num_heads, _DIM)
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


_QUERY, _KEY, _VALUE = _normal(_HEADS, 0), _normal(_KV_HEADS, 1), _normal(_KV_HEADS, 2)


def _task(**kwargs) -> AttentionTask:
    return AttentionTask(
        platform="gpu",
        dtype=jnp.bfloat16,
        target_len=_LEN,
        source_len=_LEN,
        num_heads=_HEADS,
        num_kv_heads=_KV_HEADS,
        per_head_dim=_DIM,
        **kwargs,
    )


def _context_and_grads(bias, *, attend):
    def loss(query, key, value):
        context = attend(AttentionArrays(query, key, value, bias))
        return jnp.sum(jnp.sin(context)), context

    grads, context = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(_QUERY, _KEY, _VALUE)
    return (context, *grads)


def _plain(arrays: AttentionArrays) -> jax.Array:
    probs = attention_probs(attention_logits(arrays.query, arrays.key), arrays.bias)
    return attention_context(probs, arrays.value)


def _assert_equal(bias, *, attend):
    pairs = zip(_context_and_grads(bias, attend=attend), _context_and_grads(bias, attend=_plain), strict=True)
    for actual, expected in pairs:
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("window", "bias"),
    [
        (Window(), ZeroAttentionBias()),
        (Window(right=0), _CAUSAL),
        (Window(0, 0), SlidingWindowAttentionBias(_POSITIONS, _POSITIONS, sliding_window_size=0)),
        (Window(3, 0), SlidingWindowAttentionBias(_POSITIONS, _POSITIONS, sliding_window_size=3)),
    ],
)
def test_windows_are_asked_for_as_they_are_meant(window, bias):
    task = _task(window=window)
    assert _gpu_cudnn.refusal(task) is None
    arguments = _gpu_cudnn.mask_arguments(task)
    _assert_equal(bias, attend=lambda x: _gpu_cudnn._attend(task, x, implementation="xla", **arguments))


@pytest.mark.parametrize(
    "bias",
    [
        _CAUSAL + _SEGMENTS,
        LeftRightWindowAttentionBias(_POSITIONS, _POSITIONS, left_size=2, right_size=1),
        _CAUSAL + _SEGMENTS + alibi_attention_bias(_POSITIONS, _POSITIONS, num_heads=_HEADS),
        _TENSOR,
        _TENSOR + _SEGMENTS,
    ],
    ids=lambda bias: "+".join(type(leaf).__name__ for leaf in bias.leaves()),
)
def test_arrays_of_biases_hold_everything_that_is_added(bias):
    task = _task(explicit=("something",))
    assert _gpu_cudnn.bias_refusal(task) is None

    def attend(arrays: AttentionArrays) -> jax.Array:
        arguments = _gpu_cudnn.bias_arguments(task, arrays)
        return _gpu_cudnn._attend(task, arrays, implementation="xla", **arguments)

    _assert_equal(bias, attend=attend)


def test_what_cudnn_cannot_count_is_refused():
    split = _task(window=Window(right=0), num_target_shards=2)
    assert _gpu_cudnn.refusal(split) == (
        "counts positions from the first query on a device, which is another one where queries are split"
    )
    assert _gpu_cudnn.refusal(dataclasses.replace(split, window=Window())) is None
    assert "array" in _gpu_cudnn.bias_refusal(_task())
