"""Tests of axlearn.common.flash_attention: every kernel computes what the plain layer does, or refuses.

Kernels are interpreted here. `aot_test.py` compiles them for TPU.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axlearn.common.attention_kernels import TABLE
from axlearn.common.utils import flatten_items
from tests.common.flash_attention.kernel_cases import CASES, build, forward_and_grads, inputs_of

# Sums over 256 keys in blocks of 128 and not at once, exp2 in the place of exp: some 1e-6 in float32. With bfloat16
# the result is rounded to 8 bits, and so are the probabilities before they meet the values, block by block.
_TOLERANCES = {jnp.float32: 2e-5, jnp.bfloat16: 2e-2}

_INTERPRETED = [kernel.name for kernel in TABLE if "cudnn" not in kernel.name]
# Interpreting a kernel takes seconds a case: the kernels that are not the first choice of any platform go through all
# cases with the slow tests, and through packed rows always.
_RARELY_CHOSEN = ("tpu_flash", "gpu_pallas")
_ACCEPTED = [
    pytest.param(
        name,
        kernel,
        marks=[pytest.mark.scale] if kernel in _RARELY_CHOSEN and name != "causal, packed" else [],
    )
    for name, case in CASES.items()
    for kernel in (*case.accepted_by, "xla")
]
_REFUSED = [
    (name, kernel)
    for name, case in CASES.items()
    for kernel in _INTERPRETED
    if kernel not in case.accepted_by
]


@functools.cache
def _expected(name: str):
    """By the plain layer in float32, from what the case rounds to its dtype."""
    case = CASES[name]
    inputs = jax.tree.map(_widen, inputs_of(case))
    return forward_and_grads(build(dataclasses.replace(case, dtype=jnp.float32)), inputs)


def _widen(x):
    return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x


def _assert_close(actual, expected, *, tolerance: float, path: str):
    """Within a tolerance relative to the largest number: rounding errors of sums are as large as their terms."""
    actual, expected = np.asarray(actual, np.float32), np.asarray(expected, np.float32)
    error = np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-3)
    assert error < tolerance, f"{path}: {error}"


@pytest.mark.parametrize(("name", "kernel"), _ACCEPTED)
def test_a_kernel_computes_outputs_and_gradients_of_the_plain_layer(name, kernel):
    case = CASES[name]
    outputs, grads = forward_and_grads(build(case, implementation=kernel), inputs_of(case))
    expected_outputs, expected_grads = _expected(name)
    tolerance = _TOLERANCES[case.dtype]
    _assert_close(outputs, expected_outputs, tolerance=tolerance, path="outputs")
    for (path, actual), (_, expected) in zip(
        flatten_items(grads), flatten_items(expected_grads), strict=True
    ):
        # Softmax does not see what is added to all keys: the gradient of that is rounding errors of zero.
        if not path.endswith("k_proj/bias"):
            _assert_close(actual, expected, tolerance=tolerance, path=path)


@pytest.mark.parametrize(("name", "kernel"), _REFUSED)
def test_a_kernel_that_cannot_honour_a_case_refuses(name, kernel):
    case = CASES[name]
    layer = build(case, implementation=kernel)
    with pytest.raises(ValueError, match=rf"implementation='{kernel}', which (has|takes|needs)"):
        jax.eval_shape(lambda inputs: forward_and_grads(layer, inputs), inputs_of(case))
