"""A transformer layer whose blocks run side by side."""

from typing import Any, Optional

from jaxtyping import Array, Float, Int

from axlearn.common.attention._feed_forward import TransformerFeedForwardLayer
from axlearn.common.attention._layer import (
    BaseTransformerLayer,
    CrossData,
    TransformerOutput,
    raise_for_cross_attention,
)
from axlearn.common.attention._multihead import LogitBiases
from axlearn.common.attention._self_attention import TransformerAttentionLayer
from axlearn.common.base_layer import BaseLayer
from axlearn.common.config import config_class, error_message
from axlearn.common.layers import LayerNorm


class ParallelTransformerLayer(BaseTransformerLayer):
    """Self-attention and feed-forward of the same normalised inputs: `y = norm(x); x + attention(y) + ffn(y)`.

    Reference: Wang and Komatsuzaki, GPT-J-6B (2021); Chowdhery et al., PaLM,
        https://arxiv.org/abs/2204.02311, section 2, "Parallel Layers".
    """

    @config_class
    class Config(BaseTransformerLayer.Config):
        """Configures `ParallelTransformerLayer`."""

        # The norm that both blocks share.
        norm: BaseLayer.Config = LayerNorm.default_config()
        # The blocks; their structure is "nonorm".
        self_attention: BaseLayer.Config = TransformerAttentionLayer.default_config().set(structure="nonorm")
        feed_forward: BaseLayer.Config = TransformerFeedForwardLayer.default_config().set(structure="nonorm")

    def __init__(self, cfg: Config, *, parent: Optional[BaseLayer]):
        super().__init__(cfg, parent=parent)
        for name in ("self_attention", "feed_forward"):
            structure = getattr(cfg, name).structure
            if structure != "nonorm":
                raise ValueError(
                    error_message(
                        where=self.path(),
                        what=f"{name}.structure={structure!r}",
                        expected="'nonorm': norm and residual sum are the layer's",
                    )
                )
        self._add_child("norm", cfg.norm.clone(input_dim=cfg.input_dim))
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
        cross_attention_data: Optional[CrossData] = None,
        cross_attention_logit_biases: Optional[LogitBiases] = None,
    ) -> TransformerOutput:
        """See `BaseTransformerLayer.forward`; there is no cross-attention."""
        self._check_no_cross_attention(cross_attention_data)
        normed = self.norm(data)
        attended = self.self_attention(
            normed,
            attention_logit_biases=attention_logit_biases,
            segment_ids=segment_ids,
            positions=positions,
        ).data
        return TransformerOutput(data=data + attended + self.feed_forward(normed))

    def _check_no_cross_attention(self, source: Optional[Array]) -> None:
        if source is not None:
            raise_for_cross_attention(self, has_block=False)

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
        cross_attention_data: Optional[CrossData] = None,
        cross_attention_logit_biases: Optional[LogitBiases] = None,
    ) -> tuple[dict[str, Any], TransformerOutput]:
        """See `BaseTransformerLayer.extend_step`; there is no cross-attention."""
        self._check_no_cross_attention(cross_attention_data)
        normed = self.norm(data)
        attention_states, attended = self.self_attention.extend_step(
            cached_states["self_attention"], normed, live_step_len=live_step_len
        )
        feed_forward_states, outputs = self.feed_forward.extend_step(
            cached_states["feed_forward"], normed, live_step_len=live_step_len
        )
        states = {"self_attention": attention_states, "feed_forward": feed_forward_states}
        return states, TransformerOutput(data=data + attended.data + outputs)
