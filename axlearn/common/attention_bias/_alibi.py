"""Attention with linear biases: logits fall off with distance, by a slope of each head's own."""

import dataclasses
from typing import Any, Optional

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from axlearn.common.attention_bias._base import BaseAttentionBias, LogitAxes, bias_pytree, spec_of
from axlearn.common.config import error_message


def alibi_slopes(num_heads: int) -> np.ndarray:
    """How fast the logits of each head fall off.

    For a power of two the slopes are `2 ** (-8 i / num_heads)`, i = 1, 2, ..., num_heads. For another number
    they are those of the next lower power of two, followed by every other one, from the first, of twice that
    power: values that lie between them.

    Args:
        num_heads: Number of query heads, at least 1.

    Returns:
        `[num_heads]` float32.

    Raises:
        ValueError: If there are no heads.

    Reference:
        Press et al., Train Short, Test Long, https://arxiv.org/abs/2108.12409, section 3; the rule for other
        numbers than powers of two is that of the code published with the paper.
    """
    if num_heads < 1:
        raise ValueError(error_message(what=f"num_heads={num_heads}", expected="at least 1"))
    power = 2 ** (num_heads.bit_length() - 1)
    slopes = np.concatenate([_slopes_of_power(power), _slopes_of_power(2 * power)[::2]])
    return slopes[:num_heads].astype(np.float32)


def _slopes_of_power(num_heads: int) -> np.ndarray:
    return 2.0 ** (-8.0 * np.arange(1, num_heads + 1) / num_heads)


@bias_pytree(data_fields=("target_positions", "source_positions", "slopes"))
@dataclasses.dataclass(frozen=True)
class ALiBiAttentionBias(BaseAttentionBias):
    """Lowers the logit of a pair by a slope times its distance.

    It forbids nothing: sources after the target keep their logits, and a causal mask is added to hide them.
    """

    # The time index of each target: [batch or 1, target] int.
    target_positions: Any
    # The time index of each source: [batch or 1, source] int.
    source_positions: Any
    # How fast the logits of each head fall off: [heads], floating.
    slopes: Any = dataclasses.field(kw_only=True)
    # Whether sources after the target lose too, by their distance.
    symmetric: bool = dataclasses.field(default=False, kw_only=True)

    def value(self) -> Optional[Float[Array, "#batch #heads #target #source"]]:
        """See `BaseAttentionBias.value`."""
        # A slot of a cache that was never written is in the farthest future. Differences of positions do not
        # overflow, as none is negative.
        distance = self.target_positions[:, None, :, None] - self.source_positions[:, None, None, :]
        distance = jnp.abs(distance) if self.symmetric else jnp.maximum(distance, 0)
        slopes = jnp.asarray(self.slopes, jnp.float32)[None, :, None, None]
        return (-slopes * distance.astype(jnp.float32)).astype(self.dtype)

    def _partition_spec(self, axes: LogitAxes) -> "ALiBiAttentionBias":
        return dataclasses.replace(
            self,
            target_positions=spec_of(self.target_positions, axes.batch, axes.target),
            source_positions=spec_of(self.source_positions, axes.batch, axes.source),
            slopes=spec_of(self.slopes, axes.heads),
        )


def alibi_attention_bias(
    target_positions: Int[Array, "#batch target"],
    source_positions: Int[Array, "#batch source"],
    *,
    num_heads: int,
    symmetric: bool = False,
) -> ALiBiAttentionBias:
    """The bias for a number of heads, as a function that a config can hold.

    Args:
        target_positions: The time index of each target.
        source_positions: The time index of each source.
        num_heads: Number of query heads.
        symmetric: See `ALiBiAttentionBias`.

    Returns:
        The bias.
    """
    return ALiBiAttentionBias(
        target_positions, source_positions, slopes=alibi_slopes(num_heads), symmetric=symmetric
    )
