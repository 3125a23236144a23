"""Tests of axlearn.common.attention: incremental decoding equals the whole sequence at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axlearn.common.attention import StackedTransformerLayer
from axlearn.common.attention_bias import SlidingWindowAttentionBias
from tests.common.attention.layer_configs import (
    DIM,
    jit_method,
    llama_layer_config,
    llama_stack_config,
    normal,
    random_params,
)

_BATCH, _SEQ, _CHUNK = 3, 9, 4
_X = normal(_BATCH, _SEQ, DIM)


def _build(cfg):
    layer = cfg.instantiate(parent=None)
    params = random_params(layer)
    return layer, params, jit_method(layer, method="extend_step"), jit_method(layer)(params, data=_X).data


_STACK, _PARAMS, _EXTEND, _OUTPUTS = _build(llama_stack_config())


def _decode(layer, params, extend, live_lens, *, max_len=_SEQ):
    """Feeds `_X` in chunks of `_CHUNK` tokens, of which live_lens [num_chunks, batch] are no junk."""
    states = layer.init_states(batch_size=_BATCH, max_len=max_len)
    outputs = np.full(_X.shape, np.nan, np.float32)
    times = np.zeros([_BATCH], int)
    for live in live_lens:
        data = np.full([_BATCH, _CHUNK, DIM], 77.0, np.float32)
        for b in range(_BATCH):
            data[b, : live[b]] = _X[b, times[b] : times[b] + live[b]]
        states, step = extend(
            params, cached_states=states, data=jnp.asarray(data), live_step_len=jnp.asarray(live)
        )
        for b in range(_BATCH):
            outputs[b, times[b] : times[b] + live[b]] = step.data[b, : live[b]]
        times += live
    return states, outputs, times


@st.composite
def _splits(draw):
    """For each row a random way to cut its sequence into chunks, empty ones included."""
    rows = []
    for _ in range(_BATCH):
        row, left = [], _SEQ
        while left:
            row.append(draw(st.integers(0, min(_CHUNK, left))))
            left -= row[-1]
            if len(row) > 20:
                row.extend([1] * left)
                left = 0
        rows.append(row)
    num_chunks = max(map(len, rows))
    return np.array([row + [0] * (num_chunks - len(row)) for row in rows]).T


@settings(max_examples=15, deadline=None)
@given(_splits())
def test_ragged_chunks_equal_the_whole_sequence(live_lens):
    states, outputs, times = _decode(_STACK, _PARAMS, _EXTEND, live_lens)
    assert (times == _SEQ).all()
    np.testing.assert_allclose(outputs, _OUTPUTS, rtol=1e-4, atol=1e-5)
    for path, leaf in jax.tree_util.tree_leaves_with_path(states):
        if "time_step" in jax.tree_util.keystr(path):
            np.testing.assert_array_equal(leaf, np.full([2, _BATCH], _SEQ))


def test_tokens_beyond_the_end_of_the_cache_are_nan_and_leave_the_others_alone():
    # The last row runs over in the middle of a chunk and goes on; there is room for 7 tokens.
    live_lens = np.array([[3, 4, 4], [0, 2, 4], [4, 0, 1]])
    states, outputs, times = _decode(_STACK, _PARAMS, _EXTEND, live_lens, max_len=7)
    for row, time in enumerate(times):
        np.testing.assert_allclose(
            outputs[row, : min(time, 7)], _OUTPUTS[row, : min(time, 7)], rtol=1e-4, atol=1e-5
        )
    assert times[2] == 9
    assert np.isnan(outputs[2, 7:]).all()
    # Neither a row that is full and does not go on nor tokens that are not live make a NaN.
    junk = jnp.full([_BATCH, _CHUNK, DIM], 77.0)
    _, step = _EXTEND(_PARAMS, cached_states=states, data=junk, live_step_len=jnp.zeros([_BATCH], int))
    assert np.isfinite(step.data).all()


def test_prefill_and_single_steps_equal_the_whole_sequence():
    states = _STACK.init_states(batch_size=_BATCH, max_len=_SEQ + 5)
    states, output = _EXTEND(_PARAMS, cached_states=states, data=_X[:, :6])
    outputs = [output.data]
    for t in range(6, _SEQ):
        states, output = _EXTEND(_PARAMS, cached_states=states, data=_X[:, t : t + 1])
        outputs.append(output.data)
    np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), _OUTPUTS, rtol=1e-4, atol=1e-5)


def test_states_hold_nothing_of_tokens_that_are_not_live():
    live_lens = np.array([[4, 2, 0], [4, 4, 0], [1, 3, 0]])
    states, _, _ = _decode(_STACK, _PARAMS, _EXTEND, live_lens)
    cache = states["repeat"]["layer"]["self_attention"]["attention"]["kv_cache"]
    for leaf in jax.tree.leaves(cache):
        assert (leaf[:, 2] == 0).all()
        assert (leaf[:, :2] != 0).all()


def test_a_stack_without_a_loop_decodes_alike():
    cfg = StackedTransformerLayer.default_config().set(
        name="stack", input_dim=DIM, num_layers=2, layer=llama_layer_config()
    )
    params = {f"layer{i}": jax.tree.map(lambda w, i=i: w[i], _PARAMS["repeat"]["layer"]) for i in range(2)}
    layer = cfg.instantiate(parent=None)
    live_lens = np.array([[4, 1, 3], [4, 4, 3], [1, 4, 3]])
    _, outputs, _ = _decode(layer, params, jit_method(layer, method="extend_step"), live_lens)
    np.testing.assert_allclose(outputs, _OUTPUTS, rtol=1e-4, atol=1e-5)


def test_a_sliding_window_decodes_like_the_whole_sequence():
    cfg = llama_stack_config()
    cfg.layer.self_attention.attention.set(
        causal=None, mask=SlidingWindowAttentionBias.default_config(sliding_window_size=2)
    )
    layer, params, extend, expected = _build(cfg)
    assert jnp.abs(expected - _OUTPUTS).max() > 1e-2
    _, outputs, _ = _decode(layer, params, extend, np.array([[4, 1, 3], [4, 4, 3], [1, 4, 3]]))
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)


def test_a_bfloat16_cache_rounds_but_does_not_drift():
    cfg = llama_stack_config()
    cfg.layer.self_attention.attention.kv_cache.cache_dtype = jnp.bfloat16
    layer = cfg.instantiate(parent=None)
    extend = jit_method(layer, method="extend_step")
    _, outputs, _ = _decode(layer, _PARAMS, extend, np.array([[4, 1, 3], [4, 4, 3], [1, 4, 3]]))
    error = np.abs(outputs - _OUTPUTS).max() / np.abs(_OUTPUTS).max()
    # Keys and values have a relative error of at most 2 ** -9.
    assert 1e-5 < error < 2**-7


def test_decoding_without_a_causal_mask_is_refused():
    cfg = llama_stack_config()
    cfg.layer.self_attention.attention.causal = None
    layer = cfg.instantiate(parent=None)
    states = layer.init_states(batch_size=_BATCH, max_len=_SEQ)
    with pytest.raises(ValueError, match="incremental decoding with neither causal nor mask"):
        jit_method(layer, method="extend_step")(random_params(layer), cached_states=states, data=_X)
