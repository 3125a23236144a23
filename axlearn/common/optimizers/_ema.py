"""Exponential moving averages: of updates, and of parameters."""

from typing import Any, NamedTuple, Optional

import jax
import jax.numpy as jnp
import optax

from axlearn.common import schedule
from axlearn.common.base_layer import ParameterSpec
from axlearn.common.optimizer_base import (
    NestedOptParam,
    PartitionedGradientTransformation,
    opt_param_values,
)
from axlearn.common.optimizers._compose import copy_partition, no_state_partition, scalar_spec
from axlearn.common.utils import Nested, Tensor


class EmaState(NamedTuple):
    """State of `ema`.

    Attributes:
        count: How many updates there were, int32.
        ema: The averages, without bias correction, in the type of the accumulator.
    """

    count: Any
    ema: Any


def ema(
    decay: float, debias: bool = True, accumulator_dtype: Any = jnp.float32
) -> PartitionedGradientTransformation:
    """Replaces updates by their moving average, `decay * average + (1 - decay) * update`.

    Args:
        decay: The decay, in [0, 1).
        debias: Whether to divide by `1 - decay ** t`, which makes up for the start at zero.
        accumulator_dtype: The type in which the average is kept; None: that of the parameter. A low precision
            loses what `1 - decay` makes too small for it.

    Returns:
        The transformation.
    """

    def init_fn(params: NestedOptParam) -> EmaState:
        zeros = jax.tree.map(lambda v: jnp.zeros_like(v, dtype=accumulator_dtype), opt_param_values(params))
        return EmaState(count=jnp.zeros([], jnp.int32), ema=zeros)

    def update_fn(updates: Nested[Tensor], state: EmaState, params: NestedOptParam) -> tuple[Any, EmaState]:
        del params
        count = optax.safe_increment(state.count)
        average = jax.tree.map(
            lambda e, u: decay * e.astype(jnp.float32) + (1 - decay) * u.astype(jnp.float32),
            state.ema,
            updates,
        )
        correction = 1 - decay**count if debias else 1.0
        new_updates = jax.tree.map(lambda a, u: (a / correction).astype(u.dtype), average, updates)
        new_ema = jax.tree.map(lambda a, e: a.astype(e.dtype), average, state.ema)
        return new_updates, EmaState(count=count, ema=new_ema)

    def partition_fn(param_specs: Nested[ParameterSpec]) -> EmaState:
        return EmaState(count=scalar_spec(), ema=copy_partition(param_specs, dtype=accumulator_dtype))

    return PartitionedGradientTransformation(init=init_fn, update=update_fn, partition=partition_fn)


class ParamEmaState(NamedTuple):
    """State of `param_ema`.

    Attributes:
        count: How many updates there were, int32.
        ema: The averages, each like its parameter.
    """

    count: Any
    ema: Any


def param_ema(*, decay: Optional[schedule.Schedule] = None) -> PartitionedGradientTransformation:
    """Keeps a moving average of the parameters, for evaluation; updates pass unchanged.

    The average starts at zero. With a constant decay it is biased towards zero in the beginning; with
    `schedule.decay_bias_correction` or `schedule.ema_schedule` it is not. Parameters that are not floats are
    copied.

    Args:
        decay: The decay as a schedule, of which the first update is step 1. None: nothing is kept.

    Returns:
        The transformation. `params` of its `update` are the parameters to average: those after the
        optimizer's step.
    """
    if decay is None:
        return PartitionedGradientTransformation(
            init=lambda params: optax.EmptyState(),
            update=lambda updates, state, params: (updates, state),
            partition=no_state_partition,
        )
    decay_fn = schedule.as_schedule_fn(decay)

    def init_fn(params: NestedOptParam) -> ParamEmaState:
        zeros = jax.tree.map(jnp.zeros_like, opt_param_values(params))
        return ParamEmaState(count=jnp.zeros([], jnp.int32), ema=zeros)

    def update_fn(
        updates: Nested[Tensor], state: ParamEmaState, params: NestedOptParam
    ) -> tuple[Any, ParamEmaState]:
        count = optax.safe_increment(state.count)
        decay_now = decay_fn(count)

        def average(value: Tensor, old: Tensor) -> Tensor:
            if not jnp.issubdtype(value.dtype, jnp.floating):
                return value
            return ((1 - decay_now) * value + decay_now * old).astype(old.dtype)

        new_ema = jax.tree.map(average, opt_param_values(params), state.ema)
        return updates, ParamEmaState(count=count, ema=new_ema)

    def partition_fn(param_specs: Nested[ParameterSpec]) -> ParamEmaState:
        return ParamEmaState(count=scalar_spec(), ema=copy_partition(param_specs))

    return PartitionedGradientTransformation(init=init_fn, update=update_fn, partition=partition_fn)
