"""The projection to queries, keys and values with rotary positions."""

from typing import Optional

from axlearn.common.attention._position import (
    RoFormerSinusoidalPositionalEmbedding,
    apply_rotary_position_embeddings,
)
from axlearn.common.attention._qkv import (
    BaseQKVLinear,
    Hidden,
    Positions,
    QKVLinear,
    QKVOutput,
    Source,
    default_positions,
)
from axlearn.common.base_layer import BaseLayer
from axlearn.common.config import REQUIRED, Required, config_class


class RoFormerQKVLinear(BaseQKVLinear):
    """Projects by another layer, then rotates queries and keys by their positions. For self-attention.

    Reference: Su et al., RoFormer, https://arxiv.org/abs/2104.09864, equation 16.
    """

    @config_class
    class Config(BaseQKVLinear.Config):
        """Configures `RoFormerQKVLinear`."""

        # The sines and cosines.
        rope_pos_emb_layer: BaseLayer.Config = RoFormerSinusoidalPositionalEmbedding.default_config()
        # The projection.
        input_linear: BaseLayer.Config = QKVLinear.default_config()
        # Whether to rotate values too.
        rotary_value: Required[bool] = REQUIRED

    def __init__(self, cfg: Config, *, parent: Optional[BaseLayer]):
        super().__init__(cfg, parent=parent)
        self._add_child("rope_pos_emb_layer", cfg.rope_pos_emb_layer.clone(dim=cfg.per_head_dim))
        input_linear = cfg.input_linear.clone(
            query_dim=cfg.query_dim,
            key_dim=cfg.key_dim,
            value_dim=cfg.value_dim,
            num_heads=cfg.num_heads,
            per_head_dim=cfg.per_head_dim,
        )
        self._add_child("i_proj", input_linear)

    @property
    def num_kv_heads(self) -> int:
        """See `BaseQKVLinear.num_kv_heads`."""
        return self.i_proj.num_kv_heads

    def forward(
        self,
        query: Hidden,
        *,
        key: Optional[Source] = None,
        value: Optional[Source] = None,
        query_positions: Optional[Positions] = None,
    ) -> QKVOutput:
        """See `BaseQKVLinear.forward`; `key` and `value` must be None."""
        self._check_self_attention(key, value)
        if query_positions is None:
            query_positions = default_positions(query)
        proj = self.i_proj(query)
        return QKVOutput(
            *apply_rotary_position_embeddings(
                query=proj.query,
                key=proj.key,
                value=proj.value,
                sinusoidal_pos=self.rope_pos_emb_layer(query_positions),
                rotary_value=self.config.rotary_value,
            )
        )
