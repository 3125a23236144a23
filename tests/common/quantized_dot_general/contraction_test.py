"""Products by contraction are einsums, and so are their cotangents."""

import re

import jax
import numpy as np
import pytest

from axlearn.common.quantized_dot_general import Contraction

# The subscripts, and the shapes of activations and kernel.
_CASES = [
    ("...i,io->...o", (2, 3, 4), (4, 5)),
    ("...i,io->...o", (4,), (4, 5)),
    ("btd,dnh->btnh", (2, 3, 4), (4, 5, 6)),
    ("btnh,dnh->btd", (2, 3, 5, 6), (4, 5, 6)),
    ("btd,pdnh->btpnh", (2, 3, 4), (7, 4, 5, 6)),
    # Summed dims in another order, and between others.
    ("ahbn,ndh->abd", (2, 6, 3, 5), (5, 4, 6)),
]


@pytest.mark.parametrize(("subscripts", "activation_shape", "kernel_shape"), _CASES)
def test_product_and_cotangents_are_those_of_the_einsum(subscripts, activation_shape, kernel_shape):
    rng = np.random.default_rng(0)
    activation, kernel = (
        rng.normal(size=shape).astype(np.float32) for shape in (activation_shape, kernel_shape)
    )
    expected, vjp = jax.vjp(lambda x, w: jax.numpy.einsum(subscripts, x, w), activation, kernel)
    contraction = Contraction.from_einsum(subscripts, activation_rank=activation.ndim)
    np.testing.assert_allclose(contraction.apply(activation, kernel), expected, rtol=1e-5, atol=1e-5)
    grad = rng.normal(size=expected.shape).astype(np.float32)
    ours = (contraction.activation_cotangent(grad, kernel), contraction.kernel_cotangent(activation, grad))
    for found, wanted in zip(ours, vjp(grad), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("subscripts", ["btd,dnh->bnth", "bnt,bnh->bnth", "btd,nh->bt"])
def test_other_einsums_are_refused(subscripts):
    with pytest.raises(
        ValueError, match=r"(?s)^subscripts: .*Expected a sum over all dims that both operands have"
    ):
        Contraction.from_einsum(subscripts, activation_rank=3)


@pytest.mark.parametrize(
    ("subscripts", "rank", "expected"),
    [("btd,dnh->btnh", 4, "3"), ("btd,dnh->btnh", 2, "3"), ("...bi,io->...bo", 1, "2 or more")],
)
def test_activations_of_another_rank_are_refused(subscripts, rank, expected):
    """As in an einsum: where sizes happen to fit, another dim would be summed over."""
    with pytest.raises(
        ValueError, match=rf"(?s)the activations have {rank} dims.*Expected {re.escape(expected)}\."
    ):
        Contraction.from_einsum(subscripts, activation_rank=rank)
