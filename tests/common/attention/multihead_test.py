"""Tests of axlearn.common.attention: MultiheadAttention and GroupedQueryAttention over whole sequences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axlearn.common.attention import (
    ALiBiAttentionLogitBiasLayer,
    CausalAttentionLogitBiasLayer,
    FullAttentionLogitBiasLayer,
    GroupedQKVLinear,
    GroupedQueryAttention,
    MultiheadAttention,
    SigmoidAttention,
    SymmetricALiBiAttentionLogitBiasLayer,
    attention_probs,
    enable_sliding_window_attention,
)
from axlearn.common.attention_bias import (
    CausalAttentionBias,
    LeftRightWindowAttentionBias,
    MaskFnAttentionBias,
    SlidingWindowAttentionBias,
    TensorAttentionBias,
    ZeroAttentionBias,
    alibi_attention_bias,
    causal_mask,
    or_masks,
    truncated_key_mask,
)
from axlearn.common.config import config_for_function
from axlearn.common.kv_cache.sliding_window_kv_cache import SlidingWindowKVCache
from axlearn.common.module import functional
from tests.common.attention.layer_configs import (
    DIM,
    NUM_HEADS,
    NUM_KV_HEADS,
    equations,
    jit_method,
    llama_attention_config,
    normal,
    numpy_attention,
    random_params,
)

_SEQ = 7
_X = normal(3, _SEQ, DIM)


def _build(cfg, **kwargs):
    dims = {"query_dim": DIM, "key_dim": DIM, "value_dim": DIM}
    layer = cfg.set(name="attention", **dims, **kwargs).instantiate(parent=None)
    return layer, random_params(layer)


_LLAMA, _LLAMA_PARAMS = _build(llama_attention_config())
_LLAMA_FORWARD = jit_method(_LLAMA)


def _project(x, params):
    return np.einsum("btd,dnh->btnh", x, params["weight"]) + np.asarray(params["bias"])


def _reference(params, x, source, mask):
    q = _project(x, params["i_proj"]["q_proj"])
    k, v = (_project(source, params["i_proj"][name]) for name in ("k_proj", "v_proj"))
    context = numpy_attention(q, k, v, mask)
    return np.einsum("btnh,dnh->btd", context, params["o_proj"]["weight"]) + np.asarray(
        params["o_proj"]["bias"]
    )


def _grouped_config(**kwargs):
    input_linear = GroupedQKVLinear.default_config().set(num_kv_heads=NUM_KV_HEADS)
    return GroupedQueryAttention.default_config().set(
        num_heads=NUM_HEADS, input_linear=input_linear, **kwargs
    )


@pytest.mark.parametrize("grouped", [False, True])
def test_attention_equals_numpy_for_self_and_cross_attention(grouped):
    cfg = _grouped_config() if grouped else MultiheadAttention.default_config().set(num_heads=NUM_HEADS)
    layer, params = _build(cfg)
    forward = jit_method(layer)
    full = np.ones([1, _SEQ, _SEQ], bool)
    np.testing.assert_allclose(
        forward(params, query=_X).data, _reference(params, _X, _X, full), rtol=1e-4, atol=1e-5
    )
    source = normal(3, 4, DIM, seed=5)
    np.testing.assert_allclose(
        forward(params, query=_X, key=source, value=source).data,
        _reference(params, _X, source, full[:, :, :4]),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize(
    ("kwargs", "biases", "rule"),
    [
        ({"causal": True}, None, lambda t, s: s <= t),
        (
            {"mask": SlidingWindowAttentionBias.default_config(sliding_window_size=2)},
            None,
            lambda t, s: t - 2 <= s <= t,
        ),
        ({"mask": CausalAttentionBias.default_config()}, None, lambda t, s: s <= t),
        ({}, np.where(np.arange(_SEQ) == 3, -np.inf, 0)[None].repeat(_SEQ, 0), lambda t, s: s != 3),
    ],
)
def test_masks_and_biases_hide_keys(kwargs, biases, rule):
    layer, params = _build(_grouped_config(**kwargs))
    mask = np.array([[[rule(t, s) for s in range(_SEQ)] for t in range(_SEQ)]])
    inputs = {} if biases is None else {"attention_logit_biases": jnp.asarray(biases, jnp.float32)}
    outputs = jit_method(layer)(params, query=_X, **inputs).data
    np.testing.assert_allclose(outputs, _reference(params, _X, _X, mask), rtol=1e-4, atol=1e-5)


def test_grouped_heads_equal_repeated_heads():
    grouped, params = _build(_grouped_config(causal=True))
    full, _ = _build(MultiheadAttention.default_config().set(num_heads=NUM_HEADS, causal=True))
    repeated = jax.tree.map(lambda w: w, params)
    for name in ("k_proj", "v_proj"):
        repeated["i_proj"][name] = jax.tree.map(
            lambda w: jnp.repeat(w, NUM_HEADS // NUM_KV_HEADS, axis=-2), params["i_proj"][name]
        )
    np.testing.assert_allclose(
        jit_method(grouped)(params, query=_X).data,
        jit_method(full)(repeated, query=_X).data,
        rtol=1e-5,
        atol=1e-6,
    )


def test_keys_and_values_are_not_repeated_in_memory():
    layer, params = _build(_grouped_config())
    source_len = 5
    source = normal(3, source_len, DIM, seed=5)

    def forward(params, x, y):
        return functional(layer, None, params, {"query": x, "key": y, "value": y}, is_training=False)[0].data

    avals = [v.aval for eqn in equations(jax.make_jaxpr(forward)(params, _X, source)) for v in eqn.outvars]
    per_head_dim = DIM // NUM_HEADS
    key_sizes = {a.size for a in avals if {source_len, per_head_dim} <= set(a.shape) and _SEQ not in a.shape}
    assert key_sizes == {3 * source_len * NUM_KV_HEADS * per_head_dim}


def test_outputs_do_not_depend_on_the_future():
    outputs = _LLAMA_FORWARD(_LLAMA_PARAMS, query=_X).data
    for t in (0, 3, _SEQ - 1):
        changed = _X.at[:, t + 1 :].set(1000.0)
        np.testing.assert_array_equal(
            _LLAMA_FORWARD(_LLAMA_PARAMS, query=changed).data[:, : t + 1], outputs[:, : t + 1]
        )
    assert (
        jnp.abs(_LLAMA_FORWARD(_LLAMA_PARAMS, query=_X.at[:, 0].set(3.0)).data - outputs)[:, -1].max() > 1e-3
    )


def test_rows_do_not_influence_each_other():
    order = jnp.array([2, 0, 1])
    outputs = _LLAMA_FORWARD(_LLAMA_PARAMS, query=_X).data
    np.testing.assert_allclose(
        _LLAMA_FORWARD(_LLAMA_PARAMS, query=_X[order]).data, outputs[order], rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("lengths", [(3, 4), (1, 5, 1), (2, 2)])
def test_packed_documents_equal_separate_ones(lengths):
    """Documents packed into one row, positions restarting, the rest of the row padding."""
    segment_ids, positions = np.zeros([1, _SEQ], np.int32), np.zeros([1, _SEQ], np.int32)
    starts = np.cumsum((0, *lengths))
    for i, length in enumerate(lengths):
        segment_ids[0, starts[i] : starts[i + 1]] = i + 1
        positions[0, starts[i] : starts[i + 1]] = np.arange(length)
    packed = _LLAMA_FORWARD(
        _LLAMA_PARAMS,
        query=_X[:1],
        segment_ids=jnp.asarray(segment_ids),
        query_positions=jnp.asarray(positions),
    ).data
    assert jnp.isfinite(packed).all()
    for i in range(len(lengths)):
        # The document alone at the start of a row; what follows it is in its future.
        alone = jnp.roll(_X[:1], -int(starts[i]), axis=1)
        separate = _LLAMA_FORWARD(_LLAMA_PARAMS, query=alone).data[:, : lengths[i]]
        np.testing.assert_allclose(packed[:, starts[i] : starts[i + 1]], separate, rtol=1e-5, atol=1e-5)


def test_explicit_positions_equal_counted_ones_and_shifts_do_not_matter():
    outputs = _LLAMA_FORWARD(_LLAMA_PARAMS, query=_X).data
    positions = jnp.arange(_SEQ)[None]
    np.testing.assert_array_equal(
        _LLAMA_FORWARD(_LLAMA_PARAMS, query=_X, query_positions=positions).data, outputs
    )
    shifted = _LLAMA_FORWARD(_LLAMA_PARAMS, query=_X, query_positions=positions + 5).data
    np.testing.assert_allclose(shifted, outputs, atol=1e-4)


def test_the_cap_bounds_logits():
    layer, params = _build(_grouped_config(atten_logit_cap=0.5))
    inputs = {"query": 100 * _X, "return_aux": {"probs"}}
    probs = functional(layer, None, params, inputs, is_training=False)[0].probs
    # Logits lie within plus and minus 0.5: no probability is more than e times another.
    largest_ratio = (probs.max(-1) / probs.min(-1)).max()
    assert 2 < largest_ratio <= np.e * 1.0001


def test_aux_outputs_come_when_asked_for():
    output, _ = functional(
        _LLAMA, None, _LLAMA_PARAMS, {"query": _X, "return_aux": {"probs", "kv_state"}}, is_training=False
    )
    assert output.probs.shape == (3, NUM_HEADS, _SEQ, _SEQ)
    np.testing.assert_allclose(output.probs.sum(-1), 1, rtol=1e-5)
    np.testing.assert_array_equal(np.triu(output.probs, 1), 0)
    assert output.kv_state.k_proj.shape == (3, _SEQ, NUM_KV_HEADS, DIM // NUM_HEADS)
    output = _LLAMA_FORWARD(_LLAMA_PARAMS, query=_X)
    assert output.probs is None
    assert output.kv_state is None


def test_bfloat16_has_float32_logits_and_softmax():
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), _LLAMA_PARAMS)
    x = _X.astype(jnp.bfloat16)

    @jax.jit
    def forward(params, x):
        return functional(_LLAMA, None, params, {"query": x}, is_training=False)[0].data

    eqns = equations(jax.make_jaxpr(forward)(params, x))
    num_scores = 3 * NUM_HEADS * _SEQ * _SEQ
    outputs = {
        name: [e.outvars[0].aval for e in eqns if e.primitive.name == name] for name in ("dot_general", "exp")
    }
    for name, avals in outputs.items():
        assert [a.dtype for a in avals if a.size == num_scores] == [jnp.float32], name
    assert forward(params, x).dtype == jnp.bfloat16
    exact = _LLAMA_FORWARD(jax.tree.map(lambda w: w.astype(jnp.float32), params), query=x.astype(jnp.float32))
    np.testing.assert_allclose(forward(params, x).astype(jnp.float32), exact.data, atol=0.05)


def test_dropout_of_probabilities_acts_in_training_only():
    cfg = _grouped_config()
    cfg.dropout.rate = 0.5
    layer, params = _build(cfg)

    @jax.jit
    def train(key):
        return functional(layer, key, params, {"query": _X}, is_training=True)[0].data

    assert jnp.abs(train(jax.random.PRNGKey(0)) - train(jax.random.PRNGKey(1))).max() > 1e-3
    plain, _ = _build(_grouped_config())
    np.testing.assert_array_equal(
        jit_method(layer)(params, query=_X).data, jit_method(plain)(params, query=_X).data
    )


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (
            _grouped_config(causal=True, mask=CausalAttentionBias.default_config()),
            "attention: causal=True and a mask",
        ),
        (MultiheadAttention.default_config().set(num_heads=3), r"(?s)hidden_dim=16.*multiple of num_heads=3"),
        (
            MultiheadAttention.default_config().set(
                num_heads=4, input_linear=GroupedQKVLinear.default_config().set(num_kv_heads=2)
            ),
            r"(?s)num_kv_heads=2.*num_heads=4.*GroupedQueryAttention",
        ),
        (
            GroupedQueryAttention.default_config().set(
                num_heads=4, input_linear=GroupedQKVLinear.default_config().set(num_kv_heads=3)
            ),
            r"(?s)num_kv_heads=3.*divisor of num_heads=4",
        ),
    ],
)
def test_impossible_configs_are_refused(cfg, message):
    with pytest.raises(ValueError, match=message):
        _build(cfg)


def test_segments_with_cross_attention_are_refused():
    layer, params = _build(_grouped_config())
    with pytest.raises(ValueError, match="segment_ids together with key or value"):
        jit_method(layer)(params, query=_X, key=_X, segment_ids=jnp.zeros([3, _SEQ], jnp.int32))


def _reference_with_weights(params, weights_fn, x=_X):
    """Like `_reference` over the whole of x, with any function from logits and head to weights."""
    q, k, v = (_project(x, params["i_proj"][name]) for name in ("q_proj", "k_proj", "v_proj"))
    group = NUM_HEADS // k.shape[2]
    context = np.zeros(q.shape)
    for j in range(NUM_HEADS):
        logits = q[:, :, j] @ k[:, :, j // group].swapaxes(1, 2) * q.shape[-1] ** -0.5
        context[:, :, j] = weights_fn(logits, j) @ v[:, :, j // group]
    o_proj = params["o_proj"]
    return np.einsum("btnh,dnh->btd", context, o_proj["weight"]) + np.asarray(o_proj["bias"])


@pytest.mark.parametrize("grouped", [False, True])
def test_a_sink_takes_probability_away(grouped):
    full = MultiheadAttention.default_config().set(num_heads=NUM_HEADS)
    cfg = _grouped_config() if grouped else full
    layer, params = _build(cfg, causal=True, logit_sink=True)
    sink = np.asarray(params["sink"])
    assert sink.shape == (NUM_HEADS,)

    def weights(logits, j):
        exps = np.where(np.tril(np.ones([_SEQ, _SEQ])), np.exp(logits), 0)
        return exps / (np.exp(sink[j]) + exps.sum(-1, keepdims=True))

    outputs = jit_method(layer)(params, query=_X).data
    np.testing.assert_allclose(outputs, _reference_with_weights(params, weights), rtol=1e-4, atol=1e-5)


def test_a_sink_starts_at_0_learns_and_is_split_like_query_heads():
    cfg = _grouped_config(logit_sink=True)
    layer, _ = _build(cfg)
    assert tuple(layer.create_parameter_specs_recursively()["sink"].mesh_axes) == ("model",)
    params = jax.jit(layer.initialize_parameters_recursively)(jax.random.PRNGKey(0))
    np.testing.assert_array_equal(params["sink"], np.zeros(NUM_HEADS))
    plain, _ = _build(_grouped_config())
    assert "sink" not in plain.create_parameter_specs_recursively()
    # d p / d sink = -p * p_sink, and what a sum of all probabilities loses is what the sink gets.
    logits = jnp.asarray([[[[1.0, 2.0]]]])
    grad = jax.grad(lambda sink: attention_probs(logits, ZeroAttentionBias(), sink=sink).sum())(jnp.zeros(1))
    exps = np.exp([1.0, 2.0]).sum()
    np.testing.assert_allclose(grad, -exps / (1 + exps) ** 2, rtol=1e-5)


@pytest.mark.parametrize("sink", [-300.0, 300.0])
def test_a_sink_is_safe_at_any_size_and_takes_all_where_everything_is_masked(sink):
    logits, sink = jnp.full([1, 1, 2, 3], 200.0), jnp.full([1], sink)
    masked = TensorAttentionBias.from_tensor(jnp.asarray([[0.0, 0, 0], [-1e15] * 3]))
    probs = attention_probs(logits, masked, sink=sink)
    np.testing.assert_allclose(probs[0, 0, 0], 1 / 3 if sink < 0 else 0, rtol=1e-6)
    np.testing.assert_array_equal(probs[0, 0, 1], 0)


def test_alibi_equals_numpy():
    layer, params = _build(_grouped_config(causal=True, logit_bias=config_for_function(alibi_attention_bias)))
    distance = np.arange(_SEQ)[:, None] - np.arange(_SEQ)

    def weights(logits, j):
        slope = 2.0 ** (-2 * (j + 1))  # 8 / num_heads = 2.
        exps = np.where(distance >= 0, np.exp(logits - slope * distance), 0)
        return exps / exps.sum(-1, keepdims=True)

    outputs = jit_method(layer)(params, query=_X).data
    np.testing.assert_allclose(outputs, _reference_with_weights(params, weights), rtol=1e-4, atol=1e-5)


def test_sigmoid_attention_equals_numpy():
    cfg = SigmoidAttention.default_config().set(num_heads=NUM_HEADS, causal=True, seq_len=5)
    layer, params = _build(cfg)

    def weights(logits, j):
        return np.tril(1 / (1 + np.exp(np.log(5) - logits)))

    outputs = jit_method(layer)(params, query=_X).data
    np.testing.assert_allclose(outputs, _reference_with_weights(params, weights), rtol=1e-4, atol=1e-5)


def test_logit_bias_layers_return_what_they_configure():
    segments = np.array([[1, 1, 1, 2, 2], [1, 1, 0, 0, 0]])
    distance = np.arange(5)[:, None] - np.arange(5)
    within = (segments[:, None, :, None] == segments[:, None, None, :]) & np.ones([1, 2, 1, 1], bool)
    slopes = np.array([1 / 16, 1 / 256])[:, None, None]
    heads = {"num_heads": 2}
    for cfg, allowed, bias in [
        (CausalAttentionLogitBiasLayer.default_config(), distance >= 0, 0),
        (FullAttentionLogitBiasLayer.default_config(), True, 0),
        (ALiBiAttentionLogitBiasLayer.default_config().set(**heads), distance >= 0, -slopes * distance),
        (SymmetricALiBiAttentionLogitBiasLayer.default_config().set(**heads), True, -slopes * abs(distance)),
    ]:
        layer = cfg.set(name="attention_mask").instantiate(parent=None)
        value = functional(layer, None, {}, {"segment_ids": jnp.asarray(segments)}, is_training=False)[
            0
        ].value()
        visible = within & allowed
        expected = np.where(visible, bias, -np.inf)
        np.testing.assert_allclose(np.where(visible, value, -np.inf), expected, rtol=1e-6)
        assert (np.where(visible, -np.inf, value) < -1e14).all()


def _with_ring(length: int, **kwargs):
    ring = SlidingWindowKVCache.default_config().set(cached_kv_length=length)
    return _grouped_config(kv_cache=ring, **kwargs)


_ALIBI = config_for_function(alibi_attention_bias)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (_grouped_config(atten_logit_cap=0.0), "atten_logit_cap=0.0.*None for no cap"),
        (_with_ring(3, causal=True), "keeps 3 past positions, and no sliding window"),
        (
            _with_ring(3, mask=SlidingWindowAttentionBias.default_config(sliding_window_size=4)),
            "keeps 3 past positions, and sliding_window_size=4",
        ),
        (_grouped_config(logit_bias=_ALIBI.clone(num_heads=3)), r"logit_bias.num_heads=3.*num_heads=4"),
        (
            SigmoidAttention.default_config().set(num_heads=NUM_HEADS, seq_len=4, logit_sink=True),
            r"logit_sink=True.*need no sink",
        ),
        (SigmoidAttention.default_config().set(num_heads=NUM_HEADS, seq_len=0), "seq_len=0"),
    ],
)
def test_configs_that_cannot_be_meant_are_refused(cfg, message):
    with pytest.raises(ValueError, match=f"(?s)attention: .*{message}"):
        _build(cfg)


def _extend(cfg, **inputs):
    layer, params = _build(cfg)
    states = layer.init_states(batch_size=3, max_len=_SEQ)
    inputs = {"cached_states": states, "query": _X, **inputs}
    return functional(layer, None, params, inputs, method="extend_step", is_training=False)


def test_a_mask_that_forbids_nothing_is_refused():
    layer, params = _build(_grouped_config(mask=_ALIBI.clone(num_heads=NUM_HEADS)))
    with pytest.raises(ValueError, match=r"(?s)attention: mask makes a ALiBiAttentionBias.*logit_bias"):
        jit_method(layer)(params, query=_X)


def test_a_prefix_that_everybody_sees_is_what_has_been_decoded_of_it():
    """The prefix of 4 comes whole in the first row, and in part in the others: their last tokens are junk."""
    mask = MaskFnAttentionBias.default_config(mask=or_masks(causal_mask, truncated_key_mask(4)))
    layer, params = _build(_grouped_config(mask=mask))
    states = layer.init_states(batch_size=3, max_len=_SEQ)
    extend = jit_method(layer, method="extend_step")
    lens = np.array([4, 3, 1])
    states, output = extend(
        params, cached_states=states, query=_X[:, :4], live_step_len=jnp.asarray(lens, jnp.int32)
    )
    for row, num in enumerate(lens):
        x = _X[row : row + 1, :num]
        expected = _reference(params, x, x, np.ones([1, num, num], bool))
        np.testing.assert_allclose(output.data[row : row + 1, :num], expected, rtol=1e-4, atol=1e-5)
    # From the prefix on, steps equal the whole sequence.
    _, output = extend(params, cached_states=states, query=_X[:, 4:])
    whole = jit_method(layer)(params, query=_X).data
    np.testing.assert_allclose(output.data[0], whole[0, 4:], rtol=1e-4, atol=1e-5)


def test_steps_that_would_see_the_future_or_misplace_a_bias_are_refused():
    window = LeftRightWindowAttentionBias.default_config(left_size=2, right_size=1)
    with pytest.raises(ValueError, match="incremental decoding with a window of right_size=1"):
        _extend(_grouped_config(mask=window))
    ring = enable_sliding_window_attention(_grouped_config(), 2)
    with pytest.raises(
        ValueError, match=r"(?s)attention_logit_biases with a SlidingWindowKVCache.*logit_bias"
    ):
        _extend(ring, attention_logit_biases=jnp.zeros([_SEQ, _SEQ]))
