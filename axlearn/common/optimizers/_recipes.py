"""Whole optimizers, put together from the parts."""

from typing import Any, Optional

import jax.numpy as jnp

from axlearn.common import schedule
from axlearn.common.config import ConfigOr
from axlearn.common.optimizer_base import PartitionedGradientTransformation
from axlearn.common.optimizers._clip import clip_by_block_rms
from axlearn.common.optimizers._compose import chain
from axlearn.common.optimizers._decay import add_decayed_weights, l2_regularizer
from axlearn.common.optimizers._ema import ema
from axlearn.common.optimizers._factored import scale_by_factored_rms, scale_by_trust_ratio
from axlearn.common.optimizers._moments import (
    scale_by_adam,
    scale_by_lion,
    scale_by_param_block_rms,
    trace,
)
from axlearn.common.optimizers._per_param import PerParamFn
from axlearn.common.optimizers._scale import scale, scale_by_schedule, scale_from_learning_rate


def adamw_optimizer(
    learning_rate: schedule.Schedule,
    *,
    b1: float,
    b2: float,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    weight_decay_per_param_scale: Optional[ConfigOr[PerParamFn]] = None,
    mu_dtype: Optional[Any] = None,
    adam_update_transformation: Optional[ConfigOr[PartitionedGradientTransformation]] = None,
) -> PartitionedGradientTransformation:
    """AdamW as in most libraries: `p -= learning_rate * (adam + weight_decay * p)`.

    Args:
        learning_rate: The schedule of everything.
        b1: Decay of the first moment.
        b2: Decay of the second moment.
        eps: Is added to the root of the second moment.
        weight_decay: The rate of decay, which the learning rate multiplies.
        weight_decay_per_param_scale: See `add_decayed_weights`.
        mu_dtype: The type in which the first moment is kept; None: that of the parameter.
        adam_update_transformation: Applied to Adam's update before weight decay; None: nothing is.

    Returns:
        The optimizer.
    """
    parts: list[Any] = [scale_by_adam(b1=b1, b2=b2, eps=eps, mu_dtype=mu_dtype)]
    if adam_update_transformation is not None:
        parts.append(adam_update_transformation)
    return chain(
        *parts,
        add_decayed_weights(weight_decay, per_param_scale=weight_decay_per_param_scale),
        scale_from_learning_rate(learning_rate),
    )


def adamw_decoupled_optimizer(
    learning_rate: schedule.Schedule,
    *,
    b1: float,
    b2: float,
    eps: float = 1e-8,
    update_schedule: schedule.Schedule,
    weight_decay: float = 0.0,
    weight_decay_per_param_scale: Optional[ConfigOr[PerParamFn]] = None,
    mu_dtype: Optional[Any] = None,
    adam_update_transformation: Optional[ConfigOr[PartitionedGradientTransformation]] = None,
) -> PartitionedGradientTransformation:
    """AdamW as in its paper: `p -= update_schedule * (learning_rate * adam + weight_decay * p)`.

    Weight decay follows the schedule but not the learning rate, so that the two can be tuned independently.

    Args:
        learning_rate: The peak learning rate.
        b1: Decay of the first moment.
        b2: Decay of the second moment.
        eps: Is added to the root of the second moment.
        update_schedule: The schedule of everything, mostly with a peak of 1.
        weight_decay: The rate of decay.
        weight_decay_per_param_scale: See `add_decayed_weights`.
        mu_dtype: The type in which the first moment is kept; None: that of the parameter.
        adam_update_transformation: Applied to Adam's update before the learning rate; None: nothing is.

    Returns:
        The optimizer. Without `adam_update_transformation` its state has the moments at 0, and counts at 1
        and 3.

    Reference:
        Loshchilov and Hutter, Decoupled weight decay regularization (https://arxiv.org/abs/1711.05101),
        algorithm 2.
    """
    parts: list[Any] = [scale_by_adam(b1=b1, b2=b2, eps=eps, mu_dtype=mu_dtype)]
    if adam_update_transformation is not None:
        parts.append(adam_update_transformation)
    return chain(
        *parts,
        scale_from_learning_rate(learning_rate, flip_sign=False),
        add_decayed_weights(weight_decay, per_param_scale=weight_decay_per_param_scale),
        scale_by_schedule(update_schedule),
        scale(-1.0),
    )


def adam_optimizer(
    learning_rate: schedule.Schedule,
    *,
    b1: float,
    b2: float,
    eps: float = 1e-8,
    l2_regularizer_weight: float = 0.0,
    l2_regularizer_per_param_scale: Optional[ConfigOr[PerParamFn]] = None,
) -> PartitionedGradientTransformation:
    """Adam, with an L2 penalty in the gradient rather than weight decay.

    Args:
        learning_rate: The schedule.
        b1: Decay of the first moment.
        b2: Decay of the second moment.
        eps: Is added to the root of the second moment.
        l2_regularizer_weight: See `l2_regularizer`.
        l2_regularizer_per_param_scale: See `l2_regularizer`.

    Returns:
        The optimizer.
    """
    return chain(
        l2_regularizer(l2_regularizer_weight, per_param_scale=l2_regularizer_per_param_scale),
        scale_by_adam(b1=b1, b2=b2, eps=eps),
        scale_from_learning_rate(learning_rate),
    )


