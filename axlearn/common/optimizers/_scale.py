"""Multiplying updates by a number: fixed, or by a schedule of the step."""

from typing import Any, Optional

import jax
import jax.numpy as jnp
import optax

from axlearn.common import schedule
from axlearn.common.base_layer import ParameterSpec
from axlearn.common.optimizer_base import NestedOptParam, PartitionedGradientTransformation
from axlearn.common.optimizers._compose import scalar_spec, stateless
from axlearn.common.optimizers._per_param import scale_array
from axlearn.common.optimizers._summaries import add_summary
from axlearn.common.utils import Nested, Tensor


def scale(step_size: float) -> PartitionedGradientTransformation:
    """Multiplies updates by a number.

    Args:
        step_size: The number; -1 turns a direction of ascent into one of descent.

    Returns:
        The transformation; it has no state.
    """
    return stateless(lambda updates, params: jax.tree.map(lambda u: step_size * u, updates))


def _scale_by_schedule(
    schedule_fn: schedule.ScheduleFn, *, sign: float, step_summary: str, value_summary: str
) -> PartitionedGradientTransformation:
    def init_fn(params: NestedOptParam) -> optax.ScaleByScheduleState:
        del params
        return optax.ScaleByScheduleState(count=jnp.zeros([], jnp.int32))

    def update_fn(
        updates: Nested[Tensor], state: optax.ScaleByScheduleState, params: NestedOptParam
    ) -> tuple[Any, optax.ScaleByScheduleState]:
        del params
        step = optax.safe_increment(state.count)
        value = jnp.asarray(schedule_fn(step), dtype=jnp.float32)
        add_summary(step_summary, step)
        add_summary(value_summary, value)
        updates = jax.tree.map(lambda u: scale_array(u, sign * value), updates)
        return updates, optax.ScaleByScheduleState(count=step)

    def partition_fn(param_specs: Nested[ParameterSpec]) -> optax.ScaleByScheduleState:
        del param_specs
        return optax.ScaleByScheduleState(count=scalar_spec())

    return PartitionedGradientTransformation(init=init_fn, update=update_fn, partition=partition_fn)


def scale_by_schedule(
    schedule_fn: schedule.Schedule, *, name: Optional[str] = None
) -> PartitionedGradientTransformation:
    """Multiplies updates by a schedule; the first update is step 1.

    Logs `schedule_step` and `schedule_scale`.

    Args:
        schedule_fn: The schedule.
        name: Goes before the names of the summaries, with a slash; None: nothing does.

    Returns:
        The transformation; its state is the count of updates.
    """
    prefix = f"{name}/" if name else ""
    return _scale_by_schedule(
        schedule.as_schedule_fn(schedule_fn),
        sign=1.0,
        step_summary=f"{prefix}schedule_step",
        value_summary=f"{prefix}schedule_scale",
    )


def scale_from_learning_rate(
    learning_rate: schedule.Schedule, *, flip_sign: bool = True
) -> PartitionedGradientTransformation:
    """Multiplies updates by a learning rate; the first update is step 1.

    Logs `lr_schedule_step` and `learning_rate`.

    Args:
        learning_rate: The schedule.
        flip_sign: Whether to multiply by the negative of it, as the last part of an optimizer does.

    Returns:
        The transformation; its state is the count of updates.
    """
    return _scale_by_schedule(
        schedule.as_schedule_fn(learning_rate),
        sign=-1.0 if flip_sign else 1.0,
        step_summary="lr_schedule_step",
        value_summary="learning_rate",
    )
