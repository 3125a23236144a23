"""The projection to queries, keys and values with rotary positions."""

from typing import Any, Optional

import jax.numpy as jnp

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
from axlearn.common.attention._scale import BaseScaleQK
from axlearn.common.base_layer import BaseLayer
from axlearn.common.config import REQUIRED, Required, config_class, error_message


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
        # Normalises and scales queries, and keys, before the rotation, such as
        # `ScaleKey.default_config().set(norm=RMSNorm.default_config())`. A factor given here comes on top of
        # that of the attention's own `query_scale` and `key_scale`, which act after the rotation. None:
        # nothing.
        query_scale: Optional[BaseScaleQK.Config] = None
        key_scale: Optional[BaseScaleQK.Config] = None
        # The fraction of each head's dims that is rotated, in (0, 1]: the first ones; the others stay as they
        # are. None: 1.
        partial_rope_factor: Optional[float] = None

    def __init__(self, cfg: Config, *, parent: Optional[BaseLayer]):
        super().__init__(cfg, parent=parent)
        self._rotary_dim = self._compute_rotary_dim()
        self._add_child("rope_pos_emb_layer", cfg.rope_pos_emb_layer.clone(dim=self._rotary_dim))
        input_linear = cfg.input_linear.clone(
            query_dim=cfg.query_dim,
            key_dim=cfg.key_dim,
            value_dim=cfg.value_dim,
            num_heads=cfg.num_heads,
            per_head_dim=cfg.per_head_dim,
        )
        self._add_child("i_proj", input_linear)
        for name, scale_cfg in (("scale_query", cfg.query_scale), ("scale_key", cfg.key_scale)):
            if scale_cfg is not None:
                self._add_child(name, scale_cfg.clone(per_head_dim=cfg.per_head_dim))

    def _compute_rotary_dim(self) -> int:
        cfg: RoFormerQKVLinear.Config = self.config
        if cfg.partial_rope_factor is None:
            return cfg.per_head_dim
        dim = cfg.partial_rope_factor * cfg.per_head_dim
        rotary_dim = round(dim)
        # Decimal fractions such as 0.4 are not exact: 1e-6 is far above their rounding, far below a dim.
        if not 0 < cfg.partial_rope_factor <= 1 or abs(dim - rotary_dim) > 1e-6 or rotary_dim % 2:
            raise ValueError(
                error_message(
                    where=self.path(),
                    what=f"partial_rope_factor={cfg.partial_rope_factor}",
                    expected="a fraction in (0, 1] of which the product with "
                    f"per_head_dim={cfg.per_head_dim} is an even number",
                )
            )
        return rotary_dim

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
        proj: Any = self.i_proj(query)
        if "scale_query" in self.children:
            proj = proj._replace(query=self.scale_query(proj.query))
        if "scale_key" in self.children:
            proj = proj._replace(key=self.scale_key(proj.key))
        dim = self._rotary_dim
        rotated = apply_rotary_position_embeddings(
            query=proj.query[..., :dim],
            key=proj.key[..., :dim],
            value=proj.value[..., :dim],
            sinusoidal_pos=self.rope_pos_emb_layer(query_positions),
            rotary_value=self.config.rotary_value,
        )
        if dim == self.config.per_head_dim:
            return QKVOutput(*rotated)
        return QKVOutput(
            *(jnp.concatenate([r, p[..., dim:]], axis=-1) for r, p in zip(rotated, proj, strict=True))
        )
