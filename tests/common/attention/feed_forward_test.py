"""Tests of axlearn.common.attention: TransformerFeedForwardLayer, and where norms go."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axlearn.common.attention import NormPosition, TransformerFeedForwardLayer
from axlearn.common.config import config_for_function, config_from_json, config_to_json
from axlearn.common.layers import RMSNorm
from axlearn.common.module import functional
from axlearn.common.summary import is_summary
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
        (
            "v2",
            lambda x, f, p: _norm(
                x + 0.5 * _norm(f(_norm(x, p["in_norm"])), p["res_norm"]),
                p["out_norm"],
            ),
        ),
    ],
)
def test_structures_equal_their_formulas(structure, formula):
    weight = 1.0 if structure == "nonorm" else 0.5
    layer = _config(structure=structure, residual_weight=weight).instantiate(parent=None)
    params = random_params(layer)
    x = np.asarray(_X)
    expected = formula(x, lambda y: _ungated(y, params), params)
    np.testing.assert_allclose(jit_method(layer)(params, inputs=_X), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("positions", "formula"),
    [
        ((), lambda x, f, p: x + f(x)),
        ((NormPosition.RES_NORM,), lambda x, f, p: x + _norm(f(x), p["res_norm"])),
        (
            (NormPosition.OUT_NORM, NormPosition.IN_NORM),
            lambda x, f, p: _norm(x + f(_norm(x, p["in_norm"])), p["out_norm"]),
        ),
    ],
)
def test_structure_v2_has_the_norms_that_are_given(positions, formula):
    norm = _config().norm
    cfg = _config(structure="v2", norm={position: norm.clone() for position in positions})
    assert config_from_json(config_to_json(cfg)) == cfg
    layer = cfg.instantiate(parent=None)
    params = random_params(layer)
    norms = [name for name in layer.create_parameter_specs_recursively() if name.endswith("norm")]
    assert norms == [p.value for p in NormPosition if p in positions]
    expected = formula(np.asarray(_X), lambda y: _ungated(y, params), params)
    np.testing.assert_allclose(jit_method(layer)(params, inputs=_X), expected, rtol=1e-4, atol=1e-5)


def test_a_residual_gate_starts_where_told_and_multiplies_the_branch():
    layer = _config(residual_gate_init=0.25, residual_weight=0.5).instantiate(parent=None)
    initial = jax.jit(layer.initialize_parameters_recursively)(jax.random.PRNGKey(0))
    assert initial["residual_gate"] == 0.25
    params = random_params(layer)
    x, gate = np.asarray(_X), np.asarray(params["residual_gate"])
    expected = x + 0.5 * gate * _ungated(_norm(x, params["norm"]), params)
    np.testing.assert_allclose(jit_method(layer)(params, inputs=_X), expected, rtol=1e-4, atol=1e-5)


def test_summaries_tell_of_dead_neurons_and_the_size_of_values():
    cfg = _config(
        activation=("nn.silu", "linear"),
        structure="nonorm",
        add_dead_neuron_summary=True,
        add_value_rms_norm_summary=["linear1_0_outputs", "linear2_outputs"],
    )
    layer = cfg.instantiate(parent=None)
    params = random_params(layer)
    # Three units that no token activates, and one that a single token does.
    bias = np.full([_HIDDEN], 50.0)
    bias[:3] = -50
    gate_inputs = np.asarray(_X @ params["linear1_0"]["weight"])
    bias[3] = -np.sort(gate_inputs[..., 3], axis=None)[-2:].mean()
    params["linear1_0"]["bias"] = jnp.asarray(bias, jnp.float32)
    call = jax.jit(functools.partial(functional, layer, None, is_training=True))
    outputs, collection = call(params, (_X,))
    summaries = dict(flatten_items(collection.summaries, is_leaf=is_summary))
    assert set(summaries) == {"dead_neurons", "linear1_0_outputs/rms_norm", "linear2_outputs/rms_norm"}
    np.testing.assert_allclose(summaries["dead_neurons"].value(), 0.3, rtol=1e-6)
    for name, value in (
        ("linear1_0_outputs", _linear(np.asarray(_X), params["linear1_0"])),
        ("linear2_outputs", np.asarray(outputs)),
    ):
        expected = np.sqrt(np.mean(np.square(value)))
        np.testing.assert_allclose(summaries[f"{name}/rms_norm"].value(), expected, rtol=1e-5)


def test_by_default_there_are_no_summaries():
    layer = _config().instantiate(parent=None)
    call = jax.jit(functools.partial(functional, layer, None, is_training=True))
    _, collection = call(random_params(layer), (_X,))
    assert not jax.tree.leaves(collection.summaries)


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
    norms = {NormPosition.IN_NORM: RMSNorm.default_config()}
    with pytest.raises(ValueError, match=r"(?s)structure='prenorm' with a dictionary of norms.*\"v2\""):
        _config(norm=norms).instantiate(parent=None)
    for factor in ("residual_gate_init", "residual_weight"):
        with pytest.raises(ValueError, match=rf"{factor}=0\.5 with structure='nonorm'"):
            _config(structure="nonorm", **{factor: 0.5}).instantiate(parent=None)
    with pytest.raises(ValueError, match=r"(?s)unknown value 'linear1_0_outputs'.*linear1_outputs"):
        _config(add_value_rms_norm_summary=["linear1_0_outputs"]).instantiate(parent=None)
    with pytest.raises(TypeError, match="activation"):
        _config(activation=("nn.silu", "linear", "linear"))
