"""Tests of axlearn.common.attention: transformer layers and stacks of them, over whole sequences."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axlearn.common.attention import StackedTransformerLayer
from axlearn.common.attention_bias import CausalAttentionBias, alibi_attention_bias
from axlearn.common.config import REQUIRED, RequiredFieldMissingError, config_for_function
from axlearn.common.module import functional
from axlearn.common.utils import VDict, flatten_items
from tests.common.attention.layer_configs import (
    DIM,
    SOURCE_DIM,
    cross_attention_layer_config,
    jit_method,
    llama_layer_config,
    llama_stack_config,
    normal,
    numpy_attention,
    numpy_attention_branch,
    numpy_feed_forward_branch,
    numpy_llama_layer,
    numpy_rms_norm,
    parallel_layer_config,
    random_params,
)

_SEQ, _LAYERS = 7, 3
_X = normal(2, _SEQ, DIM)
_STACK = llama_stack_config(_LAYERS).instantiate(parent=None)
_PARAMS = random_params(_STACK)
_NUM_TRACES = 0


@jax.jit
def _call(params, inputs):
    global _NUM_TRACES
    _NUM_TRACES += 1
    return functional(_STACK, None, params, inputs, is_training=False)[0].data


def _forward(params, **inputs):
    return _call(params, inputs)


def _layer_params(i: int):
    return jax.tree.map(lambda w: w[i], _PARAMS["repeat"]["layer"])


def _unrolled():
    cfg = StackedTransformerLayer.default_config().set(
        name="stack", input_dim=DIM, num_layers=_LAYERS, layer=llama_layer_config()
    )
    return cfg.instantiate(parent=None), {f"layer{i}": _layer_params(i) for i in range(_LAYERS)}


def test_repeated_layers_equal_numpy():
    segment_ids = np.array([[1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 1, 0, 0]])
    positions = np.array([[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 0, 0]])
    mask = np.tril(np.ones([_SEQ, _SEQ], bool)) & (segment_ids[:, :, None] == segment_ids[:, None, :])
    expected = np.asarray(_X, np.float64)
    for i in range(_LAYERS):
        expected = numpy_llama_layer(_layer_params(i), expected, mask=mask, positions=positions)
    outputs = _forward(
        _PARAMS, data=_X, segment_ids=jnp.asarray(segment_ids), positions=jnp.asarray(positions)
    )
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-4)


def test_repeated_layers_equal_a_loop_in_outputs_and_gradients():
    unrolled, params = _unrolled()

    def loss(layer, params):
        return jnp.sum(jnp.square(functional(layer, None, params, {"data": _X}, is_training=True)[0].data))

    value, grads = jax.jit(jax.value_and_grad(lambda p: loss(_STACK, p)))(_PARAMS)
    expected, expected_grads = jax.jit(jax.value_and_grad(lambda p: loss(unrolled, p)))(params)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for i in range(_LAYERS):
        mine = jax.tree.map(lambda g, i=i: g[i], grads["repeat"]["layer"])
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3),
            mine,
            expected_grads[f"layer{i}"],
        )


def test_parameters_are_stacked_in_a_vdict_and_replicated_along_layers():
    specs = _STACK.create_parameter_specs_recursively()
    assert isinstance(specs["repeat"], VDict)
    unstacked = dict(
        flatten_items(
            llama_layer_config()
            .set(name="l", input_dim=DIM)
            .instantiate(parent=None)
            .create_parameter_specs_recursively()
        )
    )
    for path, spec in flatten_items(specs):
        single = unstacked[path.removeprefix("repeat/layer/")]
        assert spec.shape == (_LAYERS, *single.shape)
        assert tuple(spec.mesh_axes) == (None, *single.mesh_axes)
        if spec.fan_axes is not None:
            assert spec.fans() == single.fans()
            assert spec.fan_axes.batch_axis == (0,)
        if spec.factorization is not None:
            assert tuple(spec.factorization.axes) == (None, *single.factorization.axes)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_repeated_layers_initialise_from_a_chain_of_splits(impl):
    with jax.default_prng_impl(impl):
        key = jax.random.PRNGKey(0)
        params = jax.jit(_STACK.initialize_parameters_recursively)(key)
        layer = llama_layer_config().set(name="layer", input_dim=DIM).instantiate(parent=None)
        initialize_layer = jax.jit(layer.initialize_parameters_recursively)
        # The stack and its repeat take the key as it is: the first layer's is one split away.
        for i in range(_LAYERS if impl == "threefry2x32" else 1):
            key, layer_key = jax.random.split(key)
            expected = initialize_layer(layer_key)
            for path, value in flatten_items(expected):
                stacked = dict(flatten_items(params["repeat"]["layer"]))[path]
                np.testing.assert_array_equal(stacked[i], value, err_msg=path)


def test_prebuilt_parameters_are_left_out():
    prebuilt = {"repeat": {"layer": {"feed_forward": _PARAMS["repeat"]["layer"]["feed_forward"]}}}
    params = jax.eval_shape(
        lambda key: _STACK.initialize_parameters_recursively(key, prebuilt=prebuilt), jax.random.PRNGKey(0)
    )
    paths = [path for path, _ in flatten_items(params)]
    assert paths
    assert all("self_attention" in path for path in paths)


def test_parameter_noise_keeps_the_structure():
    noisy = jax.jit(_STACK.apply_parameter_noise_recursively)(jax.random.PRNGKey(0), _PARAMS)
    assert jax.tree.structure(noisy) == jax.tree.structure(_PARAMS)
    jax.tree.map(np.testing.assert_array_equal, noisy, _PARAMS)


def test_layers_of_a_stack_may_differ():
    layers = [llama_layer_config(), llama_layer_config()]
    layers[1].feed_forward.hidden_dim = 5
    cfg = StackedTransformerLayer.default_config().set(
        name="stack", input_dim=DIM, num_layers=2, layer=layers
    )
    layer = cfg.instantiate(parent=None)
    specs = layer.create_parameter_specs_recursively()
    assert specs["layer1"]["feed_forward"]["linear2"]["weight"].shape == (5, DIM)
    assert jit_method(layer)(random_params(layer), data=_X).data.shape == _X.shape
    with pytest.raises(ValueError, match=r"(?s)stack: 2 layer configs.*num_layers=3"):
        cfg.set(num_layers=3).instantiate(parent=None)


def _numpy_params(layer):
    params = random_params(layer)
    return params, jax.tree.map(lambda w: np.asarray(w, np.float64), params)


def test_cross_attention_stands_between_self_attention_and_feed_forward():
    layer = cross_attention_layer_config().set(name="layer", input_dim=DIM).instantiate(parent=None)
    params, p = _numpy_params(layer)
    assert list(layer.children) == ["self_attention", "cross_attention", "feed_forward"]
    source = normal(2, 5, SOURCE_DIM, seed=1)
    is_live = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], bool)
    biases = np.where(is_live, 0, -1e9).astype(np.float32)[:, None, None, :]
    outputs = jit_method(layer)(
        params, data=_X, cross_attention_data=source, cross_attention_logit_biases=jnp.asarray(biases)
    )
    positions, mask = np.arange(_SEQ)[None], np.tril(np.ones([2, _SEQ, _SEQ], bool))
    attention, cross, ffn = p["self_attention"], p["cross_attention"], p["feed_forward"]
    x = np.asarray(_X, np.float64)
    y = numpy_rms_norm(x, attention["norm"]["scale"])
    x = x + numpy_attention_branch(attention["attention"], y, mask=mask, positions=positions)
    y = numpy_rms_norm(x, cross["norm"]["scale"])
    q, k, v = (
        np.einsum("btd,dnh->btnh", z, cross["attention"]["i_proj"][name]["weight"])
        for z, name in ((y, "q_proj"), (np.asarray(source), "k_proj"), (np.asarray(source), "v_proj"))
    )
    context = numpy_attention(q, k, v, np.repeat(is_live[:, None], _SEQ, 1))
    x = x + np.einsum("btnh,dnh->btd", context, cross["attention"]["o_proj"]["weight"])
    x = x + numpy_feed_forward_branch(ffn, numpy_rms_norm(x, ffn["norm"]["scale"]))
    np.testing.assert_allclose(outputs.data, x, rtol=1e-4, atol=1e-4)


def test_cross_attention_and_its_source_come_together_or_not_at_all():
    source = normal(2, 5, SOURCE_DIM, seed=1)
    layer = cross_attention_layer_config().set(name="layer", input_dim=DIM).instantiate(parent=None)
    with pytest.raises(ValueError, match="layer: cross_attention_data missing"):
        jit_method(layer)(random_params(layer), data=_X)
    for cfg in (llama_layer_config(), parallel_layer_config()):
        layer = cfg.set(name="layer", input_dim=DIM).instantiate(parent=None)
        with pytest.raises(ValueError, match="layer: cross_attention_data given"):
            jit_method(layer)(random_params(layer), data=_X, cross_attention_data=source)
    cfg = cross_attention_layer_config().set(name="layer", input_dim=DIM)
    cfg.cross_attention.source_dim = REQUIRED
    with pytest.raises(RequiredFieldMissingError, match="source_dim"):
        cfg.instantiate(parent=None)


@pytest.mark.parametrize(
    "field",
    [
        {"causal": True},
        {"mask": CausalAttentionBias.default_config()},
        {"logit_bias": config_for_function(alibi_attention_bias)},
    ],
)
def test_cross_attention_that_compares_indices_does_not_decode(field):
    """A step knows the source from its beginning, and would take its own first token for the first of all."""
    cfg = cross_attention_layer_config().set(name="layer", input_dim=DIM)
    cfg.cross_attention.attention.set(**field)
    with pytest.raises(
        ValueError, match=r"(?s)layer\.cross_attention\.attention: incremental decoding.*biases"
    ):
        cfg.instantiate(parent=None).init_states(batch_size=2, max_len=_SEQ)


def test_parallel_blocks_see_the_same_normalised_inputs():
    layer = parallel_layer_config().set(name="layer", input_dim=DIM).instantiate(parent=None)
    params, p = _numpy_params(layer)
    assert list(layer.children) == ["norm", "self_attention", "feed_forward"]
    positions, mask = np.arange(_SEQ)[None], np.tril(np.ones([2, _SEQ, _SEQ], bool))
    x = np.asarray(_X, np.float64)
    y = numpy_rms_norm(x, p["norm"]["scale"])
    attended = numpy_attention_branch(p["self_attention"]["attention"], y, mask=mask, positions=positions)
    expected = x + attended + numpy_feed_forward_branch(p["feed_forward"], y)
    np.testing.assert_allclose(jit_method(layer)(params, data=_X).data, expected, rtol=1e-4, atol=1e-4)
    cfg = parallel_layer_config().set(name="layer", input_dim=DIM)
    cfg.feed_forward.structure = "prenorm"
    with pytest.raises(ValueError, match=r"(?s)layer: feed_forward\.structure='prenorm'.*'nonorm'"):
        cfg.instantiate(parent=None)


def test_later_layers_are_skipped_more_often():
    cfg = StackedTransformerLayer.default_config().set(
        name="stack", input_dim=DIM, num_layers=4, layer=llama_layer_config(), peak_stochastic_depth_rate=0.4
    )
    stack = cfg.instantiate(parent=None)
    rates = [
        [layer.children[block].stochastic_depth.config.rate for block in ("self_attention", "feed_forward")]
        for layer in stack.children.values()
    ]
    np.testing.assert_allclose(rates, np.repeat([[0.1], [0.2], [0.3], [0.4]], 2, axis=1))
    assert cfg.layer.feed_forward.stochastic_depth.rate is None
    cfg.layer.feed_forward.stochastic_depth.rate = 0.1
    with pytest.raises(ValueError, match=r"(?s)stack: peak_stochastic_depth_rate=0\.4 and stochastic_depth"):
        cfg.instantiate(parent=None)
    with pytest.raises(ValueError, match=r"(?s)stack: peak_stochastic_depth_rate=1\.0.*\[0, 1\)"):
        cfg.clone(peak_stochastic_depth_rate=1.0).instantiate(parent=None)
    with pytest.raises(ValueError, match=r"(?s)stack: peak_stochastic_depth_rate=0\.4.*Stacked"):
        llama_stack_config().set(peak_stochastic_depth_rate=0.4).instantiate(parent=None)


def test_dropout_is_off_in_evaluation_and_drawn_from_the_key_in_training():
    cfg = llama_stack_config(_LAYERS)
    cfg.layer.self_attention.dropout.rate = 0.5
    cfg.layer.feed_forward.dropout.rate = 0.5
    layer = cfg.instantiate(parent=None)
    np.testing.assert_array_equal(jit_method(layer)(_PARAMS, data=_X).data, _forward(_PARAMS, data=_X))

    @jax.jit
    def train(key):
        return functional(layer, key, _PARAMS, {"data": _X}, is_training=True)[0].data

    outputs = [train(jax.random.PRNGKey(seed)) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert jnp.abs(outputs[0] - outputs[2]).max() > 1e-3


def test_a_second_call_does_not_trace_again():
    _forward(_PARAMS, data=_X)
    num_traces = _NUM_TRACES
    _forward(jax.tree.map(lambda w: w + 1, _PARAMS), data=2 * _X)
    assert num_traces == _NUM_TRACES


def test_defaults_print_as_in_the_reference_dumps(shared_dir):
    """A mesh rule of the reference holds a stack of layers with nothing but defaults."""
    ours = str(StackedTransformerLayer.default_config()).splitlines()
    # The sum of those lines, which ties them to the reference where its text is not at hand.
    assert hashlib.sha256("\n".join(ours).encode()).hexdigest() == (
        "5c2105f4f20932d35feac6cf235227837b2d24d226457c3121bf977a71e8b353"
    )
    if shared_dir is None:
        return
    dump = shared_dir / "golden" / "axlearn.experiments.text.gpt.c4_trainer" / "fuji-7B-v2-flash.txt"
    marker = ".modification."
    lines = [line.split(marker, 1)[1] for line in dump.read_text().splitlines() if marker in line]
    # What the recipe gives to its stack is not part of it.
    expected = [line for line in lines if line.startswith(("klass", "layer."))]
    assert len(expected) == 43
    assert expected == ours
