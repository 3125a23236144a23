"""Products in float8 against flax's (the same formulas), against float32, and at the edges of the range."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import fp8_ops

from axlearn.common.quantized_dot_general import Contraction, Fp8Meta, Fp8Metas, fp8_dot
from axlearn.common.quantized_dot_general._fp8 import current_scale, quantize, updated_meta

_HISTORY_LENGTH = 4


def _meta(*history: float, scale: float = 1.0) -> Fp8Meta:
    padded = (*history, *(0.0,) * (_HISTORY_LENGTH - len(history)))
    return Fp8Meta(scale=jnp.array([scale], jnp.float32), amax_history=jnp.array(padded, jnp.float32))


def _operands(activation_shape, kernel_shape, output_shape, dtype=jnp.float32):
    keys = jax.random.split(jax.random.PRNGKey(0), 3)
    scales = (1.0, 0.1, 1e-4)
    return [
        scale * jax.random.normal(key, shape, dtype)
        for key, shape, scale in zip(
            keys, (activation_shape, kernel_shape, output_shape), scales, strict=True
        )
    ]


def _vjp(fn, activation, kernel, metas, grad):
    output, vjp = jax.vjp(fn, activation, kernel, metas)
    return output, *vjp(grad)


def _flax(subscripts):
    """flax's product. It rounds what flows back along with everything else."""

    def fn(activation, kernel, metas):
        def dot(*args, **kwargs):
            return fp8_ops.fp8_scaled_dot_general(
                *args,
                **kwargs,
                lhs_scale=metas.input.scale,
                rhs_scale=metas.kernel.scale,
                grad_scale=metas.output_grad.scale,
                lhs_amax_history=metas.input.amax_history,
                rhs_amax_history=metas.kernel.amax_history,
                grad_amax_history=metas.output_grad.amax_history,
            )

        return jnp.einsum(
            subscripts, activation, kernel, preferred_element_type=jnp.float32, _dot_general=dot
        )

    return fn


@pytest.mark.parametrize(
    ("subscripts", "shapes"),
    [
        ("btd,dnh->btnh", ((2, 7, 16), (16, 3, 4), (2, 7, 3, 4))),
        ("btnh,dnh->btd", ((2, 7, 3, 4), (16, 3, 4), (2, 7, 16))),
        ("btd,do->bto", ((2, 7, 16), (16, 5), (2, 7, 5))),
    ],
)
def test_output_gradients_and_new_values_are_those_of_flax(subscripts, shapes):
    activation, kernel, grad = _operands(*shapes)
    # The largest value of each is about twice what was seen before: some are cut off.
    metas = Fp8Metas(input=_meta(1.2, 1.5), kernel=_meta(0.1), output_grad=_meta(1e-4, 2e-4, 1e-4))
    contraction = Contraction.from_einsum(subscripts, activation_rank=activation.ndim)

    def ours(x, w, m):
        return fp8_dot(x, w, m, contraction=contraction)

    found = jax.tree.leaves(_vjp(ours, activation, kernel, metas, grad))
    expected = jax.tree.leaves(_vjp(_flax(subscripts), activation, kernel, metas, grad))
    for x, y in zip(found, expected, strict=True):
        # The scale of the last step is used once and divided twice: rounding of float32.
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6 * float(jnp.abs(y).max()))


def _relative_error(x, y) -> float:
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return float(np.linalg.norm(x - y) / np.linalg.norm(y))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_error_against_float32_is_that_of_the_mantissas(dtype):
    """Errors relative to the norm of the whole, as `docs/quantization.md` states them.

    Between 1 and 2, where numbers are 1.5 on average, m bits of mantissa make steps of 2**-m, and rounding an error of
    2**-m / sqrt(12): 0.025 of the number for e4m3 (m = 3), 0.05 for e5m2. Those of two operands add up as squares:
    0.035 forward and 0.055 backward.
    """
    activation, kernel, grad = _operands((64, 128), (128, 96), (64, 96), dtype)
    amax = [float(jnp.abs(x).max()) for x in (activation, kernel, grad)]
    metas = Fp8Metas(*(_meta(x) for x in amax))
    contraction = Contraction.from_einsum("...i,io->...o", activation_rank=2)
    found = _vjp(lambda *args: fp8_dot(*args, contraction=contraction), activation, kernel, metas, grad)
    assert [x.dtype for x in found[:3]] == [dtype] * 3
    wide = [x.astype(jnp.float32) for x in (activation, kernel, grad)]
    expected, vjp = jax.vjp(jnp.matmul, *wide[:2])
    errors = [_relative_error(x, y) for x, y in zip(found[:3], (expected, *vjp(wide[2])), strict=True)]
    assert 0.02 < errors[0] < 0.045
    assert all(0.03 < error < 0.07 for error in errors[1:])


