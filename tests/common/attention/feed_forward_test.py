"""Tests of axlearn.common.attention: TransformerFeedForwardLayer, and where norms go."""

import jax
import numpy as np
import pytest

from axlearn.common.attention import TransformerFeedForwardLayer
from axlearn.common.config import config_for_function
from axlearn.common.layers import RMSNorm
from axlearn.common.utils import flatten_items
from tests.common.attention.layer_configs import jit_method, normal, random_params

_DIM, _HIDDEN = 6, 10
_X = normal(2, 3, _DIM)


def _config(**kwargs) -> TransformerFeedForwardLayer.Config:
    cfg = TransformerFeedForwardLayer.default_config().set(
        name="ffn", input_dim=_DIM, hidden_dim=_HIDDEN, norm=RMSNorm.default_config().set(eps=1e-5)
    )
    return cfg.set(**kwargs)


def _norm(x, params):
    return x / np.sqrt(np.mean(np.square(x), -1, keepdims=True) + 1e-5) * np.asarray(params["scale"])


def _linear(x, params):
    return x @ np.asarray(params["weight"]) + np.asarray(params["bias"])


def _ungated(x, params):
    return _linear(np.maximum(_linear(x, params["linear1"]), 0), params["linear2"])


def _gated(x, params):
    gate = _linear(x, params["linear1_0"])
    hidden = gate / (1 + np.exp(-gate)) * _linear(x, params["linear1_1"])
    return _linear(hidden, params["linear2"])


@pytest.mark.parametrize(
    ("structure", "formula"),
    [
        ("prenorm", lambda x, f, p: x + 0.5 * f(_norm(x, p["norm"]))),
        ("postnorm", lambda x, f, p: _norm(x + 0.5 * f(x), p["norm"])),
        ("hybridnorm", lambda x, f, p: x + 0.5 * _norm(f(_norm(x, p["prenorm"])), p["postnorm"])),
        ("nonorm", lambda x, f, p: f(x)),
    ],
)
def test_structures_equal_their_formulas(structure, formula):
    layer = _config(structure=structure, residual_weight=0.5).instantiate(parent=None)
    params = random_params(layer)
    x = np.asarray(_X)
    expected = formula(x, lambda y: _ungated(y, params), params)
    np.testing.assert_allclose(jit_method(layer)(params, inputs=_X), expected, rtol=1e-4, atol=1e-5)


def test_the_gated_layer_equals_numpy():
    layer = _config(activation=("nn.silu", "linear"), structure="nonorm").instantiate(parent=None)
    params = random_params(layer)
    np.testing.assert_allclose(
        jit_method(layer)(params, inputs=_X), _gated(np.asarray(_X), params), rtol=1e-4, atol=1e-5
    )


def _times(input_dim: int, factor: int) -> int:
    return input_dim * factor


def test_the_hidden_dim_may_be_a_function_of_the_input_dim():
    layer = _config(hidden_dim=config_for_function(_times).set(factor=3)).instantiate(parent=None)
    specs = layer.create_parameter_specs_recursively()
    assert specs["linear1"]["weight"].shape == (_DIM, 3 * _DIM)
    assert specs["linear2"]["weight"].shape == (3 * _DIM, _DIM)


def test_weights_are_split_over_the_axis_model_by_default():
    specs = _config().instantiate(parent=None).create_parameter_specs_recursively()
    assert tuple(specs["linear1"]["weight"].mesh_axes) == (None, "model")
    assert tuple(specs["linear2"]["weight"].mesh_axes) == ("model", None)


def test_parameters_are_initialised_in_order_norms_first():
    cfg = _config(activation=("nn.silu", "linear"))
    cfg.linear1.bias = cfg.linear2.bias = False
    layer = cfg.instantiate(parent=None)
    key = jax.random.PRNGKey(7)
    params = jax.jit(layer.initialize_parameters_recursively)(key)
    keys = {}
    for name in ("norm", "linear1_0", "linear1_1", "linear2"):
        key, keys[name] = jax.random.split(key)
    for name in ("linear1_0", "linear1_1", "linear2"):
        child = jax.jit(getattr(layer, name).initialize_parameters_recursively)(keys[name])
        np.testing.assert_array_equal(params[name]["weight"], child["weight"])


def test_hybridnorm_has_two_norms_in_front_of_everything():
    layer = _config(structure="hybridnorm").instantiate(parent=None)
    assert list(layer.create_parameter_specs_recursively()) == [
        "prenorm",
        "postnorm",
        "linear1",
        "linear2",
        "dropout1",
        "dropout2",
        "stochastic_depth",
    ]
    paths = [path for path, _ in flatten_items(layer.create_parameter_specs_recursively())]
    assert "prenorm/scale" in paths


def test_impossible_configs_are_refused():
    with pytest.raises(
        ValueError, match=r"(?s)ffn: structure='sandwich'.*prenorm, postnorm, hybridnorm, nonorm"
    ):
        _config(structure="sandwich").instantiate(parent=None)
    with pytest.raises(TypeError, match="activation"):
        _config(activation=("nn.silu", "linear", "linear"))
