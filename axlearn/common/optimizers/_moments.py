"""Running moments of the gradients: optax's own, with the specs of their states."""

from typing import Any, Optional

import optax

from axlearn.common.base_layer import ParameterSpec
from axlearn.common.optimizer_base import PartitionedGradientTransformation
from axlearn.common.optimizers._compose import copy_partition, scalar_spec, with_partition_fn
from axlearn.common.optimizers._per_param import per_param_scale_by_rms, scale_update_per_param
from axlearn.common.utils import Nested


def trace(
    decay: float, *, nesterov: bool = False, accumulator_dtype: Optional[Any] = None
) -> PartitionedGradientTransformation:
    """Momentum: `trace = gradient + decay * trace`.

    Args:
        decay: The decay.
        nesterov: Whether to look one step ahead: `gradient + decay * trace` with the new trace.
        accumulator_dtype: The type of the state; None: that of the parameter.

    Returns:
        The transformation.
    """

    def partition_fn(param_specs: Nested[ParameterSpec]) -> optax.TraceState:
        return optax.TraceState(trace=copy_partition(param_specs, dtype=accumulator_dtype))

    base = optax.trace(decay=decay, nesterov=nesterov, accumulator_dtype=accumulator_dtype)
    return with_partition_fn(base, partition_fn)


def adam_partition(
    base: optax.GradientTransformation, *, mu_dtype: Optional[Any] = None
) -> PartitionedGradientTransformation:
    """Adds the specs of the state to `optax.scale_by_adam`, or to another with the same state.

    Args:
        base: The transformation.
        mu_dtype: The type of its first moment; None: that of the parameter.

    Returns:
        The transformation.
    """

    def partition_fn(param_specs: Nested[ParameterSpec]) -> optax.ScaleByAdamState:
        return optax.ScaleByAdamState(
            count=scalar_spec(),
            mu=copy_partition(param_specs, dtype=mu_dtype),
            nu=copy_partition(param_specs),
        )

    return with_partition_fn(base, partition_fn)


def scale_by_adam(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    mu_dtype: Optional[Any] = None,
) -> PartitionedGradientTransformation:
    """`(mu / (1 - b1^t)) / (sqrt(nu / (1 - b2^t)) + eps)`, where t counts from 1.

    `mu = b1 * mu + (1 - b1) * g` and `nu = b2 * nu + (1 - b2) * g * g` are kept as they are, without the
    corrections.

    Args:
        b1: Decay of the first moment.
        b2: Decay of the second moment.
        eps: Is added to the root.
        mu_dtype: The type in which the first moment is kept; None: that of the parameter.

    Returns:
        The transformation.

    Reference:
        Kingma and Ba, Adam (https://arxiv.org/abs/1412.6980), algorithm 1.
    """
    return adam_partition(optax.scale_by_adam(b1=b1, b2=b2, eps=eps, mu_dtype=mu_dtype), mu_dtype=mu_dtype)


def scale_by_lion(
    b1: float = 0.9, b2: float = 0.99, *, mu_dtype: Optional[Any] = None
) -> PartitionedGradientTransformation:
    """The sign of `b1 * mu + (1 - b1) * g`, where `mu` decays by `b2`.

    Args:
        b1: How much the sign depends on the moment.
        b2: Decay of the moment.
        mu_dtype: The type in which it is kept; None: that of the parameter.

    Returns:
        The transformation.

    Reference:
        Chen et al., Symbolic discovery of optimization algorithms (https://arxiv.org/abs/2302.06675),
        algorithm 2.
    """

    def partition_fn(param_specs: Nested[ParameterSpec]) -> optax.ScaleByLionState:
        return optax.ScaleByLionState(count=scalar_spec(), mu=copy_partition(param_specs, dtype=mu_dtype))

    return with_partition_fn(optax.scale_by_lion(b1=b1, b2=b2, mu_dtype=mu_dtype), partition_fn)


def scale_by_param_block_rms(min_scale: float = 1e-3) -> PartitionedGradientTransformation:
    """Multiplies each update by the root mean square of its parameter; layers of a Repeat count one by one.

    Args:
        min_scale: The least factor, so that parameters that start at zero can leave it.

    Returns:
        The transformation; it has no state.
    """
    return scale_update_per_param(per_param_scale_by_rms(min_scale=min_scale))
