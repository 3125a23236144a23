"""Tests of axlearn.common.attention: projections to and from heads, and scaling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axlearn.common.attention import (
    FusedGroupedQKVLinear,
    FusedQKVLinear,
    GroupedQKVLinear,
    GroupedQueryAttention,
    MultiheadInputLinear,
    MultiheadOutputLinear,
    PerDimScale,
    QKVLinear,
    RoFormerQKVLinear,
    ScaleKey,
    ScaleQuery,
    constant_scale_fn,
)
from axlearn.common.config import config_for_function
from axlearn.common.layers import RMSNorm, set_bias_recursively
from axlearn.common.utils import VDict, flatten_items
from tests.common.attention.layer_configs import jit_method, normal, numpy_rope, random_params

_DIM, _HEADS, _PER_HEAD = 6, 4, 2
_X, _Y, _Z = normal(2, 3, _DIM), normal(2, 5, _DIM, seed=1), normal(2, 5, _DIM, seed=2)


def _config(cls, **kwargs):
    return cls.default_config().set(
        name="qkv",
        query_dim=_DIM,
        key_dim=_DIM,
        value_dim=_DIM,
        num_heads=_HEADS,
        per_head_dim=_PER_HEAD,
        **kwargs,
    )


def _project(x, params):
    return np.einsum("btd,dnh->btnh", x, params["weight"]) + np.asarray(params.get("bias", 0))


def test_linear_maps_equal_einsums_and_know_their_fans():
    shape = {"model_dim": _DIM, "num_heads": _HEADS, "per_head_dim": _PER_HEAD}
    layer = MultiheadInputLinear.default_config().set(name="input", **shape).instantiate(parent=None)
    params = random_params(layer)
    np.testing.assert_allclose(
        jit_method(layer)(params, inputs=_X), _project(_X, params), rtol=1e-5, atol=1e-6
    )
    spec = layer.create_parameter_specs_recursively()["weight"]
    assert str(spec.fan_axes) == "FanAxes(in_axis=0, out_axis=(1, 2), batch_axis=())"
    assert spec.fans() == {"fan_in": 6, "fan_out": 8, "fan_avg": 7}

    layer = MultiheadOutputLinear.default_config().set(name="output", **shape).instantiate(parent=None)
    params, heads = random_params(layer), normal(2, 3, _HEADS, _PER_HEAD)
    expected = np.einsum("btnh,dnh->btd", heads, params["weight"]) + np.asarray(params["bias"])
    np.testing.assert_allclose(jit_method(layer)(params, inputs=heads), expected, rtol=1e-5, atol=1e-6)
    spec = layer.create_parameter_specs_recursively()["weight"]
    assert str(spec.fan_axes) == "FanAxes(in_axis=(1, 2), out_axis=0, batch_axis=())"
    assert spec.fans() == {"fan_in": 8, "fan_out": 6, "fan_avg": 7}


@pytest.mark.parametrize(("cls", "kwargs"), [(QKVLinear, {}), (GroupedQKVLinear, {"num_kv_heads": 2})])
def test_separate_projections_project_separately(cls, kwargs):
    layer = _config(cls, **kwargs).instantiate(parent=None)
    params = random_params(layer)
    outputs = jit_method(layer)(params, query=_X, key=_Y, value=_Z)
    for output, x, name in zip(outputs, (_X, _Y, _Z), ("q_proj", "k_proj", "v_proj"), strict=True):
        np.testing.assert_allclose(output, _project(x, params[name]), rtol=1e-5, atol=1e-6)
    assert outputs.key.shape[2] == layer.num_kv_heads == kwargs.get("num_kv_heads", _HEADS)


def test_fused_grouped_heads_are_all_queries_then_all_keys_then_all_values():
    layer = _config(FusedGroupedQKVLinear, num_kv_heads=2).instantiate(parent=None)
    params = random_params(layer)
    assert params["qkv_proj"]["weight"].shape == (_DIM, _HEADS + 4, _PER_HEAD)
    q, k, v = jit_method(layer)(params, query=_X)
    heads = _project(_X, params["qkv_proj"])
    np.testing.assert_allclose(q, heads[:, :, :4], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(k, heads[:, :, 4:6], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(v, heads[:, :, 6:], rtol=1e-5, atol=1e-6)


def test_the_fused_projection_equals_separate_ones_with_its_slices():
    layer = _config(FusedQKVLinear).instantiate(parent=None)
    params = random_params(layer)
    assert isinstance(params["qkv_proj"], VDict)
    assert {path: leaf.shape for path, leaf in flatten_items(params)} == {
        "qkv_proj/bias": (3, _HEADS, _PER_HEAD),
        "qkv_proj/weight": (3, _DIM, _HEADS, _PER_HEAD),
    }
    slices = {
        f"{name}_proj": jax.tree.map(lambda w, i=i: w[i], dict(params["qkv_proj"]))
        for i, name in enumerate("qkv")
    }
    separate = jit_method(_config(QKVLinear).instantiate(parent=None))
    fused = jit_method(layer)
    for sources in ({}, {"key": _Y, "value": _Z}):
        expected = separate(slices, query=_X, **sources)
        for output, reference in zip(fused(params, query=_X, **sources), expected, strict=True):
            np.testing.assert_allclose(output, reference, rtol=1e-5, atol=1e-6)


def test_the_fused_projection_initialises_like_its_unstacked_child():
    layer = _config(FusedQKVLinear).instantiate(parent=None)
    key = jax.random.PRNGKey(3)
    params = jax.jit(layer.initialize_parameters_recursively)(key)
    assert jax.tree.structure(params) == jax.tree.structure(
        jax.tree.map(lambda spec: 0, layer.create_parameter_specs_recursively())
    )
    # split: the child's key; split: the first of three; split: its first parameter, the weight.
    for _ in range(2):
        key = jax.random.split(key)[1]
    child = jax.jit(layer.qkv_proj.initialize_parameters_recursively)(key)
    np.testing.assert_array_equal(params["qkv_proj"]["weight"][0], child["weight"])
    noisy = jax.jit(layer.apply_parameter_noise_recursively)(key, params)
    assert jax.tree.structure(noisy) == jax.tree.structure(params)
    prebuilt = layer.initialize_parameters_recursively(key, prebuilt=params)
    assert jax.tree.leaves(prebuilt) == []


@pytest.mark.parametrize("rotary_value", [False, True])
def test_rotary_projection_rotates_queries_and_keys_and_values_if_told(rotary_value):
    inner = GroupedQKVLinear.default_config().set(num_kv_heads=2)
    layer = _config(RoFormerQKVLinear, rotary_value=rotary_value, input_linear=inner).instantiate(parent=None)
    params = random_params(layer)
    positions = jnp.array([[0, 1, 2], [5, 0, 1]])
    run = jit_method(layer)
    q, k, v = run(params, query=_X, query_positions=positions)
    plain = [_project(_X, params["i_proj"][name]) for name in ("q_proj", "k_proj", "v_proj")]
    np.testing.assert_allclose(q, numpy_rope(plain[0], positions, 1e4), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(k, numpy_rope(plain[1], positions, 1e4), rtol=1e-4, atol=1e-5)
    expected = numpy_rope(plain[2], positions, 1e4) if rotary_value else plain[2]
    np.testing.assert_allclose(v, expected, rtol=1e-4, atol=1e-5)
    counted = run(params, query=_X)
    np.testing.assert_allclose(
        counted.query, numpy_rope(plain[0], np.arange(3)[None], 1e4), rtol=1e-4, atol=1e-5
    )


def _rms(x, params):
    return x / np.sqrt(np.mean(np.square(x), -1, keepdims=True) + 1e-5) * np.asarray(params["norm"]["scale"])


def test_queries_and_keys_are_scaled_before_the_rotation():
    norm = RMSNorm.default_config().set(eps=1e-5)
    cfg = _config(
        RoFormerQKVLinear,
        rotary_value=False,
        input_linear=FusedGroupedQKVLinear.default_config().set(num_kv_heads=2),
        query_scale=ScaleQuery.default_config().set(norm=norm),
        key_scale=ScaleKey.default_config().set(norm=norm),
    )
    layer = cfg.instantiate(parent=None)
    params = random_params(layer)
    # The order of initialisation; projections start as without scales.
    specs = layer.create_parameter_specs_recursively()
    assert list(specs) == ["rope_pos_emb_layer", "i_proj", "scale_query", "scale_key"]
    positions = np.array([[0, 1, 2], [5, 0, 1]])
    q, k, v = jit_method(layer)(params, query=_X, query_positions=jnp.asarray(positions))
    heads = np.split(_project(_X, params["i_proj"]["qkv_proj"]), [4, 6], axis=2)
    expected_q = numpy_rope(_PER_HEAD**-0.5 * _rms(heads[0], params["scale_query"]), positions, 1e4)
    expected_k = numpy_rope(_rms(heads[1], params["scale_key"]), positions, 1e4)
    np.testing.assert_allclose(q, expected_q, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(k, expected_k, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(v, heads[2], rtol=1e-5, atol=1e-6)


def test_a_part_of_each_head_may_be_rotated():
    cfg = _config(RoFormerQKVLinear, rotary_value=True, partial_rope_factor=0.4).set(per_head_dim=10)
    layer = cfg.instantiate(parent=None)
    params = random_params(layer)
    positions = np.array([[0, 1, 2], [5, 0, 1]])
    outputs = jit_method(layer)(params, query=_X, query_positions=jnp.asarray(positions))
    for output, name in zip(outputs, ("q_proj", "k_proj", "v_proj"), strict=True):
        plain = _project(_X, params["i_proj"][name])
        expected = np.concatenate([numpy_rope(plain[..., :4], positions, 1e4), plain[..., 4:]], axis=-1)
        np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-5)
    for factor in (0.0, 1.2, 0.3, 0.45):
        with pytest.raises(ValueError, match=rf"(?s)partial_rope_factor={factor}.*per_head_dim=10"):
            cfg.set(partial_rope_factor=factor).instantiate(parent=None)


@pytest.mark.parametrize(
    ("input_linear", "bias_shapes"),
    [
        (FusedGroupedQKVLinear.default_config().set(num_kv_heads=2), {"qkv_proj": (8, 2)}),
        (FusedQKVLinear.default_config(), {"qkv_proj": (3, 4, 2)}),
        (QKVLinear.default_config(), {"q_proj": (4, 2), "k_proj": (4, 2), "v_proj": (4, 2)}),
        (
            GroupedQKVLinear.default_config().set(num_kv_heads=2),
            {"q_proj": (4, 2), "k_proj": (2, 2), "v_proj": (2, 2)},
        ),
    ],
)
def test_projections_may_have_biases_where_nothing_else_has(input_linear, bias_shapes):
    cfg = GroupedQueryAttention.default_config().set(
        name="attention", query_dim=_DIM, key_dim=_DIM, value_dim=_DIM, num_heads=4, hidden_dim=8, causal=True
    )
    cfg.input_linear = RoFormerQKVLinear.default_config().set(rotary_value=False, input_linear=input_linear)
    set_bias_recursively(cfg, False)
    cfg.input_linear.input_linear.layer.bias = True
    layer = cfg.instantiate(parent=None)
    params = random_params(layer)
    biases = {path: leaf.shape for path, leaf in flatten_items(params) if path.endswith("bias")}
    assert biases == {f"i_proj/i_proj/{name}/bias": shape for name, shape in bias_shapes.items()}
    # Without inputs the values are their biases, averaged over sources that are all alike.
    outputs = jit_method(layer)(params, query=jnp.zeros([1, 3, _DIM])).data
    inner = params["i_proj"]["i_proj"]
    if "v_proj" in inner:
        bias = np.asarray(inner["v_proj"]["bias"])
    else:
        bias = np.asarray(inner["qkv_proj"]["bias"])
        bias = bias[2] if bias.ndim == 3 else bias[6:]
    value = np.repeat(bias, 4 // bias.shape[0], axis=0)
    expected = np.einsum("nh,dnh->d", value, params["o_proj"]["weight"])
    np.testing.assert_allclose(outputs, np.broadcast_to(expected, [1, 3, _DIM]), rtol=1e-4, atol=1e-5)


def test_projections_from_one_source_refuse_others():
    layer = _config(FusedGroupedQKVLinear, num_kv_heads=2).instantiate(parent=None)
    with pytest.raises(ValueError, match=r"(?s)qkv: key or value given.*use QKVLinear"):
        jit_method(layer)(random_params(layer), query=_X, key=_Y)
    for cls, kwargs in ((FusedGroupedQKVLinear, {"num_kv_heads": 2}), (FusedQKVLinear, {})):
        with pytest.raises(ValueError, match=r"query_dim, key_dim, value_dim = \(6, 7, 6\)"):
            _config(cls, **kwargs).set(key_dim=7).instantiate(parent=None)


def test_scales_of_queries_and_keys():
    heads = np.asarray(normal(2, 3, _HEADS, 16))
    query = ScaleQuery.default_config().set(name="scale", per_head_dim=16).instantiate(parent=None)
    np.testing.assert_array_equal(jit_method(query)({}, proj=jnp.asarray(heads)), heads / 4)
    key = ScaleKey.default_config().set(name="scale", per_head_dim=16)
    np.testing.assert_array_equal(
        jit_method(key.instantiate(parent=None))({}, proj=jnp.asarray(heads)), heads
    )
    key.scale_factor = config_for_function(constant_scale_fn).set(value=2)
    key.norm = RMSNorm.default_config().set(eps=1e-5)
    layer = key.instantiate(parent=None)
    params = random_params(layer)
    assert [path for path, _ in flatten_items(params)] == ["norm/scale"]
    normed = heads / np.sqrt(np.mean(heads**2, -1, keepdims=True) + 1e-5)
    expected = 2 * normed * np.asarray(params["norm"]["scale"])
    np.testing.assert_allclose(
        jit_method(layer)(params, proj=jnp.asarray(heads)), expected, rtol=1e-4, atol=1e-5
    )


def test_a_factor_for_each_dim_is_learned_and_starts_at_one():
    cfg = ScaleQuery.default_config().set(name="scale", per_head_dim=16)
    cfg.per_dim_scale = PerDimScale.default_config()
    layer = cfg.instantiate(parent=None)
    heads = np.asarray(normal(2, 3, _HEADS, 16))
    initial = jax.jit(layer.initialize_parameters_recursively)(jax.random.PRNGKey(0))
    assert {path: leaf.shape for path, leaf in flatten_items(initial)} == {"per_dim_scale/param": (16,)}
    np.testing.assert_allclose(jit_method(layer)(initial, proj=heads), heads / 4, rtol=1e-6)
    params = random_params(layer)
    factor = np.log1p(np.exp(np.asarray(params["per_dim_scale"]["param"]))) / np.log(2)
    np.testing.assert_allclose(jit_method(layer)(params, proj=heads), heads / 4 * factor, rtol=1e-5)
