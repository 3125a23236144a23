"""Attention and transformer layers.

Shapes: hidden states `[batch, seq, dim]`; queries, keys and values `[batch, seq, heads, per_head_dim]`;
logits `[batch, heads, target, source]`.
"""

from axlearn.common.attention._absolute_position import (
    LearnedPositionalEmbedding as LearnedPositionalEmbedding,
)
from axlearn.common.attention._absolute_position import (
    SinusoidalPositionalEmbedding as SinusoidalPositionalEmbedding,
)
from axlearn.common.attention._feed_forward import TransformerFeedForwardLayer as TransformerFeedForwardLayer
from axlearn.common.attention._layer import BaseTransformerLayer as BaseTransformerLayer
from axlearn.common.attention._layer import TransformerLayer as TransformerLayer
from axlearn.common.attention._layer import TransformerOutput as TransformerOutput
from axlearn.common.attention._linear import BaseMultiheadLinear as BaseMultiheadLinear
from axlearn.common.attention._linear import MultiheadInputLinear as MultiheadInputLinear
from axlearn.common.attention._linear import MultiheadOutputLinear as MultiheadOutputLinear
from axlearn.common.attention._logit_bias_layers import (
    ALiBiAttentionLogitBiasLayer as ALiBiAttentionLogitBiasLayer,
)
from axlearn.common.attention._logit_bias_layers import (
    BaseAttentionLogitBiasLayer as BaseAttentionLogitBiasLayer,
)
from axlearn.common.attention._logit_bias_layers import (
    CausalAttentionLogitBiasLayer as CausalAttentionLogitBiasLayer,
)
from axlearn.common.attention._logit_bias_layers import (
    FullAttentionLogitBiasLayer as FullAttentionLogitBiasLayer,
)
from axlearn.common.attention._logit_bias_layers import PositionBiases as PositionBiases
from axlearn.common.attention._logit_bias_layers import (
    SymmetricALiBiAttentionLogitBiasLayer as SymmetricALiBiAttentionLogitBiasLayer,
)
from axlearn.common.attention._logit_bias_layers import set_position_biases as set_position_biases
from axlearn.common.attention._logits import attention_context as attention_context
from axlearn.common.attention._logits import attention_logits as attention_logits
from axlearn.common.attention._logits import attention_probs as attention_probs
from axlearn.common.attention._logits import biased_logits as biased_logits
from axlearn.common.attention._multihead import AttentionOutput as AttentionOutput
from axlearn.common.attention._multihead import LogitBiases as LogitBiases
from axlearn.common.attention._multihead import MultiheadAttention as MultiheadAttention
from axlearn.common.attention._parallel_layer import ParallelTransformerLayer as ParallelTransformerLayer
from axlearn.common.attention._partition import MeshAxes as MeshAxes
from axlearn.common.attention._partition import set_attention_partition_specs as set_attention_partition_specs
from axlearn.common.attention._partition import (
    set_double_shard_weights_config as set_double_shard_weights_config,
)
from axlearn.common.attention._partition import (
    set_feed_forward_partition_specs as set_feed_forward_partition_specs,
)
from axlearn.common.attention._pipeline import PipelinedTransformerLayer as PipelinedTransformerLayer
from axlearn.common.attention._pipeline import _TransformerPipeline as _TransformerPipeline
from axlearn.common.attention._position import (
    RoFormerSinusoidalPositionalEmbedding as RoFormerSinusoidalPositionalEmbedding,
)
from axlearn.common.attention._position import (
    apply_rotary_position_embeddings as apply_rotary_position_embeddings,
)
from axlearn.common.attention._position import rotate_pairs as rotate_pairs
from axlearn.common.attention._qkv import BaseQKVLinear as BaseQKVLinear
from axlearn.common.attention._qkv import FusedGroupedQKVLinear as FusedGroupedQKVLinear
from axlearn.common.attention._qkv import FusedQKVLinear as FusedQKVLinear
from axlearn.common.attention._qkv import GroupedQKVLinear as GroupedQKVLinear
from axlearn.common.attention._qkv import QKVLinear as QKVLinear
from axlearn.common.attention._qkv import QKVOutput as QKVOutput
from axlearn.common.attention._recursive import for_each_self_attention as for_each_self_attention
from axlearn.common.attention._recursive import set_num_seq_chunks as set_num_seq_chunks
from axlearn.common.attention._remat import RematRegexSavePatterns as RematRegexSavePatterns
from axlearn.common.attention._remat import (
    _save_and_offload_only_these_names_regex as _save_and_offload_only_these_names_regex,
)
from axlearn.common.attention._remat import build_remat_spec as build_remat_spec
from axlearn.common.attention._repeat import RepeatedTransformerLayer as RepeatedTransformerLayer
from axlearn.common.attention._repeat import _TransformerRepeat as _TransformerRepeat
from axlearn.common.attention._rope_qkv import RoFormerQKVLinear as RoFormerQKVLinear
from axlearn.common.attention._rope_scaling import (
    LinearScaledSinusoidalPositionalEmbedding as LinearScaledSinusoidalPositionalEmbedding,
)
from axlearn.common.attention._rope_scaling import (
    Llama3SinusoidalPositionalEmbedding as Llama3SinusoidalPositionalEmbedding,
)
from axlearn.common.attention._rope_scaling import (
    YaRNSinusoidalPositionalEmbedding as YaRNSinusoidalPositionalEmbedding,
)
from axlearn.common.attention._scale import BaseScaleQK as BaseScaleQK
from axlearn.common.attention._scale import PerDimScale as PerDimScale
from axlearn.common.attention._scale import ScaleKey as ScaleKey
from axlearn.common.attention._scale import ScaleQuery as ScaleQuery
from axlearn.common.attention._scale import constant_scale_fn as constant_scale_fn
from axlearn.common.attention._scale import pow_scale_fn as pow_scale_fn
from axlearn.common.attention._self_attention import TransformerAttentionLayer as TransformerAttentionLayer
from axlearn.common.attention._sliding_window import (
    enable_sliding_window_attention as enable_sliding_window_attention,
)
from axlearn.common.attention._stack import BaseStackedTransformerLayer as BaseStackedTransformerLayer
from axlearn.common.attention._stack import StackedTransformerLayer as StackedTransformerLayer
from axlearn.common.attention._structure import BaseResidualLayer as BaseResidualLayer
from axlearn.common.attention._structure import NormPosition as NormPosition
from axlearn.common.attention._variants import GroupedQueryAttention as GroupedQueryAttention
from axlearn.common.attention._variants import SigmoidAttention as SigmoidAttention
