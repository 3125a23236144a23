"""Products in int8 against the exact ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axlearn.common.quantized_dot_general import Contraction, int8_dot

_CONTRACTION = Contraction.from_einsum("btnh,dnh->btd", activation_rank=4)


def test_small_integers_are_multiplied_exactly():
    rng = np.random.default_rng(0)
    activation, kernel = (rng.integers(-127, 128, size=shape) for shape in ((2, 3, 4, 5), (6, 4, 5)))
    # The largest value of each vector is 127, so that its scale is 1.
    activation[..., 0, 0], kernel[..., 0, 0] = 127, -127
    found = int8_dot(jnp.float32(activation), jnp.float32(kernel), contraction=_CONTRACTION)
    np.testing.assert_array_equal(found, np.einsum("btnh,dnh->btd", activation, kernel))


def test_the_error_is_below_a_percent_and_rows_do_not_disturb_each_other():
    keys = jax.random.split(jax.random.PRNGKey(0))
    activation = jax.random.normal(keys[0], (2, 16, 8, 16)).at[0, 0].multiply(1e4).at[1, 1].set(0)
    kernel = jax.random.normal(keys[1], (32, 8, 16))
    found = np.asarray(int8_dot(activation, kernel, contraction=_CONTRACTION))
    expected = np.einsum("btnh,dnh->btd", activation, kernel)
    norms = np.linalg.norm(expected, axis=-1)
    errors = np.linalg.norm(found - expected, axis=-1) / np.where(norms > 0, norms, 1)
    # A value is off by 1 / sqrt(12) of a step, of which the largest of 128 normal numbers (2.7) has 127: 0.0061 of the
    # standard deviation, twice.
    assert errors.max() < 0.015
    assert np.sqrt(np.mean(errors**2)) < 0.01
    assert not found[1, 1].any()


def test_the_gradient_is_that_of_the_exact_product():
    keys = jax.random.split(jax.random.PRNGKey(1), 3)
    activation, kernel, grad = (
        jax.random.normal(key, shape)
        for key, shape in zip(keys, ((2, 3, 4, 5), (6, 4, 5), (2, 3, 6)), strict=True)
    )
    _, vjp = jax.vjp(lambda x, w: int8_dot(x, w, contraction=_CONTRACTION), activation, kernel)
    _, expected = jax.vjp(lambda x, w: jnp.einsum("btnh,dnh->btd", x, w), activation, kernel)
    for x, y in zip(vjp(grad), expected(grad), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_so_in_its_row_alone(bad):
    activation = jnp.ones((1, 2, 1, 3)).at[0, 0, 0, 1].set(bad)
    found = np.asarray(int8_dot(activation, jnp.ones((4, 1, 3)), contraction=_CONTRACTION))
    assert not np.isfinite(found[0, 0]).any()
    np.testing.assert_allclose(found[0, 1], 3, rtol=1e-6)
