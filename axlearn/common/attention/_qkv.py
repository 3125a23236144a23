"""Projections of hidden states to queries, keys and values."""

import abc
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Optional

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from axlearn.common.attention._linear import MultiheadInputLinear
from axlearn.common.base_layer import BaseLayer, NestedParameterSpec
from axlearn.common.config import REQUIRED, Required, config_class, error_message
from axlearn.common.layers import align_right, gather_weight
from axlearn.common.module import nowrap
from axlearn.common.repeat import (
    apply_noise_to_stacked_parameters,
    create_stacked_parameter_specs,
    initialize_stacked_parameters,
)
from axlearn.common.utils import VDict, maybe_shard

Hidden = Float[Array, "batch target query_dim"]
Source = Float[Array, "batch source source_dim"]
Positions = Int[Array, "#batch target"]


class QKVOutput(NamedTuple):
    """Projections.

    Attributes:
        query: `[batch, target, num_heads, per_head_dim]`.
        key: `[batch, source, num_kv_heads, per_head_dim]`.
        value: `[batch, source, num_kv_heads, per_head_dim]`.
    """

    query: Array
    key: Array
    value: Array


class BaseQKVLinear(BaseLayer):
    """Projects hidden states to queries, keys and values."""

    Output = QKVOutput

    @config_class
    class Config(BaseLayer.Config):
        """Configures `BaseQKVLinear`."""

        # Size of the last dim of what queries, keys and values are made from.
        query_dim: Required[int] = REQUIRED
        key_dim: Required[int] = REQUIRED
        value_dim: Required[int] = REQUIRED
        # Number of query heads.
        num_heads: Required[int] = REQUIRED
        # Size of a head.
        per_head_dim: Required[int] = REQUIRED

    @property
    def num_kv_heads(self) -> int:
        """Number of key heads, and of value heads."""
        return self.config.num_heads

    @abc.abstractmethod
    def forward(
        self,
        query: Hidden,
        *,
        key: Optional[Source] = None,
        value: Optional[Source] = None,
        query_positions: Optional[Positions] = None,
    ) -> QKVOutput:
        """Projects.

        Args:
            query: What queries are made from.
            key: What keys are made from. None: `query`.
            value: What values are made from. None: `query`.
            query_positions: The position of each query in its text, for projections that depend on it. None:
                0, 1, 2, ...

        Returns:
            Queries, keys and values.
        """

    def _check_self_attention(self, *sources: Optional[Array]) -> None:
        if any(source is not None for source in sources):
            raise ValueError(
                error_message(
                    where=self.path(),
                    what="key or value given",
                    expected=f"neither: {type(self).__name__} makes all three from query",
                    advice="use QKVLinear or GroupedQKVLinear for cross-attention",
                )
            )


class QKVLinear(BaseQKVLinear):
    """Three separate projections."""

    @config_class
    class Config(BaseQKVLinear.Config):
        """Configures `QKVLinear`."""

        # The projections.
        layer: BaseLayer.Config = MultiheadInputLinear.default_config()

    def __init__(self, cfg: Config, *, parent: Optional[BaseLayer]):
        super().__init__(cfg, parent=parent)
        for name, model_dim, num_heads in (
            ("q_proj", cfg.query_dim, cfg.num_heads),
            ("k_proj", cfg.key_dim, self.num_kv_heads),
            ("v_proj", cfg.value_dim, self.num_kv_heads),
        ):
            layer = cfg.layer.clone(model_dim=model_dim, num_heads=num_heads, per_head_dim=cfg.per_head_dim)
            self._add_child(name, layer)

    def forward(
        self,
        query: Hidden,
        *,
        key: Optional[Source] = None,
        value: Optional[Source] = None,
        query_positions: Optional[Positions] = None,
    ) -> QKVOutput:
        """See `BaseQKVLinear.forward`."""
        return QKVOutput(
            query=self.q_proj(query),
            key=self.k_proj(query if key is None else key),
            value=self.v_proj(query if value is None else value),
        )


