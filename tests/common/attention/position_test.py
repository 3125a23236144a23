"""Tests of axlearn.common.attention: embeddings of positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axlearn.common.attention import (
    LearnedPositionalEmbedding,
    RoFormerSinusoidalPositionalEmbedding,
    SinusoidalPositionalEmbedding,
    apply_rotary_position_embeddings,
    rotate_pairs,
)
from axlearn.common.module import functional
from tests.common.attention.layer_configs import normal, numpy_rope, random_params


def _rope(dim: int = 8, theta: float = 100.0) -> RoFormerSinusoidalPositionalEmbedding:
    cfg = RoFormerSinusoidalPositionalEmbedding.default_config().set(name="rope", dim=dim, theta=theta)
    return cfg.instantiate(parent=None)


_ROPE = _rope()


@jax.jit
def _rotate(x, positions):
    sinusoidal_pos, _ = functional(_ROPE, None, {}, (positions,), is_training=False)
    return rotate_pairs(x, sinusoidal_pos)


_X = normal(2, 5, 3, 8)
_POSITIONS = jnp.array([[0, 1, 2, 3, 4], [7, 0, 1, 900, 2]])


def test_rotation_equals_complex_multiplication_of_adjacent_pairs():
    expected = numpy_rope(np.asarray(_X, np.float64), np.asarray(_POSITIONS))
    np.testing.assert_allclose(_rotate(_X, _POSITIONS), expected, atol=5e-4)
    np.testing.assert_allclose(_rotate(_X, _POSITIONS)[:, [0, 1, 2, 4]], expected[:, [0, 1, 2, 4]], atol=5e-6)


def test_position_zero_changes_nothing_and_norms_are_kept():
    rotated = _rotate(_X, _POSITIONS)
    np.testing.assert_array_equal(rotated[0, 0], _X[0, 0])
    np.testing.assert_allclose(jnp.linalg.norm(rotated, axis=-1), jnp.linalg.norm(_X, axis=-1), rtol=1e-5)


def test_products_depend_on_the_distance_only():
    q, k = normal(2, 5, 3, 8, seed=1), normal(2, 5, 3, 8, seed=2)

    def products(shift):
        return np.einsum("btnh,bsnh->bnts", _rotate(q, _POSITIONS + shift), _rotate(k, _POSITIONS + shift))

    np.testing.assert_allclose(products(0), products(13), atol=1e-3)
    assert np.abs(products(0) - np.einsum("btnh,bsnh->bnts", q, _rotate(k, _POSITIONS))).max() > 0.1


def test_bfloat16_is_rotated_in_float32():
    x = _X.astype(jnp.bfloat16)
    rotated = _rotate(x, _POSITIONS)
    assert rotated.dtype == jnp.bfloat16
    exact = _rotate(x.astype(jnp.float32), _POSITIONS)
    np.testing.assert_array_equal(rotated, exact.astype(jnp.bfloat16))


def test_keys_and_values_are_rotated_as_told():
    sinusoidal_pos = jnp.broadcast_to(jnp.repeat(jnp.array([0.6, 0.8]), 4), [2, 5, 8])
    rotated = np.asarray(rotate_pairs(_X, sinusoidal_pos))
    for rotary_key, rotary_value in ((True, False), (False, True)):
        q, k, v = apply_rotary_position_embeddings(
            query=_X,
            key=_X,
            value=_X,
            sinusoidal_pos=sinusoidal_pos,
            rotary_key=rotary_key,
            rotary_value=rotary_value,
        )
        np.testing.assert_array_equal(q, rotated)
        np.testing.assert_array_equal(k, rotated if rotary_key else _X)
        np.testing.assert_array_equal(v, rotated if rotary_value else _X)


def test_an_odd_size_is_refused():
    with pytest.raises(ValueError, match="rope: dim=7"):
        functional(_rope(dim=7), None, {}, (_POSITIONS,), is_training=False)


def _embed(layer, params, positions):
    return jax.jit(lambda p, x: functional(layer, None, p, (x,), is_training=False)[0])(params, positions)


def test_learned_positions_are_looked_up_and_nothing_lies_beyond_them():
    cfg = LearnedPositionalEmbedding.default_config().set(name="pos", dim=4, shape=[6])
    layer = cfg.instantiate(parent=None)
    params = random_params(layer)
    table = np.asarray(params["weight"])
    assert table.shape == (6, 4)
    vectors = _embed(layer, params, jnp.array([[0, 5, 3], [6, -1, 2]]))
    np.testing.assert_array_equal(vectors[0], table[[0, 5, 3]])
    assert np.isnan(vectors[1, :2]).all()
    np.testing.assert_array_equal(vectors[1, 2], table[2])


def test_learned_positions_of_a_picture_are_counted_row_by_row():
    cfg = LearnedPositionalEmbedding.default_config().set(name="pos", dim=4, shape=[2, 3])
    layer = cfg.instantiate(parent=None)
    params = random_params(layer)
    assert layer.num_positions == 6
    assert layer.create_parameter_specs_recursively()["weight"].fans()["fan_out"] == 4
    vectors = _embed(layer, params, jnp.arange(6)[None])
    np.testing.assert_array_equal(vectors[0].reshape(2, 3, 4), params["weight"])


def test_sinusoidal_positions_equal_the_formula_of_the_paper():
    cfg = SinusoidalPositionalEmbedding.default_config().set(name="pos", dim=6)
    positions = np.array([[0, 1, 2], [10, 500, 3]])
    expected = np.zeros([2, 3, 6])
    for i in range(3):
        expected[..., 2 * i] = np.sin(positions / 10000 ** (2 * i / 6))
        expected[..., 2 * i + 1] = np.cos(positions / 10000 ** (2 * i / 6))
    vectors = _embed(cfg.instantiate(parent=None), {}, jnp.asarray(positions))
    np.testing.assert_allclose(vectors, expected, atol=1e-4)
    with pytest.raises(ValueError, match="pos: dim=7"):
        _embed(cfg.set(dim=7).instantiate(parent=None), {}, jnp.asarray(positions))
