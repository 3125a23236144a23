"""Tests of axlearn.common.attention: projections to and from heads, and scaling."""

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
    RoFormerQKVLinear,
    ScaleKey,
    ScaleQuery,
    constant_scale_fn,
)
from axlearn.common.config import config_for_function
from axlearn.common.layers import RMSNorm
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
