"""Layers without parameters that say what is added to the logits of a decoder's self-attention.

They are what `Decoder.Config.attention_mask` takes. The decoder does not call them: it hands what they configure
down to its attention layers, where it stays a function of positions, in training and in decoding. Called, they
return the bias for whole sequences.
"""

import abc
from typing import Any, NamedTuple, Optional

from jaxtyping import Array, Int

from axlearn.common.attention._multihead import MultiheadAttention
from axlearn.common.attention._qkv import default_positions
from axlearn.common.attention._recursive import for_each_self_attention
from axlearn.common.attention_bias import (
    BaseAttentionBias,
    CausalAttentionBias,
    SegmentIdAttentionBias,
    ZeroAttentionBias,
    alibi_attention_bias,
)
from axlearn.common.base_layer import BaseLayer
from axlearn.common.config import (
    REQUIRED,
    InstantiableConfig,
    Required,
    config_class,
    config_for_function,
)


class PositionBiases(NamedTuple):
    """Configs of functions of target_positions and source_positions.

    Attributes:
        mask: The mask, for `MultiheadAttention.Config.mask`. None: no mask.
        logit_bias: What is added, for `MultiheadAttention.Config.logit_bias`. None: nothing.
    """

    mask: Optional[InstantiableConfig] = None
    logit_bias: Optional[InstantiableConfig] = None


class BaseAttentionLogitBiasLayer(BaseLayer):
    """Says what is added to the logits of self-attention."""

    @config_class
    class Config(BaseLayer.Config):
        """Configures `BaseAttentionLogitBiasLayer`."""

    @classmethod
    @abc.abstractmethod
    def position_biases(cls, cfg: Any) -> PositionBiases:
        """What a config of this class means, as functions of positions."""

    def forward(
        self,
        *,
        segment_ids: Int[Array, "batch seq"],
        positions: Optional[Int[Array, "#batch seq"]] = None,
    ) -> BaseAttentionBias:
        """The bias for whole sequences.

        Args:
            segment_ids: Tokens attend only within their segment.
            positions: The time index of each token. None: 0, 1, 2, ...

        Returns:
            The bias; its `value()` is the array `[batch, heads or 1, seq, seq]`.
        """
        if positions is None:
            positions = default_positions(segment_ids)
        where = {"target_positions": positions, "source_positions": positions}
        total: BaseAttentionBias = ZeroAttentionBias()
        for cfg in type(self).position_biases(self.config):
            if cfg is not None:
                total = total + cfg.instantiate(**where)  # type: ignore[arg-type]
        return total + SegmentIdAttentionBias(segment_ids, segment_ids)


class CausalAttentionLogitBiasLayer(BaseAttentionLogitBiasLayer):
    """Attention to the own position and before."""

    @classmethod
    def position_biases(cls, cfg: Any) -> PositionBiases:
        """See `BaseAttentionLogitBiasLayer.position_biases`."""
        return PositionBiases(mask=CausalAttentionBias.default_config())


class FullAttentionLogitBiasLayer(BaseAttentionLogitBiasLayer):
    """Attention to all positions."""

    @classmethod
    def position_biases(cls, cfg: Any) -> PositionBiases:
        """See `BaseAttentionLogitBiasLayer.position_biases`."""
        return PositionBiases()


class ALiBiAttentionLogitBiasLayer(CausalAttentionLogitBiasLayer):
    """Attention to the own position and before, less the farther away.

    Reference: Press et al., Train Short, Test Long, https://arxiv.org/abs/2108.12409, section 3.
    """

    @config_class
    class Config(CausalAttentionLogitBiasLayer.Config):
        """Configures `ALiBiAttentionLogitBiasLayer`."""

        # Number of query heads.
        num_heads: Required[int] = REQUIRED

    @classmethod
    def position_biases(cls, cfg: Any) -> PositionBiases:
        """See `BaseAttentionLogitBiasLayer.position_biases`."""
        biases = super().position_biases(cfg)
        bias = config_for_function(alibi_attention_bias).set(num_heads=cfg.num_heads)
        return biases._replace(logit_bias=bias)


class SymmetricALiBiAttentionLogitBiasLayer(FullAttentionLogitBiasLayer):
    """Attention to all positions, less the farther away on either side."""

    @config_class
    class Config(FullAttentionLogitBiasLayer.Config):
        """Configures `SymmetricALiBiAttentionLogitBiasLayer`."""

        # Number of query heads.
        num_heads: Required[int] = REQUIRED

    @classmethod
    def position_biases(cls, cfg: Any) -> PositionBiases:
        """See `BaseAttentionLogitBiasLayer.position_biases`."""
        bias = config_for_function(alibi_attention_bias).set(num_heads=cfg.num_heads, symmetric=True)
        return PositionBiases(logit_bias=bias)


def set_position_biases(cfg: Any, attention_mask: InstantiableConfig) -> None:
    """Hands a mask, or what a logit-bias layer configures, to self-attention layers.

    A mask goes to the layers that say neither `causal` nor `mask` themselves, a bias to those without
    `logit_bias`.

    Args:
        cfg: A config with attention layers below it, such as that of a stack; changed in place.
        attention_mask: Config of a `BaseAttentionLogitBiasLayer`, or of a mask such as `CausalAttentionBias`.
    """
    biases = PositionBiases(mask=attention_mask)
    if isinstance(attention_mask, BaseAttentionLogitBiasLayer.Config):
        klass: Any = attention_mask.klass
        biases = klass.position_biases(attention_mask)

    def set_biases(attention: MultiheadAttention.Config) -> None:
        if attention.causal is None and attention.mask is None:
            attention.mask = biases.mask
        if attention.logit_bias is None:
            attention.logit_bias = biases.logit_bias

    for_each_self_attention(cfg, set_biases)
