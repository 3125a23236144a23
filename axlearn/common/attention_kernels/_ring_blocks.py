"""One block of queries and one of keys: the softmax so far, and the gradients.

The softmax over all keys is put together block by block from the largest logit and the sum so far, in float32.

References:
    Milakov and Gimelshein, Online normalizer calculation for softmax, https://arxiv.org/abs/1805.02867, section 3.
    Rabe and Staats, Self-attention Does Not Need O(n^2) Memory, https://arxiv.org/abs/2112.05682, section 2.
    Dao, FlashAttention-2, https://arxiv.org/abs/2307.08691, section 3.1, for the gradients.
"""

from typing import NamedTuple, Optional

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# A logit of a pair that is masked: less than any other, and still a number, so that differences are numbers too.
_MASKED = -1e30


class Softmax(NamedTuple):
    """What is known of queries' softmax after some of the keys, in float32.

    Attributes:
        context: The sum of values, weighted by `exp(logits - largest)`.
        largest: The largest logit.
        total: The sum of `exp(logits - largest)`.
    """

    context: Float[Array, "... batch kv_heads group target per_head_dim"]
    largest: Float[Array, "... batch kv_heads group target"]
    total: Float[Array, "... batch kv_heads group target"]


def empty_softmax(query: jax.Array, sink: Optional[jax.Array]) -> Softmax:
    """The softmax before any key.

    Args:
        query: `[..., batch, kv_heads, group, target, per_head_dim]`.
        sink: A logit `[kv_heads, group]` that takes part without a value. None: no such logit.

    Returns:
        The softmax.
    """
    shape = query.shape[:-1]
    context = jnp.zeros(query.shape, jnp.float32)
    if sink is None:
        return Softmax(context, jnp.full(shape, _MASKED, jnp.float32), jnp.zeros(shape, jnp.float32))
    sink = sink.astype(jnp.float32)[:, :, None]
    sink = sink.reshape((1,) * (len(shape) - 3) + sink.shape)
    return Softmax(context, jnp.broadcast_to(sink, shape), jnp.ones(shape, jnp.float32))


def add_keys(
    softmax: Softmax,
    query: Float[Array, "batch kv_heads group target per_head_dim"],
    key: Float[Array, "batch kv_heads source per_head_dim"],
    value: Float[Array, "batch kv_heads source per_head_dim"],
    *,
    mask: Optional[Bool[Array, "#batch target source"]],
    logit_cap: Optional[float],
) -> Softmax:
    """Adds a block of keys.

    Args:
        softmax: What is known of the queries so far.
        query: Queries.
        key: Keys.
        value: Values.
        mask: True where a query sees a key. None: everywhere.
        logit_cap: As in `AttentionTask`.

    Returns:
        The softmax with these keys.
    """
    logits, _ = _logits(query, key, mask=mask, logit_cap=logit_cap)
    largest = jnp.maximum(softmax.largest, logits.max(axis=-1))
    weights = _exp(logits - largest[..., None], mask=mask)
    kept = jnp.exp(softmax.largest - largest)
    values = jnp.einsum(
        "bkgts,bksd->bkgtd", weights.astype(value.dtype), value, preferred_element_type=jnp.float32
    )
    return Softmax(
        context=softmax.context * kept[..., None] + values,
        largest=largest,
        total=softmax.total * kept + weights.sum(axis=-1),
    )


class Queries(NamedTuple):
    """Queries of a block, and what of them the gradients need.

    Attributes:
        query: The queries.
        d_context: The gradient of what they were answered.
        log_total: The logarithm of the sum of `exp(logits)` of all keys, and of the sink.
        correction: The product of the context and its gradient, summed over a head.
    """

    query: Float[Array, "batch kv_heads group target per_head_dim"]
    d_context: Float[Array, "batch kv_heads group target per_head_dim"]
    log_total: Float[Array, "batch kv_heads group target"]
    correction: Float[Array, "batch kv_heads group target"]


class BlockGradients(NamedTuple):
    """Gradients, in float32."""

    query: Float[Array, "batch kv_heads group target per_head_dim"]
    key: Float[Array, "batch kv_heads source per_head_dim"]
    value: Float[Array, "batch kv_heads source per_head_dim"]


def block_gradients(
    queries: Queries,
    key: Float[Array, "batch kv_heads source per_head_dim"],
    value: Float[Array, "batch kv_heads source per_head_dim"],
    *,
    mask: Optional[Bool[Array, "#batch target source"]],
    logit_cap: Optional[float],
) -> BlockGradients:
    """The part of the gradients that comes from a block of queries and one of keys; arguments as in `add_keys`."""
    logits, slope = _logits(queries.query, key, mask=mask, logit_cap=logit_cap)
    probs = _exp(logits - queries.log_total[..., None], mask=mask)
    d_probs = jnp.einsum("bkgtd,bksd->bkgts", queries.d_context, value, preferred_element_type=jnp.float32)
    d_logits = probs * (d_probs - queries.correction[..., None])
    if slope is not None:
        d_logits = d_logits * slope
    d_logits = d_logits.astype(key.dtype)
    return BlockGradients(
        query=jnp.einsum("bkgts,bksd->bkgtd", d_logits, key, preferred_element_type=jnp.float32),
        key=jnp.einsum("bkgts,bkgtd->bksd", d_logits, queries.query, preferred_element_type=jnp.float32),
        value=jnp.einsum(
            "bkgts,bkgtd->bksd",
            probs.astype(value.dtype),
            queries.d_context,
            preferred_element_type=jnp.float32,
        ),
    )


def _logits(
    query: jax.Array, key: jax.Array, *, mask: Optional[jax.Array], logit_cap: Optional[float]
) -> tuple[jax.Array, Optional[jax.Array]]:
    """Logits, capped and masked, and their derivative with respect to what they were before the cap."""
    logits = jnp.einsum("bkgtd,bksd->bkgts", query, key, preferred_element_type=jnp.float32)
    slope = None
    if logit_cap is not None:
        capped = jnp.tanh(logits / logit_cap)
        logits, slope = logit_cap * capped, 1 - jnp.square(capped)
    if mask is not None:
        logits = jnp.where(_for_heads(mask), logits, _MASKED)
    return logits, slope


def _exp(logits: jax.Array, *, mask: Optional[jax.Array]) -> jax.Array:
    """Exponentials, 0 where masked: also for a query that has seen no key yet, all of whose logits are equal."""
    exps = jnp.exp(logits)
    return exps if mask is None else jnp.where(_for_heads(mask), exps, 0.0)


def _for_heads(mask: jax.Array) -> jax.Array:
    return mask[:, None, None]  # [batch or 1, 1, 1, target, source]
