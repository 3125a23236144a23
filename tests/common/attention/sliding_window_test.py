"""Tests of axlearn.common.attention: attention over a sliding window, alone and in stacks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axlearn.common.attention import (
    GroupedQKVLinear,
    GroupedQueryAttention,
    StackedTransformerLayer,
    TransformerLayer,
    enable_sliding_window_attention,
)
from axlearn.common.attention_bias import CausalAttentionBias, SlidingWindowAttentionBias
from axlearn.common.kv_cache.sliding_window_kv_cache import SlidingWindowKVCache
from tests.common.attention.layer_configs import (
    DIM,
    NUM_HEADS,
    NUM_KV_HEADS,
    jit_method,
    llama_layer_config,
    llama_stack_config,
    normal,
    numpy_llama_layer,
    random_params,
)

_BATCH, _SEQ, _CHUNK, _WINDOW = 3, 10, 4, 2
_X = np.asarray(normal(_BATCH, _SEQ, DIM))


def _grouped_config(**kwargs):
    input_linear = GroupedQKVLinear.default_config().set(num_kv_heads=NUM_KV_HEADS)
    return GroupedQueryAttention.default_config().set(
        num_heads=NUM_HEADS, input_linear=input_linear, **kwargs
    )


def _windowed_layer(*, ring: bool) -> TransformerLayer.Config:
    cfg = llama_layer_config()
    if ring:
        return enable_sliding_window_attention(cfg, _WINDOW)
    mask = SlidingWindowAttentionBias.default_config(sliding_window_size=_WINDOW)
    cfg.self_attention.attention.set(causal=None, mask=mask)
    return cfg


def _repeated(*, ring: bool):
    return llama_stack_config().set(layer=_windowed_layer(ring=ring))


def _alternating(*, ring: bool):
    """Windowed, full, windowed: as in models that alternate."""
    layers = [_windowed_layer(ring=ring), llama_layer_config(), _windowed_layer(ring=ring)]
    return StackedTransformerLayer.default_config().set(
        name="stack", input_dim=DIM, num_layers=3, layer=layers
    )


class _Stack:
    """A stack with and without rings: the same parameters, and methods compiled once."""

    def __init__(self, make):
        plain = make(ring=False).instantiate(parent=None)
        self.params = random_params(plain)
        self.outputs = np.asarray(jit_method(plain)(self.params, data=jnp.asarray(_X)).data)
        self.layers = {False: plain, True: make(ring=True).instantiate(parent=None)}
        self.extend = {ring: jit_method(layer, method="extend_step") for ring, layer in self.layers.items()}


_STACKS = {"repeated": _Stack(_repeated), "alternating": _Stack(_alternating)}


@pytest.mark.parametrize("name", _STACKS)
def test_windows_equal_numpy(name):
    stack = _STACKS[name]
    time = np.arange(_SEQ)
    causal = time[:, None] >= time
    windowed = causal & (time[:, None] - time <= _WINDOW)
    if name == "repeated":
        layers = [
            (jax.tree.map(lambda w, i=i: w[i], stack.params["repeat"]["layer"]), windowed) for i in range(2)
        ]
    else:
        layers = [(stack.params[f"layer{i}"], mask) for i, mask in enumerate((windowed, causal, windowed))]
    expected = np.asarray(_X, np.float64)
    for params, mask in layers:
        expected = numpy_llama_layer(params, expected, mask=mask[None], positions=time[None])
    np.testing.assert_allclose(stack.outputs, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", _STACKS)
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 1000))
def test_steps_with_and_without_rings_equal_the_whole_sequence(name, seed):
    stack = _STACKS[name]
    for ring, layer in stack.layers.items():
        rng = np.random.default_rng(seed)
        states = layer.init_states(batch_size=_BATCH, max_len=_SEQ)
        times = np.zeros([_BATCH], int)
        while times.min() < _SEQ:
            live = np.minimum(rng.integers(0, _CHUNK + 1, _BATCH), _SEQ - times)
            chunk = np.zeros([_BATCH, _CHUNK, DIM], np.float32)
            for row in range(_BATCH):
                chunk[row, : live[row]] = _X[row, times[row] : times[row] + live[row]]
            states, output = stack.extend[ring](
                stack.params, cached_states=states, data=jnp.asarray(chunk), live_step_len=jnp.asarray(live)
            )
            for row in range(_BATCH):
                np.testing.assert_allclose(
                    output.data[row, : live[row]],
                    stack.outputs[row, times[row] : times[row] + live[row]],
                    rtol=1e-4,
                    atol=1e-5,
                )
            times += live


def test_the_cache_of_a_window_does_not_grow_with_the_sequence():
    layer = _repeated(ring=True).instantiate(parent=None)
    states = layer.init_states(batch_size=1, max_len=10_000)
    caches = states["repeat"]["layer"]["self_attention"]["attention"]["kv_cache"]
    assert caches["key"].shape == (2, 1, NUM_KV_HEADS, DIM // NUM_HEADS, _WINDOW)
    assert caches["key_positions"].shape == (2, 1, _WINDOW)


def test_a_sequence_shorter_than_its_window_fills_its_cache_and_no_more():
    """The prompt has a room of 6, the window 8: tokens from the seventh on are NaN, as with a `KVCache`."""
    cfg = llama_stack_config()
    whole = jit_method(cfg.instantiate(parent=None))
    layer = enable_sliding_window_attention(cfg.clone(), 8).instantiate(parent=None)
    params = random_params(layer)
    states = layer.init_states(batch_size=_BATCH, max_len=6)
    extend = jit_method(layer, method="extend_step")
    outputs = []
    for start in (0, _CHUNK):
        states, output = extend(params, cached_states=states, data=jnp.asarray(_X[:, start : start + _CHUNK]))
        outputs.append(output.data)
    outputs = np.concatenate(outputs, axis=1)
    expected = whole(params, data=jnp.asarray(_X)).data
    np.testing.assert_allclose(outputs[:, :6], expected[:, :6], rtol=1e-4, atol=1e-5)
    assert np.isnan(outputs[:, 6:]).all()


def test_cross_attention_has_no_window():
    cfg = llama_layer_config()
    cfg.cross_attention = cfg.self_attention.clone()
    enable_sliding_window_attention(cfg, 2)
    assert cfg.cross_attention.attention.causal
    assert cfg.self_attention.attention.causal is None


def test_a_sliding_window_is_switched_on_for_every_self_attention():
    cfg = llama_stack_config()
    cfg.layer.self_attention.attention.kv_cache.set(
        cache_dtype=jnp.bfloat16, kv_partition_spec=("data", None, "model", None)
    )
    assert enable_sliding_window_attention(cfg, 3) is cfg
    attention = cfg.layer.self_attention.attention
    assert attention.causal is None
    assert attention.mask == SlidingWindowAttentionBias.default_config(sliding_window_size=3)
    assert attention.kv_cache == SlidingWindowKVCache.default_config().set(
        cached_kv_length=3, cache_dtype=jnp.bfloat16, kv_partition_spec=("data", None, "model", None)
    )
    alone = enable_sliding_window_attention(_grouped_config(), 2)
    assert alone.kv_cache.cached_kv_length == 2


@pytest.mark.parametrize(
    ("cfg", "size", "message"),
    [
        (_grouped_config(), 0, r"sliding_window_size=0.*at least 1"),
        (GroupedQKVLinear.default_config(), 2, r"no attention layer in a .*GroupedQKVLinear.Config"),
        (_grouped_config(mask=CausalAttentionBias.default_config()), 2, "with mask .*CausalAttentionBias"),
        (
            _grouped_config(kv_cache=SlidingWindowKVCache.default_config().set(cached_kv_length=4)),
            2,
            "with a SlidingWindowKVCache",
        ),
    ],
)
def test_a_sliding_window_is_refused_where_it_would_be_ambiguous(cfg, size, message):
    before = cfg.clone()
    with pytest.raises(ValueError, match=f"(?s){message}"):
        enable_sliding_window_attention(cfg, size)
    assert cfg == before
