"""Layers: modules with parameters, whose state is the tree of those parameters."""

from axlearn.common.base_layer._base_layer import BaseLayer as BaseLayer
from axlearn.common.base_layer._param_noise import ParameterNoise as ParameterNoise
from axlearn.common.base_layer._remat import RematSpec as RematSpec
from axlearn.common.base_layer._remat import no_remat as no_remat
from axlearn.common.base_layer._specs import FactorizationSpec as FactorizationSpec
from axlearn.common.base_layer._specs import NestedParameterSpec as NestedParameterSpec
from axlearn.common.base_layer._specs import ParameterSpec as ParameterSpec
from axlearn.common.base_layer._tensor_stats import CompositeTensorStats as CompositeTensorStats
from axlearn.common.base_layer._tensor_stats import DefaultTensorStats as DefaultTensorStats
from axlearn.common.base_layer._tensor_stats import TensorMaxAbs as TensorMaxAbs
from axlearn.common.base_layer._tensor_stats import TensorRMSNorm as TensorRMSNorm
from axlearn.common.base_layer._tensor_stats import TensorStats as TensorStats
