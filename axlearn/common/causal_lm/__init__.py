"""The causal language model: a decoder with its losses, and functions that configure common ones."""

from axlearn.common.causal_lm._configs import gpt_decoder_config as gpt_decoder_config
from axlearn.common.causal_lm._configs import residual_initializer_cfg as residual_initializer_cfg
from axlearn.common.causal_lm._metrics import AuxLossMetrics as AuxLossMetrics
from axlearn.common.causal_lm._metrics import BaseLossMetrics as BaseLossMetrics
from axlearn.common.causal_lm._metrics import CompositeLossMetrics as CompositeLossMetrics
from axlearn.common.causal_lm._metrics import CrossEntropyLossMetrics as CrossEntropyLossMetrics
from axlearn.common.causal_lm._metrics import LossOutputs as LossOutputs
from axlearn.common.causal_lm._metrics import metrics_config as metrics_config
from axlearn.common.causal_lm._model import Model as Model
