"""Losses over arrays: the cross entropy of next-token prediction.

The terms of every position are computed first (`token_losses`), then averaged over the live targets
(`cross_entropy`). The two halves are apart so that a long sequence can be worked through in chunks and still
be averaged once, over the whole global batch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class TokenLosses(NamedTuple):
    """Terms of the loss, one value a position, whether or not the position is a live target.

    Attributes:
        cross_entropy: `-log softmax(logits)[label]` in nats; NaN where the label is at or above the
            vocabulary size.
        z_loss: The squared log of the softmax's normalizer.
        is_correct: 1 where the label has the largest logit (the first of equals), else 0.
    """

    cross_entropy: Float[Array, "..."]
    z_loss: Float[Array, "..."]
    is_correct: Float[Array, "..."]


def token_losses(
    logits: Float[Array, "*batch vocab_size"], target_labels: Int[Array, "*batch"]
) -> TokenLosses:
    """Computes the loss terms of every position.

    The label's logit is picked by comparing against an iota rather than by a gather, and the prediction by
    two plain reductions rather than by argmax: each fuses into one pass over the logits, and where the
    vocabulary is sharded each becomes a partial reduction followed by a small all-reduce.

    Args:
        logits: Unnormalized scores; half-precision ones are computed with in float32.
        target_labels: The true id of each position. Negative ones stand for "no target"; their terms are
            computed as if for label 0 and are to be masked by the caller.

    Returns:
        Float32 terms (float64 for float64 logits) in the shape of `target_labels`.
    """
    logits = _at_least_float32(logits)
    vocab_size = logits.shape[-1]
    labels = jnp.maximum(target_labels, 0)
    ids = jax.lax.broadcasted_iota(labels.dtype, logits.shape, logits.ndim - 1)
    # The largest logit only shifts the exponents: no gradient flows through it.
    max_logit = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    shifted = logits - max_logit
    log_normalizer = jnp.log(jnp.sum(jnp.exp(shifted), axis=-1))
    label_logit = jnp.sum(jnp.where(ids == labels[..., None], shifted, 0.0), axis=-1)
    # An id outside the vocabulary has no logit: the loss must not look like that of a legal one.
    cross_entropy = jnp.where(labels < vocab_size, log_normalizer - label_logit, jnp.nan)
    predicted_ids = jnp.min(jnp.where(logits >= max_logit, ids, vocab_size), axis=-1)
    return TokenLosses(
        cross_entropy=cross_entropy,
        z_loss=jnp.square(log_normalizer + max_logit[..., 0]),
        is_correct=(predicted_ids == labels).astype(logits.dtype),
    )


def average_token_losses(
    terms: TokenLosses,
    *,
    live_targets: Bool[Array, "..."] | Int[Array, "..."] | Float[Array, "..."],
    z_loss_scale: float | int = 0.0,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Averages loss terms over the live targets; see `cross_entropy` for what is returned."""
    weights = live_targets.astype(terms.cross_entropy.dtype)
    num_targets = jnp.maximum(jnp.sum(weights), 1)
    is_live = weights > 0

    def masked(values: Array) -> Array:
        # A product would let the NaN of a dead position through.
        return jnp.where(is_live, values * weights, 0.0)

    def mean(values: Array) -> Array:
        return jnp.sum(masked(values)) / num_targets

    cross_entropy_loss = mean(terms.cross_entropy)
    z_loss = mean(terms.z_loss)
    total_loss = cross_entropy_loss
    per_target_loss = terms.cross_entropy
    if z_loss_scale:
        total_loss = total_loss + z_loss_scale * z_loss
        per_target_loss = per_target_loss + z_loss_scale * terms.z_loss
    return total_loss, {
        "total_loss": total_loss,
        "z_loss": z_loss,
        "cross_entropy_loss": cross_entropy_loss,
        "per_target_loss": masked(per_target_loss),
        "accuracy": mean(terms.is_correct),
    }


def cross_entropy(
    logits: Float[Array, "*batch vocab_size"],
    target_labels: Int[Array, "*batch"],
    *,
    live_targets: Bool[Array, "*batch"] | Int[Array, "*batch"] | Float[Array, "*batch"] | None = None,
    z_loss_scale: float | int = 0.0,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The mean cross entropy over the live targets of a batch, in nats per target.

    Args:
        logits: Unnormalized scores; half-precision ones are computed with in float32.
        target_labels: The true id of each position; negative where there is nothing to predict. An id at or
            above the vocabulary size makes the loss NaN.
        live_targets: Which positions count, and with what weight; None: those whose label is not negative.
        z_loss_scale: Weight of the mean squared log-normalizer, which keeps the logits from drifting. A
            float, not an array.

    Returns:
        The loss to minimize, `sum((ce + z_loss_scale * z) * live) / max(sum(live), 1)`, and a dictionary of
        the scalars `total_loss` (the same), `cross_entropy_loss`, `z_loss` (not scaled) and `accuracy`, and
        of `per_target_loss` in the shape of `target_labels`, zero where no target is live.

    Reference:
        z-loss: Chowdhery et al., PaLM, 2022, section 5 (https://arxiv.org/abs/2204.02311).
    """
    if live_targets is None:
        live_targets = target_labels >= 0
    return average_token_losses(
        token_losses(logits, target_labels), live_targets=live_targets, z_loss_scale=z_loss_scale
    )


def _at_least_float32(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
