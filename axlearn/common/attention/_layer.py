"""A transformer layer, and what every stack of them offers."""

import abc
from typing import Any, NamedTuple, Optional

from jaxtyping import Array, Float, Int

from axlearn.common.attention._feed_forward import TransformerFeedForwardLayer
from axlearn.common.attention._multihead import LogitBiases
from axlearn.common.attention._self_attention import TransformerAttentionLayer
from axlearn.common.base_layer import BaseLayer
from axlearn.common.config import REQUIRED, Required, config_class


class TransformerOutput(NamedTuple):
    """What a transformer layer or a stack of them returns.

    Attributes:
        data: Hidden states `[batch, seq, input_dim]`.
    """

    data: Array


class BaseTransformerLayer(BaseLayer):
    """From hidden states to hidden states of the same shape, over whole sequences or step by step."""

    Output = TransformerOutput

    @config_class
    class Config(BaseLayer.Config):
        """Configures `BaseTransformerLayer`."""

        # Size of the hidden states.
        input_dim: Required[int] = REQUIRED

    @abc.abstractmethod
    def forward(
        self,
        data: Float[Array, "batch seq input_dim"],
        *,
        attention_logit_biases: Optional[LogitBiases] = None,
        segment_ids: Optional[Int[Array, "batch seq"]] = None,
        positions: Optional[Int[Array, "#batch seq"]] = None,
    ) -> TransformerOutput:
        """Applies the layer to whole sequences.

        Args:
            data: Hidden states.
            attention_logit_biases: Added to the logits of self-attention; a bias, or an array of rank 2 to 4
                that broadcasts against `[batch, heads, seq, seq]`. None: nothing.
            segment_ids: Tokens attend only within their segment. None: one segment.
            positions: Positions in the text, for position embeddings. None: 0, 1, 2, ...

        Returns:
            The outputs.
        """

    @abc.abstractmethod
    def init_states(self, *, batch_size: int, max_len: int) -> dict[str, Any]:
        """The state before the first token; see `MultiheadAttention.init_states`."""

    @abc.abstractmethod
    def extend_step(
        self,
        cached_states: dict[str, Any],
        data: Float[Array, "batch step input_dim"],
        *,
        live_step_len: Optional[Int[Array, "batch"]] = None,
    ) -> tuple[dict[str, Any], TransformerOutput]:
        """Continues each sequence where it is.

        Args:
            cached_states: From `init_states` or an earlier call.
            data: The hidden states of the next `step` tokens.
            live_step_len: How many of them are real, for each sequence; outputs of the others mean nothing.
                None: all.

        Returns:
            The new state, and the outputs for the new tokens.
        """


class TransformerLayer(BaseTransformerLayer):
    """A self-attention block, then a feed-forward block."""

    @config_class
    class Config(BaseTransformerLayer.Config):
        """Configures `TransformerLayer`."""

        # The blocks.
        self_attention: BaseLayer.Config = TransformerAttentionLayer.default_config()
        feed_forward: BaseLayer.Config = TransformerFeedForwardLayer.default_config()

    def __init__(self, cfg: Config, *, parent: Optional[BaseLayer]):
        super().__init__(cfg, parent=parent)
        self._add_child(
            "self_attention", cfg.self_attention.clone(target_dim=cfg.input_dim, source_dim=cfg.input_dim)
        )
        self._add_child("feed_forward", cfg.feed_forward.clone(input_dim=cfg.input_dim))

    def forward(
        self,
        data: Float[Array, "batch seq input_dim"],
        *,
        attention_logit_biases: Optional[LogitBiases] = None,
        segment_ids: Optional[Int[Array, "batch seq"]] = None,
        positions: Optional[Int[Array, "#batch seq"]] = None,
    ) -> TransformerOutput:
        """See `BaseTransformerLayer.forward`."""
        attention_output = self.self_attention(
            data,
            attention_logit_biases=attention_logit_biases,
            segment_ids=segment_ids,
            positions=positions,
        )
        return TransformerOutput(data=self.feed_forward(attention_output.data))

    def init_states(self, *, batch_size: int, max_len: int) -> dict[str, Any]:
        """See `BaseTransformerLayer.init_states`."""
        shape = {"batch_size": batch_size, "max_len": max_len}
        return {
            "self_attention": self.self_attention.init_states(**shape),
            "feed_forward": self.feed_forward.init_states(**shape),
        }

    def extend_step(
        self,
        cached_states: dict[str, Any],
        data: Float[Array, "batch step input_dim"],
        *,
        live_step_len: Optional[Int[Array, "batch"]] = None,
    ) -> tuple[dict[str, Any], TransformerOutput]:
        """See `BaseTransformerLayer.extend_step`."""
        attention_states, attention_output = self.self_attention.extend_step(
            cached_states["self_attention"], data, live_step_len=live_step_len
        )
        feed_forward_states, outputs = self.feed_forward.extend_step(
            cached_states["feed_forward"], attention_output.data, live_step_len=live_step_len
        )
        states = {"self_attention": attention_states, "feed_forward": feed_forward_states}
        return states, TransformerOutput(data=outputs)
