"""Matrix products whose operands are float8, with delayed scaling.

A tensor `x` is stored as `q = clip(x / scale)` in eight bits. The scale follows from the largest absolute values
("amax") of the last steps, so that quantizing needs no pass over the tensor of its own: what this step sees counts from
the next step on. Activations and kernels are e4m3 (4 bits of exponent, 3 of mantissa), the gradients that come back
through the product are e5m2, which has the wider range.

Scales and histories are parameters whose gradient *is* their new value; see `OverrideInplaceUpdateTransformation`.

Reference: Micikevicius et al., FP8 Formats for Deep Learning, https://arxiv.org/abs/2209.05433, sections 3 and 4.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from axlearn.common.quantized_dot_general._contraction import Contraction

FORWARD_DTYPE = jnp.float8_e4m3fn
GRADIENT_DTYPE = jnp.float8_e5m2


class Fp8Meta(NamedTuple):
    """What is remembered of one operand; float32.

    Attributes:
        scale: What quantized values are multiplied with, `[..., 1]`; that of the last step. It counts only where the
            history is empty.
        amax_history: The largest absolute values of the last steps, the latest first, the others in the order of a
            ring; 0 where there was none yet, `[..., history]`. Leading dims are parts of one tensor, such as
            queries, keys and values, which share a scale.
    """

    scale: jax.Array
    amax_history: jax.Array


class Fp8Metas(NamedTuple):
    """What is remembered of a product."""

    input: Fp8Meta
    kernel: Fp8Meta
    output_grad: Fp8Meta


def current_scale(meta: Fp8Meta, dtype: Any) -> jax.Array:
    """The scale of this step: the one that maps the largest value of the history to the largest float8.

    Args:
        meta: What is remembered.
        dtype: The float8.

    Returns:
        A positive scalar, float32. Where nothing but zeros was seen, the scale of the last step; 1 where that is 0, as
        a step leaves it in which the product had no part in the loss: the "gradient" of what is not used is zero.
    """
    amax = jnp.max(meta.amax_history.astype(jnp.float32))
    # A quotient that underflows would make a scale of 0.
    scale = jnp.maximum(amax / _max_of(dtype), jnp.finfo(jnp.float32).tiny)
    last = jnp.max(meta.scale.astype(jnp.float32))
    return jnp.where(amax > 0, scale, jnp.where(last > 0, last, 1.0))


def updated_meta(meta: Fp8Meta, *, x: jax.Array, scale: jax.Array) -> Fp8Meta:
    """What to remember after a step.

    Args:
        meta: What was remembered before.
        x: The tensor of this step.
        scale: Its scale.

    Returns:
        The like of `meta`. A tensor with infinite or undefined elements is not remembered: it must not spoil the next
        steps.
    """
    amax = jnp.max(jnp.abs(x)).astype(jnp.float32)
    amax = jnp.where(jnp.isfinite(amax), amax, 0)
    history = jnp.roll(meta.amax_history, -1, axis=-1).at[..., 0].set(amax.astype(meta.amax_history.dtype))
    return Fp8Meta(scale=jnp.full_like(meta.scale, scale), amax_history=history)


def quantize(x: jax.Array, *, scale: jax.Array, dtype: Any) -> jax.Array:
    """`x / scale` in float8; what is too large or infinite becomes the largest float8, what is undefined stays so."""
    largest = _max_of(dtype)
    return jnp.clip(x.astype(jnp.float32) / scale, -largest, largest).astype(dtype)


def fp8_dot(
    activation: jax.Array, kernel: jax.Array, metas: Fp8Metas, *, contraction: Contraction
) -> jax.Array:
    """Multiplies in float8, forward and backward.

    Args:
        activation: The activations.
        kernel: The kernel.
        metas: What is remembered of operands and gradient. Their "gradients" are their new values, which must not be
            added up: the function must be called once with the same `metas` in a forward pass.
        contraction: What is summed over.

    Returns:
        The product, in the common dtype of the operands.
    """
    dtype = jnp.result_type(activation, kernel)
    return _fp8_dot(contraction, activation.astype(dtype), kernel.astype(dtype), metas)


class _Residuals(NamedTuple):
    """What the backward pass needs: operands in float8, half the memory of bfloat16."""

    q_activation: jax.Array
    q_kernel: jax.Array
    input_scale: jax.Array
    kernel_scale: jax.Array
    new_input: Fp8Meta
    new_kernel: Fp8Meta
    output_grad: Fp8Meta


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fp8_dot(
    contraction: Contraction, activation: jax.Array, kernel: jax.Array, metas: Fp8Metas
) -> jax.Array:
    return _fp8_dot_forward(contraction, activation, kernel, metas)[0]


def _fp8_dot_forward(
    contraction: Contraction, activation: jax.Array, kernel: jax.Array, metas: Fp8Metas
) -> tuple[jax.Array, _Residuals]:
    input_scale = current_scale(metas.input, FORWARD_DTYPE)
    kernel_scale = current_scale(metas.kernel, FORWARD_DTYPE)
    q_activation = quantize(activation, scale=input_scale, dtype=FORWARD_DTYPE)
    q_kernel = quantize(kernel, scale=kernel_scale, dtype=FORWARD_DTYPE)
    product = contraction.apply(
        q_activation, q_kernel, preferred_element_type=_product_dtype(activation.dtype)
    )
    residuals = _Residuals(
        q_activation=q_activation,
        q_kernel=q_kernel,
        input_scale=input_scale,
        kernel_scale=kernel_scale,
        new_input=updated_meta(metas.input, x=activation, scale=input_scale),
        new_kernel=updated_meta(metas.kernel, x=kernel, scale=kernel_scale),
        output_grad=metas.output_grad,
    )
    return _scaled(product, input_scale * kernel_scale, activation.dtype), residuals


def _fp8_dot_backward(
    contraction: Contraction, residuals: _Residuals, grad: jax.Array
) -> tuple[jax.Array, jax.Array, Fp8Metas]:
    r = residuals
    grad_scale = current_scale(r.output_grad, GRADIENT_DTYPE)
    q_grad = quantize(grad, scale=grad_scale, dtype=GRADIENT_DTYPE)
    # HIGHEST: on Hopper, sums over many terms otherwise keep 14 bits, which gradients feel.
    exact = {
        "preferred_element_type": _product_dtype(grad.dtype),
        "precision": jax.lax.Precision.HIGHEST,
    }
    activation_grad = contraction.activation_cotangent(q_grad, r.q_kernel, **exact)
    kernel_grad = contraction.kernel_cotangent(r.q_activation, q_grad, **exact)
    return (
        _scaled(activation_grad, grad_scale * r.kernel_scale, grad.dtype),
        _scaled(kernel_grad, grad_scale * r.input_scale, grad.dtype),
        Fp8Metas(
            input=r.new_input,
            kernel=r.new_kernel,
            output_grad=updated_meta(r.output_grad, x=grad, scale=grad_scale),
        ),
    )


_fp8_dot.defvjp(_fp8_dot_forward, _fp8_dot_backward)


def _product_dtype(dtype: Any) -> Any:
    """The type of a product that is not scaled yet: 448 * 448 is more than float16 can hold."""
    return jnp.promote_types(dtype, jnp.bfloat16)


def _scaled(product: jax.Array, scale: jax.Array, dtype: Any) -> jax.Array:
    return (product.astype(jnp.float32) * scale).astype(dtype)


def _max_of(dtype: Any) -> float:
    return float(jnp.finfo(dtype).max)
