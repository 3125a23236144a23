"""Tests of axlearn.common.attention: rotary position embeddings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axlearn.common.attention import RoFormerSinusoidalPositionalEmbedding, rotate_pairs
from axlearn.common.module import functional
from tests.common.attention.layer_configs import normal, numpy_rope


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


def test_an_odd_size_is_refused():
    with pytest.raises(ValueError, match="rope: dim=7"):
        functional(_rope(dim=7), None, {}, (_POSITIONS,), is_training=False)
