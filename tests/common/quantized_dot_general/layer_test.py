"""The dense layers with few bits: what they hold, what they compute, and that without they are as they were."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axlearn.common.attention import (
    FusedGroupedQKVLinear,
    FusedQKVLinear,
    GroupedQKVLinear,
    MultiheadInputLinear,
    MultiheadOutputLinear,
    QKVLinear,
)
from axlearn.common.config import config_for_function
from axlearn.common.layers import Embedding, Linear, for_each_config
from axlearn.common.module import functional
from axlearn.common.quantized_dot_general import (
    DenseGeneralBaseLayer,
    DotGeneralQuantizationType,
    QuantizedDotGeneral,
    get_all_fp8_param_names,
    int8_dot,
    tanh_clipping,
    uses_fp8,
)
from axlearn.common.quantized_dot_general._contraction import Contraction
from axlearn.common.repeat import Repeat
from axlearn.common.utils import flatten_items

_FP_8 = QuantizedDotGeneral.default_config().set(
    quantization_type=DotGeneralQuantizationType.FP_8, fp8_amax_history_length=4
)
_INT_8 = QuantizedDotGeneral.default_config().set(quantization_type=DotGeneralQuantizationType.INT_8)
_QKV = {"query_dim": 16, "key_dim": 16, "value_dim": 16, "num_heads": 4, "per_head_dim": 4}
_LAYERS = {
    "linear": (Linear.default_config().set(input_dim=16, output_dim=6), 3),
    "input": (MultiheadInputLinear.default_config().set(model_dim=16, num_heads=4, per_head_dim=4), 3),
    "output": (MultiheadOutputLinear.default_config().set(model_dim=6, num_heads=4, per_head_dim=4), 4),
    "qkv": (QKVLinear.default_config().set(**_QKV), 3),
    "grouped": (GroupedQKVLinear.default_config().set(num_kv_heads=2, **_QKV), 3),
    "fused": (FusedQKVLinear.default_config().set(**_QKV), 3),
    "fused grouped": (FusedGroupedQKVLinear.default_config().set(num_kv_heads=2, **_QKV), 3),
}


def _quantized(cfg, quantized=_FP_8):
    cfg = cfg.clone()

    def quantize(value):
        if isinstance(value, DenseGeneralBaseLayer.Config):
            value.set(quantized_dot_general=quantized)

    for_each_config(cfg, quantize)
    return cfg


def _layer(cfg):
    layer = cfg.clone(name="layer").instantiate(parent=None)
    return layer, layer.initialize_parameters_recursively(jax.random.PRNGKey(0))


def _run(layer, params, inputs, *, is_training=True):
    return functional(layer, jax.random.PRNGKey(1), params, inputs, is_training=is_training)[0]


def _inputs(rank: int) -> jax.Array:
    shape = {3: (2, 5, 16), 4: (2, 5, 4, 4)}[rank]
    return jax.random.normal(jax.random.PRNGKey(2), shape)


def _relative_error(x, y) -> float:
    return float(np.linalg.norm(np.asarray(x) - np.asarray(y)) / np.linalg.norm(np.asarray(y)))


def test_the_names_of_parameters_are_those_that_flax_uses():
    assert get_all_fp8_param_names() == [
        "input_scale",
        "kernel_scale",
        "output_grad_scale",
        "input_amax_history",
        "kernel_amax_history",
        "output_grad_amax_history",
    ]


@pytest.mark.parametrize("name", _LAYERS)
def test_every_dense_layer_gets_parameters_beside_its_own_and_computes_nearly_the_same(name):
    cfg, rank = _LAYERS[name]
    plain, params = _layer(cfg)
    quantized, more_params = _layer(_quantized(cfg))
    for path, value in flatten_items(params):
        np.testing.assert_array_equal(dict(flatten_items(more_params))[path], value)
    extra = {path: x for path, x in flatten_items(more_params) if path not in dict(flatten_items(params))}
    kernels = [path for path, _ in flatten_items(params) if path.endswith("weight")]
    assert len(extra) == 6 * len(kernels)
    stacked = (3,) if name == "fused" else ()
    for path, value in extra.items():
        parent, _, field = path.rpartition("/")
        assert field in get_all_fp8_param_names(), path
        assert parent.endswith("quantized_dot_general"), path
        assert value.shape == (*stacked, 1 if field.endswith("_scale") else 4), path
        assert value.dtype == jnp.float32
    inputs = _inputs(rank)
    step = jax.jit(jax.value_and_grad(_loss, has_aux=True), static_argnames="layer")
    (_, expected), expected_gradient = step(params, inputs, layer=plain)
    # After one step the scales fit.
    _, new_values = step(more_params, inputs, layer=quantized)
    fitting = dict(flatten_items(more_params)) | {
        path: x for path, x in flatten_items(new_values) if path in extra
    }
    more_params = jax.tree.unflatten(jax.tree.structure(more_params), fitting.values())
    (_, found), gradient = step(more_params, inputs, layer=quantized)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert _relative_error(x, y) < 0.06
    for path, value in flatten_items(expected_gradient):
        assert _relative_error(dict(flatten_items(gradient))[path], value) < 0.1, path


def _loss(params, inputs, *, layer):
    outputs = _run(layer, params, (inputs,))
    return sum(jnp.mean(jnp.square(x)) for x in jax.tree.leaves(outputs)), outputs


def test_fused_projections_of_several_sources_have_scales_of_their_own():
    cfg, _ = _LAYERS["fused"]
    layer, params = _layer(_quantized(cfg))
    query, key = _inputs(3), 10 * _inputs(3)

    def loss(params):
        outputs = _run(layer, params, {"query": query, "key": key, "value": query})
        return sum(jnp.sum(x) for x in outputs)

    history = jax.grad(loss)(params)["qkv_proj"]["quantized_dot_general"]["input_amax_history"]
    amax = float(jnp.abs(query).max())
    np.testing.assert_allclose(history[:, 0], [amax, 10 * amax, amax], rtol=1e-6)
    plain, _ = _layer(cfg)
    expected = _run(
        plain,
        {"qkv_proj": {"weight": params["qkv_proj"]["weight"], "bias": params["qkv_proj"]["bias"]}},
        {"query": query, "key": key, "value": query},
    )
    found = _run(layer, params, {"query": query, "key": key, "value": query})
    assert all(_relative_error(x, y) < 0.06 for x, y in zip(found, expected, strict=True))


def test_new_values_of_repeated_layers_are_stacked_and_each_its_own():
    linear = Linear.default_config().set(input_dim=16, output_dim=16, quantized_dot_general=_FP_8)
    layer, params = _layer(Repeat.default_config().set(layer=linear, num_layers=3))
    inputs = _inputs(3)

    def loss(params):
        return jnp.sum(jnp.square(_run(layer, params, (inputs,))))

    new = jax.grad(loss)(params)["layer"]["quantized_dot_general"]
    assert new["input_scale"].shape == (3, 1)
    assert new["kernel_amax_history"].shape == (3, 4)
    np.testing.assert_allclose(
        new["kernel_amax_history"][:, 0], jnp.abs(params["layer"]["weight"]).max(axis=(1, 2)), rtol=1e-6
    )
    assert len(set(np.asarray(new["input_amax_history"][:, 0]))) == 3


def test_evaluation_multiplies_as_training_does():
    layer, params = _layer(_quantized(_LAYERS["linear"][0]))
    inputs = (_inputs(3),)
    np.testing.assert_array_equal(
        _run(layer, params, inputs, is_training=False), _run(layer, params, inputs, is_training=True)
    )


def test_int8_has_no_parameters_and_is_the_product_of_the_module():
    layer, params = _layer(_quantized(_LAYERS["linear"][0], _INT_8))
    assert params["quantized_dot_general"] == {}
    contraction = Contraction.from_einsum("...i,io->...o", activation_rank=3)
    expected = int8_dot(_inputs(3), params["weight"], contraction=contraction) + params["bias"][None, None]
    np.testing.assert_array_equal(_run(layer, params, (_inputs(3),)), expected)


def test_clipping_bounds_activations_before_they_are_rounded():
    clipping = config_for_function(tanh_clipping).set(bound=2.0)
    layer, params = _layer(_quantized(_LAYERS["linear"][0], _INT_8.clone(clipping_choice=clipping)))
    plain, _ = _layer(_quantized(_LAYERS["linear"][0], _INT_8))
    inputs = 10 * _inputs(3)
    np.testing.assert_array_equal(
        _run(layer, params, (inputs,)), _run(plain, params, (2 * jnp.tanh(inputs / 2),))
    )


def test_without_it_configs_print_and_layers_hold_what_they_did():
    cfg = _LAYERS["linear"][0]
    assert "quantized" not in str(cfg)
    assert "quantized_dot_general" not in _layer(cfg)[1]
    assert not issubclass(Embedding, DenseGeneralBaseLayer)


def test_uses_fp8_looks_everywhere():
    cfg = Repeat.default_config().set(layer=_LAYERS["qkv"][0], num_layers=2)
    assert not uses_fp8(cfg)
    assert not uses_fp8(_quantized(cfg, _INT_8))
    assert uses_fp8(_quantized(cfg))


def test_a_history_of_no_steps_is_refused():
    cfg = Linear.default_config().set(input_dim=2, output_dim=2)
    cfg.quantized_dot_general = _FP_8.clone(fp8_amax_history_length=0)
    with pytest.raises(ValueError, match="fp8_amax_history_length: 0 steps to remember"):
        _layer(cfg)


def test_a_history_is_refused_where_nothing_is_remembered():
    cfg = Linear.default_config().set(input_dim=2, output_dim=2)
    cfg.quantized_dot_general = _FP_8.clone(quantization_type=DotGeneralQuantizationType.INT_8)
    with pytest.raises(ValueError, match="fp8_amax_history_length: 4 steps to remember in INT_8"):
        _layer(cfg)
