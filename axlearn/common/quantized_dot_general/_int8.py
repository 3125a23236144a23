"""Matrix products whose operands are int8, with scales that are measured as they are needed."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from axlearn.common.quantized_dot_general._contraction import Contraction

# Symmetric: -128 is not used, so that a value and its negative are rounded alike.
_LARGEST = 127


def int8_dot(activation: jax.Array, kernel: jax.Array, *, contraction: Contraction) -> jax.Array:
    """Multiplies in int8 with sums in int32; the gradient is that of the product that is not rounded.

    Each vector that is summed over (a row of the activations, a column of the kernel) has a scale of its own, which
    maps its largest absolute value to 127.

    Args:
        activation: The activations.
        kernel: The kernel.
        contraction: What is summed over.

    Returns:
        The product, in the common dtype of the operands.

    Reference: Bengio et al., https://arxiv.org/abs/1308.3432, section 2 (straight-through gradients).
    """
    dtype = jnp.result_type(activation, kernel)
    return _int8_dot(contraction, activation.astype(dtype), kernel.astype(dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _int8_dot(contraction: Contraction, activation: jax.Array, kernel: jax.Array) -> jax.Array:
    q_activation, activation_scale = _quantize(activation, contraction.activation_dims)
    q_kernel, kernel_scale = _quantize(kernel, contraction.kernel_dims)
    sums = contraction.apply(q_activation, q_kernel, preferred_element_type=jnp.int32)
    scales = activation_scale.reshape(
        activation_scale.shape + (1,) * kernel_scale.ndim
    ) * kernel_scale.reshape((1,) * activation_scale.ndim + kernel_scale.shape)
    return (sums.astype(jnp.float32) * scales).astype(activation.dtype)


def _int8_dot_forward(
    contraction: Contraction, activation: jax.Array, kernel: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _int8_dot(contraction, activation, kernel), (activation, kernel)


def _int8_dot_backward(
    contraction: Contraction, residuals: tuple[jax.Array, jax.Array], grad: jax.Array
) -> tuple[jax.Array, jax.Array]:
    activation, kernel = residuals
    return contraction.activation_cotangent(grad, kernel), contraction.kernel_cotangent(activation, grad)


_int8_dot.defvjp(_int8_dot_forward, _int8_dot_backward)


def _quantize(x: jax.Array, dims: Sequence[int]) -> tuple[jax.Array, jax.Array]:
    """Rounds vectors along `dims`; returns them, and their scales without `dims`."""
    x = x.astype(jnp.float32)
    amax = jnp.max(jnp.abs(x), axis=tuple(dims), keepdims=True)
    # Not a choice by `amax > 0`, which an undefined value would pass: as an int8 it would be 0, and nobody would know.
    scale = jnp.maximum(amax / _LARGEST, jnp.finfo(jnp.float32).tiny)
    return jnp.round(x / scale).astype(jnp.int8), jnp.squeeze(scale, axis=tuple(dims))
