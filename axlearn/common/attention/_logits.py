"""The arithmetic of attention, as products of whole arrays that XLA compiles for any device.

Heads of queries are grouped by the key head that they share: query head j attends to key head
`j // (num_heads / num_kv_heads)`. Keys and values are never repeated in memory.
"""

from typing import Optional, Union

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from axlearn.common.attention_bias import BaseAttentionBias


def attention_logits(
    query: Float[Array, "batch target heads per_head_dim"],
    key: Float[Array, "batch source kv_heads per_head_dim"],
) -> Float[Array, "batch heads target source"]:
    """The products of queries and keys.

    Args:
        query: Queries, scaled.
        key: Keys, scaled; `kv_heads` divides `heads`.

    Returns:
        The logits, accumulated and returned in float32 (float64 if the inputs are).
    """
    batch, target_len, num_heads, per_head_dim = query.shape
    source_len, num_kv_heads = key.shape[1:3]
    grouped = query.reshape(batch, target_len, num_kv_heads, num_heads // num_kv_heads, per_head_dim)
    logits = jnp.einsum(
        "btkgh,bskh->bkgts", grouped, key, preferred_element_type=jnp.promote_types(query.dtype, jnp.float32)
    )
    return logits.reshape(batch, num_heads, target_len, source_len)


def attention_probs(
    logits: Float[Array, "batch heads target source"],
    bias: BaseAttentionBias,
    *,
    logit_cap: Union[int, float, None] = None,
    sink: Optional[Float[Array, "heads"]] = None,
) -> Float[Array, "batch heads target source"]:
    """Softmax over the sources.

    Args:
        logits: The logits.
        bias: Is added to the capped logits; masks, mostly.
        logit_cap: Keeps logits within (-logit_cap, logit_cap) by `logit_cap * tanh(logits / logit_cap)`.
            None: no cap.
        sink: For each head one more logit, neither capped nor biased, whose probability is left out of the
            result: `exp(logits) / (exp(sink) + sum(exp(logits)))`. None: no such logit.

    Returns:
        The probabilities, in the dtype of the logits. With a sink they add up to less than 1; where all
        sources are masked they are 0, and without one uniform.

    Reference:
        Xiao et al., Efficient Streaming Language Models with Attention Sinks,
        https://arxiv.org/abs/2309.17453, section 3.3; learned for each head as in OpenAI, gpt-oss model card,
        https://arxiv.org/abs/2508.10925.
    """
    logits = biased_logits(logits, bias, logit_cap=logit_cap)
    if sink is None:
        return jax.nn.softmax(logits, axis=-1)
    sink = sink.astype(logits.dtype)[None, :, None, None]
    # What cancels out has no gradient to follow.
    largest = jax.lax.stop_gradient(jnp.maximum(logits.max(axis=-1, keepdims=True), sink))
    exps = jnp.exp(logits - largest)
    return exps / (exps.sum(axis=-1, keepdims=True) + jnp.exp(sink - largest))


def biased_logits(
    logits: Float[Array, "batch heads target source"],
    bias: BaseAttentionBias,
    *,
    logit_cap: Union[int, float, None] = None,
) -> Float[Array, "batch heads target source"]:
    """The logits, first capped, then biased; see `attention_probs`."""
    if logit_cap is not None:
        logits = logit_cap * jnp.tanh(logits / logit_cap)
    value = bias.astype(logits.dtype).value()
    return logits if value is None else logits + value


def attention_context(
    probs: Float[Array, "batch heads target source"],
    value: Float[Array, "batch source kv_heads per_head_dim"],
) -> Float[Array, "batch target heads per_head_dim"]:
    """Values averaged by the probabilities, in the dtype of the values."""
    batch, num_heads, target_len, source_len = probs.shape
    num_kv_heads, per_head_dim = value.shape[2:]
    grouped = probs.astype(value.dtype).reshape(
        batch, num_kv_heads, num_heads // num_kv_heads, target_len, source_len
    )
    context = jnp.einsum("bkgts,bskh->btkgh", grouped, value)
    return context.reshape(batch, target_len, num_heads, per_head_dim)