class GroupedQKVLinear(QKVLinear):
    """Three separate projections, with fewer key and value heads than query heads.

    Reference: Ainslie et al., GQA, https://arxiv.org/abs/2305.13245, section 2.2.
    """

    @config_class
    class Config(QKVLinear.Config):
        """Configures `GroupedQKVLinear`."""

        # Number of key heads, and of value heads; divides num_heads.
        num_kv_heads: Required[int] = REQUIRED

    @property
    def num_kv_heads(self) -> int:
        """See `BaseQKVLinear.num_kv_heads`."""
        return self.config.num_kv_heads


class FusedGroupedQKVLinear(BaseQKVLinear):
    """One projection whose heads are all query heads, then all key heads, then all value heads."""

    @config_class
    class Config(BaseQKVLinear.Config):
        """Configures `FusedGroupedQKVLinear`."""

        # Number of key heads, and of value heads; divides num_heads.
        num_kv_heads: Required[int] = REQUIRED
        # The projection.
        layer: BaseLayer.Config = MultiheadInputLinear.default_config()

    def __init__(self, cfg: Config, *, parent: Optional[BaseLayer]):
        super().__init__(cfg, parent=parent)
        _check_equal_dims(self)
        layer = cfg.layer.clone(
            model_dim=cfg.query_dim,
            num_heads=cfg.num_heads + 2 * cfg.num_kv_heads,
            per_head_dim=cfg.per_head_dim,
        )
        self._add_child("qkv_proj", layer)

    @property
    def num_kv_heads(self) -> int:
        """See `BaseQKVLinear.num_kv_heads`."""
        return self.config.num_kv_heads

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
        cfg: FusedGroupedQKVLinear.Config = self.config
        heads = self.qkv_proj(query)
        parts = jnp.split(heads, [cfg.num_heads, cfg.num_heads + cfg.num_kv_heads], axis=2)
        return QKVOutput(*(_split_over_heads(part, cfg.layer.param_partition_spec) for part in parts))


