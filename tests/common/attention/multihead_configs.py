"""One small config for every kind of attention, for the laws that all of them keep."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from axlearn.common.attention import (
    GroupedQKVLinear,
    GroupedQueryAttention,
    MultiheadAttention,
    QKVLinear,
    RoFormerQKVLinear,
    SigmoidAttention,
    enable_sliding_window_attention,
)
from axlearn.common.attention_bias import SlidingWindowAttentionBias, alibi_attention_bias
from axlearn.common.config import config_for_function
from axlearn.common.flash_attention.layer import FlashAttention
from axlearn.common.layers import RMSNorm
from axlearn.common.module import functional
from axlearn.common.utils import flatten_items
from tests.common.attention.layer_configs import DIM, NUM_HEADS, NUM_KV_HEADS, random_params

BATCH_AXES = ("data", "fsdp")
WINDOW = 2


def _attention(cls: type = GroupedQueryAttention, *, rope: bool = False, qk_norm: bool = False, **kwargs):
    """An attention whose weights and activations are split over the axes data, fsdp, seq and model."""
    input_linear: Any = QKVLinear.default_config()
    if cls is not MultiheadAttention:
        input_linear = GroupedQKVLinear.default_config().set(num_kv_heads=NUM_KV_HEADS)
    input_linear.layer.set(
        param_partition_spec=("fsdp", "model", None),
        output_partition_spec=(BATCH_AXES, "seq", "model", None),
    )
    if rope:
        input_linear = RoFormerQKVLinear.default_config().set(rotary_value=False, input_linear=input_linear)
    cfg = cls.default_config().set(
        name="attention",
        query_dim=DIM,
        key_dim=DIM,
        value_dim=DIM,
        num_heads=NUM_HEADS,
        input_linear=input_linear,
    )
    cfg.output_linear.set(
        param_partition_spec=("fsdp", "model", None), output_partition_spec=(BATCH_AXES, "seq", "model")
    )
    if qk_norm:
        cfg.query_scale.norm = RMSNorm.default_config()
        cfg.key_scale.norm = RMSNorm.default_config()
    return cfg.set(**kwargs)


def _windowed(cfg: MultiheadAttention.Config) -> MultiheadAttention.Config:
    """Looks back over a window, and keeps no more than that."""
    cfg = enable_sliding_window_attention(cfg, WINDOW)
    cfg.kv_cache.kv_partition_spec = (BATCH_AXES, None, "model", None)
    return cfg


_HEADS_SPEC = PartitionSpec(BATCH_AXES, None, ("seq", "model"), None)
_FLASH_SPECS = {
    "mha_dim_to_partition_spec": {"btnh": _HEADS_SPEC, "bsnh": _HEADS_SPEC},
    "output_dim_to_partition_spec": {"btnh": PartitionSpec(BATCH_AXES, "seq", "model", None)},
}
_ALIBI = config_for_function(alibi_attention_bias)
_WINDOW_MASK = SlidingWindowAttentionBias.default_config(sliding_window_size=WINDOW)
_EVERYTHING = {
    "rope": True,
    "qk_norm": True,
    "logit_sink": True,
    "atten_logit_cap": 2.0,
    "logit_bias": _ALIBI,
}

# Neither sees the future.
CAUSAL = {
    "mha": _attention(MultiheadAttention, causal=True),
    "gqa": _attention(causal=True),
    "mha-sink": _attention(MultiheadAttention, causal=True, logit_sink=True),
    "gqa-cap": _attention(causal=True, atten_logit_cap=2.0),
    "gqa-alibi": _attention(causal=True, logit_bias=_ALIBI),
    "gqa-rope-qk_norm": _attention(causal=True, rope=True, qk_norm=True),
    "gqa-sliding": _attention(mask=_WINDOW_MASK),
    "gqa-sliding-ring": _windowed(_attention()),
    "mha-sink-ring": _windowed(_attention(MultiheadAttention, logit_sink=True)),
    "gqa-everything": _attention(causal=True, **_EVERYTHING),
    "gqa-everything-ring": _windowed(_attention(**_EVERYTHING)),
    "flash": _attention(FlashAttention, causal=True, **_FLASH_SPECS),
    "flash-everything-ring": _windowed(_attention(FlashAttention, **_EVERYTHING, **_FLASH_SPECS)),
    "sigmoid": _attention(SigmoidAttention, causal=True, seq_len=8),
    "sigmoid-alibi-ring": _windowed(_attention(SigmoidAttention, logit_bias=_ALIBI, seq_len=8)),
}
# See everything, and do not know in which order it is.
BIDIRECTIONAL = {
    "mha-full": _attention(MultiheadAttention),
    "gqa-full-sink-cap-qk_norm": _attention(qk_norm=True, logit_sink=True, atten_logit_cap=2.0),
    "sigmoid-full": _attention(SigmoidAttention, seq_len=8),
}
ALL = {
    **CAUSAL,
    **BIDIRECTIONAL,
    "mha-symmetric-alibi": _attention(MultiheadAttention, logit_bias=_ALIBI.clone(symmetric=True)),
}


@dataclasses.dataclass
class Case:
    """An attention, its parameters, and its methods, compiled once."""

    layer: MultiheadAttention
    params: Any
    num_traces: int = 0

    def __post_init__(self):
        self._forward = jax.jit(self._trace_forward)
        self._extend = jax.jit(self._trace_extend)

    def _trace_forward(self, params, inputs):
        self.num_traces += 1
        return functional(self.layer, None, params, inputs, is_training=False)[0].data

    def _trace_extend(self, params, inputs):
        self.num_traces += 1
        states, output = functional(
            self.layer, None, params, inputs, method="extend_step", is_training=False
        )[0]
        return states, output.data

    def forward(self, x, *, segment_ids=None, positions=None, params=None) -> jax.Array:
        """Always with segments and positions, so that one compiled program serves all laws."""
        segment_ids = np.ones(x.shape[:2]) if segment_ids is None else segment_ids
        positions = np.arange(x.shape[1])[None].repeat(len(x), 0) if positions is None else positions
        inputs = {
            "query": jnp.asarray(x),
            "segment_ids": jnp.asarray(segment_ids, jnp.int32),
            "query_positions": jnp.asarray(positions, jnp.int32),
        }
        return self._forward(self.params if params is None else params, inputs)

    def extend(self, states, x, live, *, params=None):
        inputs = {
            "cached_states": states,
            "query": jnp.asarray(x),
            "live_step_len": jnp.asarray(live, jnp.int32),
        }
        return self._extend(self.params if params is None else params, inputs)

    def permute_heads(self, order: np.ndarray) -> Any:
        """The parameters with key heads in another order, each with the query heads that share it."""
        group = self.layer.config.num_heads // self.layer.num_kv_heads
        query_order = (order[:, None] * group + np.arange(group)).ravel()

        def permute(path: str, value):
            if path == "sink":
                return value[query_order]
            heads = {"q_proj": query_order, "k_proj": order, "v_proj": order}
            for name, head_order in heads.items():
                if name in path:
                    return value[..., head_order, :]
            return value[:, query_order] if path == "o_proj/weight" else value

        leaves = [permute(path, value) for path, value in flatten_items(self.params)]
        return jax.tree.unflatten(jax.tree.structure(self.params), leaves)


def build(cfg: MultiheadAttention.Config) -> Case:
    layer = cfg.instantiate(parent=None)
    return Case(layer, random_params(layer))
