"""Bounding gradients and updates by their norms."""

import functools
from typing import Optional

import jax
import jax.numpy as jnp

from axlearn.common.optimizer_base import NestedOptParam, PartitionedGradientTransformation
from axlearn.common.optimizers._compose import stateless
from axlearn.common.optimizers._per_param import root_mean_square, scale_array
from axlearn.common.optimizers._summaries import add_summary
from axlearn.common.utils import Nested, Tensor, vectorized_tree_map


def global_norm(tree: Nested[Tensor]) -> Tensor:
    """The root of the sum of the squares of all elements of all arrays, in float32 whatever their type."""
    squares = [jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares, start=jnp.zeros([], jnp.float32)))


def clip_scale(norm: Tensor, *, max_norm: Optional[float], eps: float) -> Tensor:
    """What to multiply by so that a vector of length `norm` is no longer than `max_norm`; None: 1."""
    if max_norm is None:
        return jnp.ones([], jnp.float32)
    return jnp.minimum(1.0, max_norm / (norm + eps))


def clip_by_global_norm(
    max_norm: Optional[float] = None, *, drop_norm: Optional[float] = None, eps: float = 1e-8
) -> PartitionedGradientTransformation:
    """Scales all gradients by one number so that together they are no longer than `max_norm`.

    Logs `gradient_norm` (before) and `gradient_scale`. The transformations that follow still see a step where
    the gradients are dropped, as one of zero gradients; `skip_and_clip_by_global_norm` leaves it out
    altogether.

    Args:
        max_norm: The greatest length; None: any.
        drop_norm: From this length on, gradients become zero; None: never. Not-a-number counts as longer.
        eps: Is added to the length that is divided by.

    Returns:
        The transformation; it has no state.

    Reference:
        Pascanu et al., On the difficulty of training recurrent neural networks
        (https://arxiv.org/abs/1211.5063), algorithm 1.
    """

    def update_tree(updates: Nested[Tensor], params: NestedOptParam) -> Nested[Tensor]:
        del params
        norm = global_norm(updates)
        factor = clip_scale(norm, max_norm=max_norm, eps=eps)
        clipped = jax.tree.map(lambda u: scale_array(u, factor), updates)
        if drop_norm is not None:
            keep = norm < drop_norm
            # Not a product with zero: that leaves not-a-number what it is.
            clipped = jax.tree.map(lambda u: jnp.where(keep, u, jnp.zeros_like(u)), clipped)
            factor = jnp.where(keep, factor, 0.0)
        add_summary("gradient_norm", norm)
        add_summary("gradient_scale", factor)
        return clipped

    return stateless(update_tree)


def clip_by_block_rms(
    threshold: Optional[float], *, summary_suffix: Optional[str] = None
) -> PartitionedGradientTransformation:
    """Scales each array so that its root mean square is at most `threshold`.

    The layers of a Repeat count one by one.

    Args:
        threshold: The greatest root mean square; None: any.
        summary_suffix: Logs the largest one, before clipping, as `max_block_rms/<summary_suffix>`; None: does
            not.

    Returns:
        The transformation; it has no state.

    Reference:
        Shazeer and Stern, Adafactor (https://arxiv.org/abs/1804.04235), section 6.
    """

    def clip_one(update: Tensor) -> tuple[Tensor, Tensor]:
        rms = root_mean_square(update)
        if threshold is None:
            return rms, update
        return rms, scale_array(update, 1.0 / jnp.maximum(1.0, rms / threshold))

    def update_tree(updates: Nested[Tensor], params: NestedOptParam) -> Nested[Tensor]:
        del params
        if threshold is None and summary_suffix is None:
            return updates
        if summary_suffix is not None:
            block_rms = vectorized_tree_map(lambda u: clip_one(u)[0], updates)
            largest = [jnp.max(rms) for rms in jax.tree.leaves(block_rms)]
            zero = jnp.zeros([], jnp.float32)
            add_summary(f"max_block_rms/{summary_suffix}", functools.reduce(jnp.maximum, largest, zero))
        return vectorized_tree_map(lambda u: clip_one(u)[1], updates)

    return stateless(update_tree)
