"""Basic layers: dense, embedding, normalisation, dropout; functions that set fields all over a tree."""

from axlearn.common.layers._activations import get_activation_fn as get_activation_fn
from axlearn.common.layers._dropout import Dropout as Dropout
from axlearn.common.layers._dropout import StochasticDepth as StochasticDepth
from axlearn.common.layers._embedding import Embedding as Embedding
from axlearn.common.layers._gather import dims_split_by_batch_axes as dims_split_by_batch_axes
from axlearn.common.layers._gather import gather_weight as gather_weight
from axlearn.common.layers._gather import place_output_table as place_output_table
from axlearn.common.layers._linear import Linear as Linear
from axlearn.common.layers._linear import align_right as align_right
from axlearn.common.layers._norm import BaseNormalizationLayer as BaseNormalizationLayer
from axlearn.common.layers._norm import LayerNorm as LayerNorm
from axlearn.common.layers._norm import RMSNorm as RMSNorm
from axlearn.common.layers._recursive import for_each_config as for_each_config
from axlearn.common.layers._recursive import set_bias_recursively as set_bias_recursively
from axlearn.common.layers._recursive import set_dropout_rate_recursively as set_dropout_rate_recursively
from axlearn.common.layers._recursive import set_layer_norm_eps_recursively as set_layer_norm_eps_recursively
from axlearn.common.layers._recursive import set_norm_recursively as set_norm_recursively
