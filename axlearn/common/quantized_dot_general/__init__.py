"""Matrix products in fewer bits: float8 with delayed scaling, int8; and the base of the layers that can use them."""

from axlearn.common.quantized_dot_general._contraction import Contraction as Contraction
from axlearn.common.quantized_dot_general._fp8 import Fp8Meta as Fp8Meta
from axlearn.common.quantized_dot_general._fp8 import Fp8Metas as Fp8Metas
from axlearn.common.quantized_dot_general._fp8 import fp8_dot as fp8_dot
from axlearn.common.quantized_dot_general._int8 import int8_dot as int8_dot
from axlearn.common.quantized_dot_general._layer import DenseGeneralBaseLayer as DenseGeneralBaseLayer
from axlearn.common.quantized_dot_general._layer import (
    DotGeneralQuantizationType as DotGeneralQuantizationType,
)
from axlearn.common.quantized_dot_general._layer import QuantizedDotGeneral as QuantizedDotGeneral
from axlearn.common.quantized_dot_general._layer import get_all_fp8_param_names as get_all_fp8_param_names
from axlearn.common.quantized_dot_general._layer import tanh_clipping as tanh_clipping
from axlearn.common.quantized_dot_general._layer import uses_fp8 as uses_fp8