def sgd_optimizer(
    learning_rate: schedule.Schedule,
    *,
    decouple_weight_decay: bool,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    weight_decay_per_param_scale: Optional[ConfigOr[PerParamFn]] = None,
) -> PartitionedGradientTransformation:
    """Stochastic gradient descent with momentum.

    Args:
        learning_rate: The schedule of everything.
        decouple_weight_decay: Whether weight decay comes after the momentum, as
            `learning_rate * weight_decay * p`, as opposed to being part of the gradient.
        momentum: Decay of the sum of gradients.
        weight_decay: The rate of decay, or the weight of the penalty.
        weight_decay_per_param_scale: See `add_decayed_weights`.

    Returns:
        The optimizer.
    """
    if decouple_weight_decay:
        parts = [
            trace(momentum),
            add_decayed_weights(weight_decay, per_param_scale=weight_decay_per_param_scale),
        ]
    else:
        parts = [
            l2_regularizer(weight_decay, per_param_scale=weight_decay_per_param_scale),
            trace(momentum),
        ]
    return chain(*parts, scale_from_learning_rate(learning_rate))


def lion_optimizer(
    learning_rate: schedule.Schedule,
    b1: float,
    b2: float,
    *,
    weight_decay: float = 0.0,
    weight_decay_per_param_scale: Optional[ConfigOr[PerParamFn]] = None,
    multiply_by_parameter_scale: bool = False,
) -> PartitionedGradientTransformation:
    """Lion: steps of equal size in every element, with the sign of a moment.

    Args:
        learning_rate: The schedule of everything; usually a tenth to a third of Adam's.
        b1: How much the sign depends on the moment.
        b2: Decay of the moment.
        weight_decay: The rate of decay, which the learning rate multiplies.
        weight_decay_per_param_scale: See `add_decayed_weights`.
        multiply_by_parameter_scale: Whether steps are relative to the root mean square of the parameter.

    Returns:
        The optimizer.

    Reference:
        Chen et al., Symbolic discovery of optimization algorithms (https://arxiv.org/abs/2302.06675),
        algorithm 2.
    """
    parts = [scale_by_lion(b1=b1, b2=b2)]
    if multiply_by_parameter_scale:
        parts.append(scale_by_param_block_rms())
    return chain(
        *parts,
        add_decayed_weights(weight_decay, per_param_scale=weight_decay_per_param_scale),
        scale_from_learning_rate(learning_rate),
    )


def adafactor_optimizer(
    learning_rate: schedule.Schedule,
    *,
    b1: Optional[float],
    b2: schedule.Schedule,
    multiply_by_parameter_scale: bool,
    clipping_threshold: Optional[float],
    dtype_momentum: Any = jnp.float32,
    weight_decay: Optional[float] = None,
    weight_decay_scale_by_learning_rate_exponent: Optional[float] = None,
    weight_decay_per_param_scale: Optional[ConfigOr[PerParamFn]] = None,
    eps: float = 1e-30,
    factored: bool = True,
    apply_scale_by_trust_ratio: bool = False,
) -> PartitionedGradientTransformation:
    """Adafactor: second moments that take the memory of a row and a column, and bounded steps.

    Args:
        learning_rate: The schedule of everything but weight decay.
        b1: Decay of the average of updates; None: no average, and no memory for it.
        b2: Decay of the second moments, mostly `schedule.adafactor_decay_rate`.
        multiply_by_parameter_scale: Whether steps are relative to the root mean square of the parameter.
        clipping_threshold: The greatest root mean square of an update before the learning rate; None: any.
        dtype_momentum: The type in which the average of updates is kept.
        weight_decay: The rate of decay; None: none.
        weight_decay_scale_by_learning_rate_exponent: The rate is multiplied by the learning rate to this power;
            None: it is not.
        weight_decay_per_param_scale: See `add_decayed_weights`.
        eps: Is added to the squares of gradients.
        factored: Whether to factor the moments of parameters whose `FactorizationSpec` says how.
        apply_scale_by_trust_ratio: Whether to make each update as long as its parameter at the end.

    Returns:
        The optimizer. Parts that are left out have no place in the state.

    Reference:
        Shazeer and Stern, Adafactor (https://arxiv.org/abs/1804.04235), algorithms 4 to 6.
    """
    parts: list[Any] = [scale_by_factored_rms(factored, decay_rate=b2, epsilon=eps)]
    if clipping_threshold is not None:
        parts.append(clip_by_block_rms(clipping_threshold, summary_suffix="norm"))
    parts.append(scale_from_learning_rate(learning_rate, flip_sign=False))
    if multiply_by_parameter_scale:
        parts.append(scale_by_param_block_rms())
    if b1 is not None:
        parts.append(ema(b1, debias=False, accumulator_dtype=dtype_momentum))
    if weight_decay is not None:
        exponent = weight_decay_scale_by_learning_rate_exponent
        parts.append(
            add_decayed_weights(
                weight_decay,
                learning_rate=None if exponent is None else learning_rate,
                learning_rate_exponent=exponent,
                per_param_scale=weight_decay_per_param_scale,
            )
        )
    if apply_scale_by_trust_ratio:
        parts.append(scale_by_trust_ratio())
    return chain(*parts, scale(-1.0))
