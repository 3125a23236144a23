"""Tests of axlearn.common.attention: rotary embeddings for longer sequences than in training."""

import json
import math
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from axlearn.common.attention import (
    LinearScaledSinusoidalPositionalEmbedding,
    Llama3SinusoidalPositionalEmbedding,
    RoFormerSinusoidalPositionalEmbedding,
    YaRNSinusoidalPositionalEmbedding,
)
from axlearn.common.module import functional

_REFERENCE = json.loads(
    (pathlib.Path(__file__).parents[2] / "fixtures" / "rope_reference.json").read_text(encoding="utf-8")
)
_POSITIONS = np.array(_REFERENCE["positions"])


def _layer_for(head_dim: int, parameters: dict):
    """Our layer for a config of transformers."""
    fields = {
        "factor": "scaling_factor",
        "original_max_position_embeddings": "original_max_seq_length",
        "rope_theta": "theta",
    }
    classes = {
        "default": RoFormerSinusoidalPositionalEmbedding,
        "linear": LinearScaledSinusoidalPositionalEmbedding,
        "llama3": Llama3SinusoidalPositionalEmbedding,
        "yarn": YaRNSinusoidalPositionalEmbedding,
    }
    kwargs = {fields.get(name, name): value for name, value in parameters.items()}
    cfg = classes[kwargs.pop("rope_type")].default_config().set(name="rope", dim=head_dim)
    if "attention_factor" in kwargs:
        # Theirs is the whole factor; ours comes on top of the one that follows from the scaling.
        whole = kwargs.pop("attention_factor")
        cfg.set(attn_factor=whole / (0.1 * math.log(kwargs["scaling_factor"]) + 1))
    return cfg.set(**kwargs).instantiate(parent=None)


def _sinusoids(layer, positions=_POSITIONS):
    return functional(layer, None, {}, (jnp.asarray(positions)[None],), is_training=False)[0][0]


@pytest.mark.parametrize("name", _REFERENCE["cases"])
def test_sines_and_cosines_equal_those_of_transformers(name):
    case = _REFERENCE["cases"][name]
    layer = _layer_for(case["head_dim"], case["rope_parameters"])
    np.testing.assert_allclose(layer._frequencies(), case["inv_freq"], rtol=5e-7)
    sin, cos = np.split(np.asarray(_sinusoids(layer)), 2, axis=-1)
    # Theirs are powers in float32: each position adds a rounding error of the frequency to the angle.
    bounds = 1e-6 + 3e-7 * _POSITIONS[:, None]
    assert (np.abs(sin - case["sin"]) < bounds).all()
    assert (np.abs(cos - case["cos"]) < bounds).all()


@pytest.mark.parametrize(
    "cfg",
    [
        LinearScaledSinusoidalPositionalEmbedding.default_config(),
        Llama3SinusoidalPositionalEmbedding.default_config(),
        YaRNSinusoidalPositionalEmbedding.default_config().set(original_max_seq_length=64),
    ],
)
def test_a_factor_of_one_changes_nothing(cfg):
    layer = cfg.set(name="rope", dim=8, scaling_factor=1.0).instantiate(parent=None)
    plain = RoFormerSinusoidalPositionalEmbedding.default_config().set(name="rope", dim=8)
    np.testing.assert_allclose(_sinusoids(layer), _sinusoids(plain.instantiate(parent=None)), rtol=1e-6)


def test_linear_scaling_divides_positions():
    cfg = LinearScaledSinusoidalPositionalEmbedding.default_config()
    layer = cfg.set(name="rope", dim=8, scaling_factor=4.0).instantiate(parent=None)
    plain = RoFormerSinusoidalPositionalEmbedding.default_config().set(name="rope", dim=8)
    expected = _sinusoids(plain.instantiate(parent=None), np.arange(5))
    np.testing.assert_allclose(_sinusoids(layer, 4 * np.arange(5)), expected, rtol=1e-6)


def test_llama3_keeps_the_fast_and_divides_the_slow():
    layer = Llama3SinusoidalPositionalEmbedding.default_config().set(name="rope", dim=64, theta=5e5)
    frequencies = layer.instantiate(parent=None)._frequencies()
    plain = 5e5 ** (-np.arange(0, 64, 2) / 64)
    ratio = plain / frequencies
    turns = 8192 * plain / (2 * np.pi)
    np.testing.assert_allclose(ratio[turns >= 4], 1, rtol=1e-12)
    np.testing.assert_allclose(ratio[turns <= 1], 8, rtol=1e-12)
    assert (np.diff(ratio) >= -1e-12).all()
    assert ((ratio > 1.01) & (ratio < 7.99)).any()


def test_yarn_without_extrapolation_divides_everything():
    cfg = YaRNSinusoidalPositionalEmbedding.default_config().set(
        name="rope", dim=16, original_max_seq_length=64, scaling_factor=4.0, extrapolation_factor=0.0
    )
    expected = 1e4 ** (-np.arange(0, 16, 2) / 16) / 4
    np.testing.assert_allclose(cfg.instantiate(parent=None)._frequencies(), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (
            LinearScaledSinusoidalPositionalEmbedding.default_config().set(scaling_factor=0.0),
            "rope: scaling_factor=0.0",
        ),
        (
            Llama3SinusoidalPositionalEmbedding.default_config().set(low_freq_factor=4.0),
            "rope: low_freq_factor=4.0, high_freq_factor=4.0.*low_freq_factor < high_freq_factor",
        ),
        (
            YaRNSinusoidalPositionalEmbedding.default_config().set(original_max_seq_length=0),
            "rope: original_max_seq_length=0",
        ),
        (
            YaRNSinusoidalPositionalEmbedding.default_config().set(original_max_seq_length=8, beta_slow=64.0),
            "rope: beta_slow=64.0, beta_fast=32.0.*beta_slow <= beta_fast",
        ),
        (
            YaRNSinusoidalPositionalEmbedding.default_config().set(original_max_seq_length=8, dim=7),
            "rope: dim=7",
        ),
    ],
)
def test_impossible_scalings_are_refused(cfg, message):
    if not isinstance(cfg.dim, int):
        cfg.dim = 8
    with pytest.raises(ValueError, match=f"(?s){message}"):
        _sinusoids(cfg.set(name="rope").instantiate(parent=None))
