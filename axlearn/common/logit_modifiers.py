"""Functions from logits to logits that shape a distribution: temperature, soft cap, top-k, top-p.

Each takes its settings and returns a function of `[..., vocab_size]` logits, so that
`config_for_function(top_p_logits).set(p=0.95)` is a config. Ids that are ruled out get `NEG_INF`, the value
of the attention masks, whose probability is 0 in every float type: it is far below any logit and far above
the least float32 and bfloat16, so that it survives a shift or a scale by a temperature.
"""

from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from axlearn.common.attention_bias import NEG_INF as NEG_INF
from axlearn.common.config import ConfigOr, error_message, maybe_instantiate


@runtime_checkable
class LogitsToLogitsFn(Protocol):
    """Maps logits to modified logits of the same shape and type."""

    def __call__(self, logits: Float[Array, "*batch vocab_size"]) -> Float[Array, "*batch vocab_size"]: ...


def chain(*args: ConfigOr[LogitsToLogitsFn]) -> LogitsToLogitsFn:
    """Applies modifiers one after another, the first one first.

    Args:
        *args: Modifiers, or configs of such; none: the identity.
    """
    fns = [maybe_instantiate(arg) for arg in args]

    def apply(logits: Float[Array, "*batch vocab_size"]) -> Float[Array, "*batch vocab_size"]:
        for fn in fns:
            logits = fn(logits)
        return logits

    return apply


def scale_by(temperature: float | int) -> LogitsToLogitsFn:
    """Divides logits by a temperature.

    Args:
        temperature: Above 1 flattens the distribution, below 1 sharpens it. 0 is the limit: everything but
            the largest logit (the first of equals) is ruled out, which makes sampling greedy.

    Raises:
        ValueError: The temperature is negative or not finite.
    """
    if not 0 <= temperature < float("inf"):
        raise ValueError(
            error_message(
                where="temperature",
                what=f"{temperature} is not a temperature",
                expected="a finite number of at least 0",
                advice="0 always takes the likeliest token, 1 samples from the model's own distribution.",
            )
        )

    def scale(logits: Float[Array, "*batch vocab_size"]) -> Float[Array, "*batch vocab_size"]:
        if temperature > 0:
            return logits / temperature
        ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
        return jnp.where(ids == jnp.argmax(logits, axis=-1, keepdims=True), logits, NEG_INF)

    return scale


def soft_cap_logits(cap: float | int) -> LogitsToLogitsFn:
    """Keeps logits within plus and minus a cap, by `cap * tanh(logits / cap)`.

    As `output_logits_modifier` of a decoder it is part of the model, in training too.

    Args:
        cap: Above 0.

    Raises:
        ValueError: The cap is not a positive number.

    Reference:
        Gemma Team, Gemma 2, 2024, section 2 (https://arxiv.org/abs/2408.00118).
    """
    if not 0 < cap < float("inf"):
        raise ValueError(error_message(where="cap", what=f"{cap} is no cap", expected="a number above 0"))

    def soft_cap(logits: Float[Array, "*batch vocab_size"]) -> Float[Array, "*batch vocab_size"]:
        return cap * jnp.tanh(logits / cap)

    return soft_cap


def top_k_logits(k: int) -> LogitsToLogitsFn:
    """Keeps the k largest logits, together with any that equal the smallest kept one.

    Args:
        k: At least 1; at or above the vocabulary size everything is kept.

    Raises:
        ValueError: k is below 1.
    """
    if k < 1:
        raise ValueError(error_message(where="top_k", what=f"{k} keeps nothing", expected="at least 1"))

    def keep_top_k(logits: Float[Array, "*batch vocab_size"]) -> Float[Array, "*batch vocab_size"]:
        if k >= logits.shape[-1]:
            return logits
        smallest_kept = jax.lax.top_k(logits, k)[0][..., -1:]
        return jnp.where(logits >= smallest_kept, logits, NEG_INF)

    return keep_top_k


def top_p_logits(p: float | int) -> LogitsToLogitsFn:
    """Keeps the smallest set of likeliest ids whose probabilities add up to at least p (nucleus sampling).

    Ids that are exactly as likely as the last one kept are kept too. The likeliest id always stays.

    Args:
        p: Probability mass in [0, 1]; 1 keeps everything.

    Raises:
        ValueError: p lies outside [0, 1].

    Reference:
        Holtzman et al., The Curious Case of Neural Text Degeneration, 2020
        (https://arxiv.org/abs/1904.09751).
    """
    if not 0 <= p <= 1:
        raise ValueError(
            error_message(where="top_p", what=f"{p} is not a probability", expected="a number in [0, 1]")
        )

    def keep_nucleus(logits: Float[Array, "*batch vocab_size"]) -> Float[Array, "*batch vocab_size"]:
        if p >= 1:
            return logits
        descending = jnp.sort(logits, axis=-1, descending=True)
        probs = jax.nn.softmax(descending.astype(jnp.float32), axis=-1)
        # An id stays as long as the ids before it do not reach p: this includes the one that crosses it.
        mass_before = jnp.cumsum(probs, axis=-1) - probs
        num_kept = jnp.maximum(jnp.sum(mass_before < p, axis=-1, keepdims=True), 1)
        smallest_kept = jnp.take_along_axis(descending, num_kept - 1, axis=-1)
        return jnp.where(logits >= smallest_kept, logits, NEG_INF)

    return keep_nucleus