class FusedQKVLinear(BaseQKVLinear):
    """Three projections of equal shape with stacked parameters `[3, model_dim, num_heads, per_head_dim]`.

    Entries 0, 1, 2 of the stack make queries, keys, values.
    """

    @config_class
    class Config(BaseQKVLinear.Config):
        """Configures `FusedQKVLinear`."""

        # One of the projections.
        layer: BaseLayer.Config = MultiheadInputLinear.default_config()

    def __init__(self, cfg: Config, *, parent: Optional[BaseLayer]):
        super().__init__(cfg, parent=parent)
        _check_equal_dims(self)
        layer = cfg.layer.clone(
            model_dim=cfg.query_dim, num_heads=cfg.num_heads, per_head_dim=cfg.per_head_dim
        )
        self._add_child("qkv_proj", layer)

    @nowrap
    def create_parameter_specs_recursively(self) -> NestedParameterSpec:
        """See `BaseLayer.create_parameter_specs_recursively`."""
        specs: Any = create_stacked_parameter_specs(self.qkv_proj, num_layers=3)
        return {"qkv_proj": VDict(specs)}

    @nowrap
    def initialize_parameters_recursively(
        self, prng_key: jax.Array, *, prebuilt: Optional[Mapping[str, Any]] = None
    ) -> dict[str, Any]:
        """See `BaseLayer.initialize_parameters_recursively`."""
        _, child_key = jax.random.split(prng_key)
        params = initialize_stacked_parameters(
            self.qkv_proj, child_key, num_layers=3, prebuilt=(prebuilt or {}).get("qkv_proj")
        )
        return {"qkv_proj": VDict(params)}

    @nowrap
    def apply_parameter_noise_recursively(
        self, prng_key: jax.Array, params: Mapping[str, Any]
    ) -> dict[str, Any]:
        """See `BaseLayer.apply_parameter_noise_recursively`."""
        noisy = apply_noise_to_stacked_parameters(
            self.qkv_proj, prng_key, dict(params["qkv_proj"]), num_layers=3
        )
        return {"qkv_proj": VDict(noisy)}

    def forward(
        self,
        query: Hidden,
        *,
        key: Optional[Source] = None,
        value: Optional[Source] = None,
        query_positions: Optional[Positions] = None,
    ) -> QKVOutput:
        """See `BaseQKVLinear.forward`."""
        params = self.parameters["qkv_proj"]
        layer_cfg: Any = self.config.layer
        weight_spec = layer_cfg.param_partition_spec
        weight = gather_weight(
            params["weight"], None if weight_spec is None else (None, *weight_spec), dims=[1]
        )
        if getattr(layer_cfg, "quantized_dot_general", None) is not None:
            projections = self._quantized_projections((query, key, value), weight, params)
        elif key is None and value is None:
            stacked = jnp.einsum("btd,pdnh->pbtnh", query, weight)
            projections = [stacked[i] for i in range(3)]
        else:
            sources = (query, query if key is None else key, query if value is None else value)
            projections = [jnp.einsum("btd,dnh->btnh", x, weight[i]) for i, x in enumerate(sources)]
        if "bias" in params:
            projections = [p + align_right(params["bias"][i], p) for i, p in enumerate(projections)]
        return QKVOutput(*(maybe_shard(p, layer_cfg.output_partition_spec) for p in projections))

    def _quantized_projections(
        self, sources: tuple[Hidden, Optional[Source], Optional[Source]], weight: jax.Array, params: Any
    ) -> list[jax.Array]:
        """The three products in few bits: as one, whose parts share scales, where all sources are the same."""
        query, key, value = sources
        multiply = self.qkv_proj.quantized_dot_general.multiply
        params = dict(params.get("quantized_dot_general", {}))
        if key is None and value is None:
            stacked = multiply("btd,pdnh->btpnh", activation=query, kernel=weight, params=params)
            return [stacked[:, :, i] for i in range(3)]
        return [
            multiply(
                "btd,dnh->btnh",
                activation=query if x is None else x,
                kernel=weight[i],
                params=jax.tree.map(lambda p, i=i: p[i], params),
            )
            for i, x in enumerate(sources)
        ]


def _split_over_heads(heads: jax.Array, weight_spec: Optional[Sequence[Any]]) -> jax.Array:
    """Says where the heads of one part of a fused projection lie, of which the parts share the devices.

    The fused heads are split evenly, so that the boundary between queries and keys falls anywhere between or
    within devices. Left to itself, XLA's partitioner multiplies such parts wrongly on some meshes, without any
    error: with jax 0.10.2, (seq=2, model=4), 4 query heads and 2 key heads, the gradient of the weight was off
    by O(1) (seen 2026-11-21, `scripts/xla_fused_heads_repro.py`).

    Args:
        heads: `[batch, seq, heads, per_head_dim]`.
        weight_spec: How the weight `[model_dim, heads, per_head_dim]` lies on the mesh; None: it is whole.

    Returns:
        `heads`, split over the axes of the weight's heads as far as their number divides.
    """
    if weight_spec is None:
        return heads
    free = PartitionSpec.UNCONSTRAINED
    return maybe_shard(heads, (free, free, weight_spec[-2], free))


def _check_equal_dims(layer: BaseQKVLinear) -> None:
    cfg = layer.config
    dims = (cfg.query_dim, cfg.key_dim, cfg.value_dim)
    if len(set(dims)) != 1:
        raise ValueError(
            error_message(
                where=layer.path(),
                what=f"query_dim, key_dim, value_dim = {dims}",
                expected="three equal sizes, for a fused projection",
                advice="use QKVLinear or GroupedQKVLinear",
            )
        )


def default_positions(x: jax.Array) -> jax.Array:
    """The positions 0, 1, 2, ... of `x` [batch, seq, ...] as [1, seq] int32."""
    return jnp.arange(x.shape[1], dtype=jnp.int32)[None]
