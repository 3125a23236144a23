"""Optimizers: transformations of gradients into updates, each with the specs of its state.

The parts are `optax`'s wherever that agrees. Parts chain to optimizers, and both are named in configs by
their functions: `config_for_function(optimizers.chain).set(args=[...])`.
"""

from axlearn.common.optimizers._adastar import adastar_optimizer as adastar_optimizer
from axlearn.common.optimizers._clip import clip_by_block_rms as clip_by_block_rms
from axlearn.common.optimizers._clip import clip_by_global_norm as clip_by_global_norm
from axlearn.common.optimizers._clip import global_norm as global_norm
from axlearn.common.optimizers._compose import chain as chain
from axlearn.common.optimizers._compose import copy_partition as copy_partition
from axlearn.common.optimizers._compose import named_chain as named_chain
from axlearn.common.optimizers._compose import with_partition_fn as with_partition_fn
from axlearn.common.optimizers._decay import AddDecayedWeightsState as AddDecayedWeightsState
from axlearn.common.optimizers._decay import add_decayed_weights as add_decayed_weights
from axlearn.common.optimizers._decay import l2_regularizer as l2_regularizer
from axlearn.common.optimizers._ema import EmaState as EmaState
from axlearn.common.optimizers._ema import ParamEmaState as ParamEmaState
from axlearn.common.optimizers._ema import ema as ema
from axlearn.common.optimizers._ema import param_ema as param_ema
from axlearn.common.optimizers._factored import scale_by_factored_rms as scale_by_factored_rms
from axlearn.common.optimizers._factored import scale_by_trust_ratio as scale_by_trust_ratio
from axlearn.common.optimizers._moments import adam_partition as adam_partition
from axlearn.common.optimizers._moments import scale_by_adam as scale_by_adam
from axlearn.common.optimizers._moments import scale_by_lion as scale_by_lion
from axlearn.common.optimizers._moments import scale_by_param_block_rms as scale_by_param_block_rms
from axlearn.common.optimizers._moments import trace as trace
from axlearn.common.optimizers._offload import offload_optimizer as offload_optimizer
from axlearn.common.optimizers._per_param import PerParamFn as PerParamFn
from axlearn.common.optimizers._per_param import PerParamSettings as PerParamSettings
from axlearn.common.optimizers._per_param import collect_per_param_settings as collect_per_param_settings
from axlearn.common.optimizers._per_param import per_param_scale_by_path as per_param_scale_by_path
from axlearn.common.optimizers._per_param import per_param_scale_by_rms as per_param_scale_by_rms
from axlearn.common.optimizers._per_param import register_per_param_settings as register_per_param_settings
from axlearn.common.optimizers._per_param import root_mean_square as root_mean_square
from axlearn.common.optimizers._per_param import scale_update_per_param as scale_update_per_param
from axlearn.common.optimizers._recipes import adafactor_optimizer as adafactor_optimizer
from axlearn.common.optimizers._recipes import adam_optimizer as adam_optimizer
from axlearn.common.optimizers._recipes import adamw_decoupled_optimizer as adamw_decoupled_optimizer
from axlearn.common.optimizers._recipes import adamw_optimizer as adamw_optimizer
from axlearn.common.optimizers._recipes import lion_optimizer as lion_optimizer
from axlearn.common.optimizers._recipes import sgd_optimizer as sgd_optimizer
from axlearn.common.optimizers._scale import scale as scale
from axlearn.common.optimizers._scale import scale_by_schedule as scale_by_schedule
from axlearn.common.optimizers._scale import scale_from_learning_rate as scale_from_learning_rate
from axlearn.common.optimizers._skip import DropNormThresholdFn as DropNormThresholdFn
from axlearn.common.optimizers._skip import SkipClipState as SkipClipState
from axlearn.common.optimizers._skip import drop_norm_by_grad_norm_ema as drop_norm_by_grad_norm_ema
from axlearn.common.optimizers._skip import drop_norm_by_grad_norm_stddev as drop_norm_by_grad_norm_stddev
from axlearn.common.optimizers._skip import skip_and_clip_by_global_norm as skip_and_clip_by_global_norm
