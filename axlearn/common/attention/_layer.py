"""A transformer layer, and what every stack of them offers."""

import abc
from typing import Any, NamedTuple, NoReturn, Optional

from jaxtyping import Array, Float, Int

from axlearn.common.attention._feed_forward import TransformerFeedForwardLayer
from axlearn.common.attention._multihead import LogitBiases
from axlearn.common.attention._self_attention import TransformerAttentionLayer
from axlearn.common.base_layer import BaseLayer
from axlearn.common.config import REQUIRED, Required, config_class, error_message

CrossData = Float[Array, "batch source source_dim"]


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
        cross_attention_data: Optional[CrossData] = None,
        cross_attention_logit_biases: Optional[LogitBiases] = None,
    ) -> TransformerOutput:
        """Applies the layer to whole sequences.

        Args:
            data: Hidden states.
            attention_logit_biases: Added to the logits of self-attention; a bias, or an array of rank 2 to 4
                that broadcasts against `[batch, heads, seq, seq]`. None: nothing.
            segment_ids: Tokens attend only within their segment. None: one segment.
            positions: Positions in the text, for position embeddings. None: 0, 1, 2, ...
            cross_attention_data: What cross-attention makes its keys and values from; for layers that have
                it, and only for those.
            cross_attention_logit_biases: Added to the logits of cross-attention, such as a mask of the source's
                padding, as `attention_logit_biases` to those of self-attention. None: nothing.

        Returns:
            The outputs.

        Raises:
            ValueError: If `cross_attention_data` is missing, or given for a layer without cross-attention.
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
        cross_attention_data: Optional[CrossData] = None,
        cross_attention_logit_biases: Optional[LogitBiases] = None,
    ) -> tuple[dict[str, Any], TransformerOutput]:
        """Continues each sequence where it is.

        Args:
            cached_states: From `init_states` or an earlier call.
            data: The hidden states of the next `step` tokens.
            live_step_len: How many of them are real, for each sequence; outputs of the others mean nothing.
                None: all.
            cross_attention_data: As in `forward`, the same in every step: keys and values are made from it
                anew each time.
            cross_attention_logit_biases: As in `forward`, for the new tokens.

        Returns:
            The new state, and the outputs for the new tokens.
        """


class TransformerLayer(BaseTransformerLayer):
    """A self-attention block, where configured a cross-attention block, then a feed-forward block."""

    @config_class
    class Config(BaseTransformerLayer.Config):
        """Configures `TransformerLayer`."""

        # The blocks.
        self_attention: BaseLayer.Config = TransformerAttentionLayer.default_config()
        feed_forward: BaseLayer.Config = TransformerFeedForwardLayer.default_config()
        # The block that attends to `cross_attention_data`; its source_dim is to be set. None: there is none.
        cross_attention: Optional[BaseLayer.Config] = None

    def __init__(self, cfg: Config, *, parent: Optional[BaseLayer]):
        super().__init__(cfg, parent=parent)
        self._add_child(
            "self_attention", cfg.self_attention.clone(target_dim=cfg.input_dim, source_dim=cfg.input_dim)
        )
        if cfg.cross_attention is not None:
            self._add_child("cross_attention", cfg.cross_attention.clone(target_dim=cfg.input_dim))
        self._add_child("feed_forward", cfg.feed_forward.clone(input_dim=cfg.input_dim))

    def forward(
        self,
        data: Float[Array, "batch seq input_dim"],
        *,
        attention_logit_biases: Optional[LogitBiases] = None,
        segment_ids: Optional[Int[Array, "batch seq"]] = None,
        positions: Optional[Int[Array, "#batch seq"]] = None,
        cross_attention_data: Optional[CrossData] = None,
        cross_attention_logit_biases: Optional[LogitBiases] = None,
    ) -> TransformerOutput:
        """See `BaseTransformerLayer.forward`."""
        data = self.self_attention(
            data,
            attention_logit_biases=attention_logit_biases,
            segment_ids=segment_ids,
            positions=positions,
        ).data
        data = self._attend_across(data, cross_attention_data, cross_attention_logit_biases)
        return TransformerOutput(data=self.feed_forward(data))

    def _attend_across(
        self, data: Array, source: Optional[Array], logit_biases: Optional[LogitBiases]
    ) -> Array:
        """Applies the cross-attention block, where there is one."""
        has_block = "cross_attention" in self.children
        if has_block != (source is not None):
            raise_for_cross_attention(self, has_block=has_block)
        if not has_block:
            return data
        return self.cross_attention(data, source=source, attention_logit_biases=logit_biases).data

    def init_states(self, *, batch_size: int, max_len: int) -> dict[str, Any]:
        """See `BaseTransformerLayer.init_states`.

        Raises:
            ValueError: If cross-attention depends on time indices: in steps it is not told those of its queries.
        """
        if "cross_attention" in self.children and self.cross_attention.attention.knows_time:
            raise ValueError(
                error_message(
                    where=self.cross_attention.attention.path(),
                    what="incremental decoding with causal, mask or logit_bias in cross-attention",
                    expected="none of them: they compare indices of two sequences",
                    advice="pass cross_attention_logit_biases",
                )
            )
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
        cross_attention_data: Optional[CrossData] = None,
        cross_attention_logit_biases: Optional[LogitBiases] = None,
    ) -> tuple[dict[str, Any], TransformerOutput]:
        """See `BaseTransformerLayer.extend_step`."""
        attention_states, attention_output = self.self_attention.extend_step(
            cached_states["self_attention"], data, live_step_len=live_step_len
        )
        data = self._attend_across(attention_output.data, cross_attention_data, cross_attention_logit_biases)
        feed_forward_states, outputs = self.feed_forward.extend_step(
            cached_states["feed_forward"], data, live_step_len=live_step_len
        )
        states = {"self_attention": attention_states, "feed_forward": feed_forward_states}
        return states, TransformerOutput(data=outputs)


def raise_for_cross_attention(layer: BaseLayer, *, has_block: bool) -> NoReturn:
    """Raises the ValueError for a layer whose cross-attention and its data do not go together."""
    raise ValueError(
        error_message(
            where=layer.path(),
            what=f"cross_attention_data {'missing' if has_block else 'given'}",
            expected="cross_attention_data where cross_attention is configured, and only there",
        )
    )