def test_the_product_runs_on_float8_operands_and_keeps_them_for_the_backward_pass():
    activation, kernel, grad = _operands((4, 8), (8, 6), (4, 6))
    contraction = Contraction.from_einsum("...i,io->...o", activation_rank=2)

    def step(x, w, metas, g):
        return _vjp(lambda *args: fp8_dot(*args, contraction=contraction), x, w, metas, g)

    text = jax.jit(step).lower(activation, kernel, Fp8Metas(_meta(), _meta(), _meta()), grad).as_text()
    dots = [line for line in text.splitlines() if "dot_general" in line]
    assert len(dots) == 3
    assert all("f8E4M3FN" in line for line in dots)
    assert sum("f8E5M2" in line for line in dots) == 2


def test_the_scale_follows_the_largest_value_for_as_many_steps_as_are_remembered():
    meta, scales = _meta(), []
    for amax in (8.0, 2.0, 1.0, 3.0, 0.5, 0.5, 0.5, 0.5):
        scale = current_scale(meta, jnp.float8_e4m3fn)
        scales.append(float(scale) * 448)
        meta = updated_meta(meta, x=jnp.array([-amax, 0.1]), scale=scale)
    # At first the scale that is there; then what was seen in the four steps before.
    np.testing.assert_allclose(scales, [448, 8, 8, 8, 8, 3, 3, 3], rtol=1e-6)
    np.testing.assert_array_equal(meta.scale, [np.float32(3 / 448)])


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_is_not_remembered(bad):
    meta = updated_meta(_meta(1.0, 2.0), x=jnp.array([bad, 7.0]), scale=jnp.float32(0.5))
    np.testing.assert_array_equal(meta.amax_history, [0, 0, 0, 1])
    # flax remembers it, and keeps its scale for as long as it does.
    theirs = fp8_ops.compute_amax_history(jnp.array([bad, 7.0]), _meta(1.0, 2.0).amax_history)
    assert not np.isfinite(theirs).all()


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
def test_what_is_too_large_is_cut_off_and_what_is_undefined_stays_so(dtype):
    largest = float(jnp.finfo(dtype).max)
    values = jnp.array([2 * largest, -jnp.inf, jnp.nan, 3.0])
    found = quantize(values, scale=jnp.float32(1.0), dtype=dtype).astype(jnp.float32)
    np.testing.assert_array_equal(found, [largest, -largest, np.nan, 3.0])


@pytest.mark.parametrize("amax", [0.0, 1e-44, 1e-38])
def test_nothing_and_almost_nothing_have_a_scale_to_divide_by(amax):
    metas = Fp8Metas(_meta(amax), _meta(1.0), _meta(amax))
    contraction = Contraction.from_einsum("...i,io->...o", activation_rank=2)
    x, w, g = jnp.full((2, 3), amax), jnp.ones((3, 2)), jnp.full((2, 2), amax)
    for leaf in jax.tree.leaves(_vjp(lambda *args: fp8_dot(*args, contraction=contraction), x, w, metas, g)):
        assert np.isfinite(leaf).all()


def test_a_step_without_the_product_does_not_spoil_the_next_ones():
    # What the product's "gradient" is where it has no part in the loss, behind a branch that is not taken, say.
    dead = Fp8Meta(scale=jnp.zeros([1]), amax_history=jnp.zeros([_HISTORY_LENGTH]))
    contraction = Contraction.from_einsum("...i,io->...o", activation_rank=2)
    x, w, g = jnp.zeros((2, 3)), jnp.full((3, 2), 4.0), jnp.full((2, 2), 2.0)
    output, x_grad, w_grad, new = _vjp(
        lambda *args: fp8_dot(*args, contraction=contraction), x, w, Fp8Metas(dead, dead, dead), g
    )
    for found, expected in ((output, 0), (x_grad, 16), (w_grad, 0)):
        np.testing.assert_array_equal(found, np.full(found.shape, expected))
    assert float(new.kernel.amax_history[0]) == 4
    assert float(new.kernel.scale[0]) == 1


def test_products_in_float16_do_not_overflow_before_they_are_scaled():
    x, w, g = jnp.full((2, 64), 3.0), jnp.full((64, 2), 3.0), jnp.full((2, 2), 1.0)
    contraction = Contraction.from_einsum("...i,io->...o", activation_rank=2)
    metas = Fp8Metas(_meta(3.0), _meta(3.0), _meta(1.0))
    found = _vjp(
        lambda *args: fp8_dot(*args, contraction=contraction),
        *(jnp.float16(x) for x in (x, w)),
        metas,
        jnp.float16(g),
    )
    for value, expected in zip(found[:3], (64 * 9, 2 * 3, 2 * 3), strict=True):
        assert value.dtype == jnp.float16
        np.testing.assert_allclose(value, np.full(value.shape, expected), rtol=1e-3)


def test_parts_of_one_tensor_share_a_scale():
    stacked = Fp8Meta(scale=jnp.ones((3, 1)), amax_history=jnp.array([[1.0, 0], [2.0, 0], [4.0, 5.0]]))
    assert float(current_scale(stacked, jnp.float8_e4m3fn)) == np.float32(5 / 448)
    new = updated_meta(stacked, x=jnp.array([6.0]), scale=jnp.float32(5 / 448))
    np.testing.assert_array_equal(new.amax_history, [[6, 1], [6, 2], [6, 4]])
    np.testing.assert_array_equal(new.scale, np.full((3, 1), np.float32(5 / 448)))
