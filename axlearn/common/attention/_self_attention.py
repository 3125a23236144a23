"""The attention block of a transformer layer."""

from typing import Any, Optional

from jaxtyping import Array, Float, Int

from axlearn.common.attention._multihead import AttentionOutput, LogitBiases, MultiheadAttention
from axlearn.common.attention._structure import BaseResidualLayer
from axlearn.common.base_layer import BaseLayer
from axlearn.common.config import REQUIRED, Required, config_class


class TransformerAttentionLayer(BaseResidualLayer):
    """Attention with its norm and residual connection."""

    Output = AttentionOutput

    @config_class
    class Config(BaseResidualLayer.Config):
        """Configures `TransformerAttentionLayer`."""

        # Size of the last dim of the targets, and of the outputs.
        target_dim: Required[int] = REQUIRED
        # Size of the last dim of the sources.
        source_dim: Required[int] = REQUIRED
        # The attention.
        attention: BaseLayer.Config = MultiheadAttention.default_config()

    def __init__(self, cfg: Config, *, parent: Optional[BaseLayer]):
        super().__init__(cfg, parent=parent)
        self._add_norms(cfg.target_dim)
        attention = cfg.attention.clone(
            query_dim=cfg.target_dim,
            key_dim=cfg.source_dim,
            value_dim=cfg.source_dim,
            output_dim=cfg.target_dim,
        )
        self._add_child("attention", attention)
        self._add_child("dropout", cfg.dropout)
        self._add_child("stochastic_depth", cfg.stochastic_depth)

    def forward(
        self,
        target: Float[Array, "batch target target_dim"],
        *,
        source: Optional[Float[Array, "batch source source_dim"]] = None,
        attention_logit_biases: Optional[LogitBiases] = None,
        segment_ids: Optional[Int[Array, "batch target"]] = None,
        positions: Optional[Int[Array, "#batch target"]] = None,
        return_aux: Optional[set[str]] = None,
    ) -> AttentionOutput:
        """Applies the block to whole sequences.

        Args:
            target: What queries are made from, and what the outputs are added to.
            source: What keys and values are made from, not normalised here. None: the normalised `target`
                (self-attention).
            attention_logit_biases: See `MultiheadAttention.forward`.
            segment_ids: See `MultiheadAttention.forward`.
            positions: Positions of the targets in their text. None: 0, 1, 2, ...
            return_aux: Which of "probs" and "kv_state" to return. None: neither.

        Returns:
            The outputs.
        """

        def attend(x: Array) -> tuple[Array, AttentionOutput]:
            output = self.attention(
                x,
                key=source,
                value=source,
                attention_logit_biases=attention_logit_biases,
                segment_ids=segment_ids,
                query_positions=positions,
                return_aux=return_aux,
            )
            return self.dropout(output.data), output

        data, output = self._apply_structure(target, attend)
        return output._replace(data=data)

    def init_states(self, *, batch_size: int, max_len: int) -> dict[str, Any]:
        """See `MultiheadAttention.init_states`."""
        return {"attention": self.attention.init_states(batch_size=batch_size, max_len=max_len)}

    def extend_step(
        self,
        cached_states: dict[str, Any],
        target: Float[Array, "batch step target_dim"],
        *,
        live_step_len: Optional[Int[Array, "batch"]] = None,
        return_aux: Optional[set[str]] = None,
    ) -> tuple[dict[str, Any], AttentionOutput]:
        """See `MultiheadAttention.extend_step`."""

        def attend(x: Array) -> tuple[Array, Any]:
            states, output = self.attention.extend_step(
                cached_states["attention"], x, live_step_len=live_step_len, return_aux=return_aux
            )
            return self.dropout(output.data), (states, output)

        data, (attention_states, output) = self._apply_structure(target, attend)
        return {"attention": attention_states}, output._replace(data=data)
