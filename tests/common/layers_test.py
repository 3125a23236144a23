"""Tests of axlearn.common.layers."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axlearn.common.attention import NormPosition, StackedTransformerLayer, TransformerLayer
from axlearn.common.base_layer import BaseLayer
from axlearn.common.layers import (
    Dropout,
    Embedding,
    LayerNorm,
    Linear,
    RMSNorm,
    StochasticDepth,
    get_activation_fn,
    set_bias_recursively,
    set_dropout_rate_recursively,
    set_layer_norm_eps_recursively,
    set_norm_recursively,
)
from axlearn.common.module import functional


def _run(layer: BaseLayer, params, *args, method="forward", is_training=False, seed=0):
    @jax.jit
    def run(key, params, args):
        return functional(layer, key, params, args, method=method, is_training=is_training)[0]

    return run(jax.random.PRNGKey(seed), params, args)


def _normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _gelu(x: float) -> float:
    return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))


@pytest.mark.parametrize(
    ("name", "fn"),
    [
        ("linear", lambda x: x),
        ("quick_gelu", lambda x: x / (1 + math.exp(-1.702 * x))),
        ("exact_gelu", _gelu),
        ("squared_relu", lambda x: max(x, 0) ** 2),
        ("nn.silu", lambda x: x / (1 + math.exp(-x))),
        ("jnp.tanh", math.tanh),
    ],
)
def test_activations_equal_their_formulas(name, fn):
    x = np.linspace(-3, 3, 7, dtype=np.float32)
    np.testing.assert_allclose(
        get_activation_fn(name)(jnp.asarray(x)), [fn(v) for v in x], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("name", "nearest"), [("nn.silou", "nn.silu"), ("linaer", "linear"), ("os.system", "")]
)
def test_an_unknown_activation_is_answered_with_the_nearest(name, nearest):
    with pytest.raises(
        ValueError, match=f"(?s)unknown activation '{re.escape(name)}'.*{re.escape(nearest)}"
    ) as e:
        get_activation_fn(name)
    assert "squared_relu" in str(e.value)


def test_linear_multiplies_and_adds():
    layer = Linear.default_config().set(name="linear", input_dim=3, output_dim=5).instantiate(parent=None)
    x, weight, bias = _normal(2, 4, 3), _normal(3, 5, seed=1), _normal(5, seed=2)
    y = _run(layer, {"weight": weight, "bias": bias}, x)
    np.testing.assert_allclose(y, x @ weight + bias, rtol=1e-5)
    specs = layer.create_parameter_specs_recursively()
    assert {name: spec.shape for name, spec in specs.items()} == {"weight": (3, 5), "bias": (5,)}


def test_linear_without_bias_has_one_parameter_and_splits_it_as_told():
    cfg = Linear.default_config().set(
        name="linear", input_dim=4, output_dim=8, bias=False, param_partition_spec=("data", "model")
    )
    specs = cfg.instantiate(parent=None).create_parameter_specs_recursively()
    assert list(specs) == ["weight"]
    assert tuple(specs["weight"].mesh_axes) == ("data", "model")
    specs = cfg.set(bias=True).instantiate(parent=None).create_parameter_specs_recursively()
    assert tuple(specs["bias"].mesh_axes) == ("model",)


@pytest.mark.parametrize("eps", [1e-8, 1e-2])
def test_rms_norm_equals_its_formula(eps):
    layer = RMSNorm.default_config().set(name="norm", input_dim=6, eps=eps).instantiate(parent=None)
    # Small inputs tell eps inside of the root from eps outside.
    x, scale = 0.05 * _normal(2, 3, 6), _normal(6, seed=1)
    expected = x / np.sqrt(np.mean(x.astype(np.float64) ** 2, -1, keepdims=True) + eps) * scale
    np.testing.assert_allclose(_run(layer, {"scale": scale}, x), expected, rtol=1e-5, atol=1e-6)


def test_layer_norm_equals_its_formula():
    layer = LayerNorm.default_config().set(name="norm", input_dim=6, eps=1e-3).instantiate(parent=None)
    x, scale, bias = _normal(2, 3, 6) + 5, _normal(6, seed=1), _normal(6, seed=2)
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-3) * scale + bias
    y = _run(layer, {"scale": scale, "bias": bias}, x)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cls", [RMSNorm, LayerNorm])
def test_norms_keep_the_dtype_and_compute_in_forward_dtype(cls):
    layer = cls.default_config().set(name="norm", input_dim=256).instantiate(parent=None)
    params = jax.tree.map(
        lambda spec: np.ones(spec.shape, np.float32), layer.create_parameter_specs_recursively()
    )
    params["scale"] *= 1.1
    x = jnp.asarray(_normal(2, 256), jnp.bfloat16)
    y = _run(layer, params, x)
    assert y.dtype == jnp.bfloat16
    exact = _run(layer, params, x.astype(jnp.float32))
    # One rounding at the end, and none before.
    np.testing.assert_array_equal(np.asarray(y), np.asarray(exact.astype(jnp.bfloat16)))


def test_embedding_looks_up_and_attends_by_the_same_table():
    layer = Embedding.default_config().set(name="emb", num_embeddings=7, dim=3).instantiate(parent=None)
    weight, ids = _normal(7, 3), np.array([[0, 6], [3, 3]])
    np.testing.assert_array_equal(_run(layer, {"weight": weight}, ids), weight[ids])
    x = _normal(2, 5, 3, seed=1)
    # Also with a partition spec that names no dim, or not all.
    for spec in (None, (), ("data",), ("data", None, "model")):
        found, _ = functional(
            layer,
            None,
            {"weight": jnp.asarray(weight)},
            {"x": jnp.asarray(x), "logits_partition_spec": spec},
            method="attend",
            is_training=False,
        )
        np.testing.assert_allclose(found, x @ weight.T, rtol=1e-5, atol=1e-6)


def test_embedding_of_an_id_outside_the_table_is_nan():
    layer = Embedding.default_config().set(name="emb", num_embeddings=7, dim=3).instantiate(parent=None)
    vectors = _run(layer, {"weight": _normal(7, 3)}, np.array([0, 6, 7, 1000, -1, -7]))
    assert np.isfinite(vectors[:2]).all()
    assert np.isnan(vectors[2:]).all()


def test_embedding_gives_its_shape_as_a_list():
    layer = Embedding.default_config().set(name="emb", num_embeddings=32, dim=8).instantiate(parent=None)
    spec = layer.create_parameter_specs_recursively()["weight"]
    text = layer.param_init().debug_string(name="weight", shape=spec.shape, axes=spec.fan_axes)
    assert "shape=[32, 8], axes=FanAxes(in_axis=-2, out_axis=-1, batch_axis=())" in text


def test_dropout_drops_and_rescales_in_training_only():
    layer = Dropout.default_config().set(name="dropout", rate=0.25).instantiate(parent=None)
    x = np.ones([100, 100], np.float32)
    np.testing.assert_array_equal(_run(layer, {}, x), x)
    y = np.asarray(_run(layer, {}, x, is_training=True))
    np.testing.assert_allclose(np.unique(y), [0, 1 / 0.75])
    # 10,000 draws: the standard deviation of the share is 0.0043.
    assert abs((y == 0).mean() - 0.25) < 0.02
    np.testing.assert_array_equal(y, _run(layer, {}, x, is_training=True))
    assert (y != _run(layer, {}, x, is_training=True, seed=1)).any()


def test_dropout_without_rate_needs_no_key():
    layer = Dropout.default_config().set(name="dropout").instantiate(parent=None)
    x = jnp.ones([2])
    output, _ = functional(layer, None, {}, (x,), is_training=True)
    np.testing.assert_array_equal(output, x)


@pytest.mark.parametrize("cls", [Dropout, StochasticDepth])
@pytest.mark.parametrize("rate", [-0.1, 1.0, 1])
def test_a_rate_outside_of_its_range_is_refused(cls, rate):
    with pytest.raises(ValueError, match=r"drop: rate=.*\n?.*probability in \[0, 1\)"):
        cls.default_config().set(name="drop", rate=rate).instantiate(parent=None)


def test_stochastic_depth_drops_whole_rows():
    cfg = StochasticDepth.default_config().set(name="depth", rate=0.5)
    x = np.ones([64, 3, 2], np.float32)
    y = np.asarray(_run(cfg.instantiate(parent=None), {}, x, is_training=True))
    rows = y.reshape(64, -1)
    assert (rows == rows[:, :1]).all()
    assert set(np.unique(rows)) == {0.0, 2.0}
    y = np.asarray(_run(cfg.set(mode="batch").instantiate(parent=None), {}, x, is_training=True))
    assert len(np.unique(y)) == 1
    np.testing.assert_array_equal(_run(cfg.instantiate(parent=None), {}, x), x)


def test_stochastic_depth_refuses_an_unknown_mode():
    with pytest.raises(ValueError, match="mode='column'"):
        StochasticDepth.default_config().set(name="depth", mode="column").instantiate(parent=None)


def test_setters_reach_every_layer_of_a_tree_and_nothing_else():
    cfg = StackedTransformerLayer.default_config().set(num_layers=2)
    cfg.layer = [TransformerLayer.default_config() for _ in range(2)]
    before = str(cfg).splitlines()
    set_dropout_rate_recursively(cfg, 0.1)
    set_layer_norm_eps_recursively(cfg, 1e-3)
    set_bias_recursively(cfg, False)
    after = set(str(cfg).splitlines())
    kept = [line for line in before if not re.search(r"\.(eps|bias): ", line)]
    assert after.issuperset(kept)
    added = sorted(re.sub(r"\[\d\]", "[i]", line) for line in after.difference(kept))
    assert {re.search(r"\w+: .*", line).group() for line in added} == {
        "rate: 0.1",
        "eps: 0.001",
        "bias: False",
    }
    # Two layers of: three dropouts, two norms, four projections.
    assert len(added) == 2 * (3 + 2 + 4)


def test_dropout_rates_that_are_set_can_be_kept():
    cfg = TransformerLayer.default_config()
    cfg.feed_forward.dropout.rate = 0.3
    set_dropout_rate_recursively(cfg, 0.1, set_only_if_none=True)
    assert cfg.feed_forward.dropout.rate == 0.3
    assert cfg.self_attention.dropout.rate == 0.1
    set_dropout_rate_recursively(cfg, None)
    assert cfg.feed_forward.dropout.rate is None


def test_norms_are_replaced_by_copies():
    cfg = TransformerLayer.default_config()
    cfg.feed_forward.norm.input_dim = 8
    norm = RMSNorm.default_config().set(eps=1e-5, forward_dtype=None)
    set_norm_recursively(cfg, norm)
    assert cfg.feed_forward.norm == norm.clone(input_dim=8)
    assert cfg.self_attention.norm == norm
    norm.eps = 1
    assert cfg.self_attention.norm.eps == 1e-5


def test_norms_in_a_dictionary_are_replaced_too():
    cfg = TransformerLayer.default_config()
    cfg.feed_forward.set(structure="v2", norm={NormPosition.RES_NORM: LayerNorm.default_config()})
    set_norm_recursively(cfg, RMSNorm.default_config())
    assert cfg.feed_forward.norm == {NormPosition.RES_NORM: RMSNorm.default_config()}
    set_layer_norm_eps_recursively(cfg, 1e-3)
    assert cfg.feed_forward.norm[NormPosition.RES_NORM].eps == 1e-3
