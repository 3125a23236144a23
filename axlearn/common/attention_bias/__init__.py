"""Attention biases that stay functions until somebody needs the matrix.

A bias is a small pytree; biases add up with `+` without being evaluated. `value()` makes the array that is
added to the logits. Masks (`BoolAttentionBias`) also say `bool_value()`; mask functions of positions
(`MaskFnAttentionBias`) say which function, so that a kernel can skip what is masked. `partition_spec` says how
a bias is cut up where the logits are.

Lengths of windows do not count the query itself: a window of n sees n + 1 positions.
"""

from axlearn.common.attention_bias._alibi import ALiBiAttentionBias as ALiBiAttentionBias
from axlearn.common.attention_bias._alibi import alibi_attention_bias as alibi_attention_bias
from axlearn.common.attention_bias._alibi import alibi_slopes as alibi_slopes
from axlearn.common.attention_bias._base import NEG_INF as NEG_INF
from axlearn.common.attention_bias._base import BaseAttentionBias as BaseAttentionBias
from axlearn.common.attention_bias._base import BoolAttentionBias as BoolAttentionBias
from axlearn.common.attention_bias._base import BoolTensorAttentionBias as BoolTensorAttentionBias
from axlearn.common.attention_bias._base import CompositeAttentionBias as CompositeAttentionBias
from axlearn.common.attention_bias._base import TensorAttentionBias as TensorAttentionBias
from axlearn.common.attention_bias._base import ZeroAttentionBias as ZeroAttentionBias
from axlearn.common.attention_bias._base import as_attention_bias as as_attention_bias
from axlearn.common.attention_bias._base import bool_to_bias as bool_to_bias
from axlearn.common.attention_bias._base import split as split
from axlearn.common.attention_bias._mask_biases import CausalAttentionBias as CausalAttentionBias
from axlearn.common.attention_bias._mask_biases import (
    LeftRightWindowAttentionBias as LeftRightWindowAttentionBias,
)
from axlearn.common.attention_bias._mask_biases import MaskFnAttentionBias as MaskFnAttentionBias
from axlearn.common.attention_bias._mask_biases import SegmentIdAttentionBias as SegmentIdAttentionBias
from axlearn.common.attention_bias._mask_biases import (
    SlidingWindowAttentionBias as SlidingWindowAttentionBias,
)
from axlearn.common.attention_bias._mask_biases import make_causal_biases as make_causal_biases
from axlearn.common.attention_bias._mask_biases import make_segment_mask as make_segment_mask
from axlearn.common.attention_bias._masks import MaskFn as MaskFn
from axlearn.common.attention_bias._masks import and_masks as and_masks
from axlearn.common.attention_bias._masks import causal_mask as causal_mask
from axlearn.common.attention_bias._masks import left_right_window_mask as left_right_window_mask
from axlearn.common.attention_bias._masks import or_masks as or_masks
from axlearn.common.attention_bias._masks import sliding_window_causal_mask as sliding_window_causal_mask
from axlearn.common.attention_bias._masks import truncated_key_mask as truncated_key_mask
