"""AdaStar: one optimizer of which AdamW and Adafactor without factors are special cases."""

from typing import Any, NamedTuple, Optional

import jax
import jax.numpy as jnp
import optax

from axlearn.common import schedule
from axlearn.common.base_layer import ParameterSpec
from axlearn.common.config import ConfigOr, maybe_instantiate
from axlearn.common.optimizer_base import (
    NestedOptParam,
    OptParam,
    OptStateSpec,
    PartitionedGradientTransformation,
    is_opt_param,
)
from axlearn.common.optimizers._clip import clip_by_block_rms
from axlearn.common.optimizers._compose import copy_partition, named_chain, scalar_spec, stateless
from axlearn.common.optimizers._decay import add_scaled_weights
from axlearn.common.optimizers._per_param import PerParamFn
from axlearn.common.optimizers._summaries import add_summary
from axlearn.common.utils import Nested, Tensor


class _AdastarPerParamState(NamedTuple):
    """State of one parameter, arrays like it.

    Attributes:
        gradient_ema: The average of the gradients; None where there is none.
        gradient_square_ema: The average of their squares.
        update_ema: The average of the updates; None where there is none.
    """

    gradient_ema: Any
    gradient_square_ema: Any
    update_ema: Any


class _AdastarState(NamedTuple):
    """State of the first part of `adastar_optimizer`.

    Attributes:
        count: How many updates there were, int32.
        pps: A tree of _AdastarPerParamState.
    """

    count: Any
    pps: Any


class _Average(NamedTuple):
    """A moving average: `decay` None for none at all."""

    decay: Optional[float]
    debias: Optional[bool]

    def step(self, value: Tensor, *, old: Optional[Tensor], count: Tensor) -> tuple[Tensor, Optional[Tensor]]:
        """Returns what takes the place of the value, and the new average."""
        if self.decay is None:
            return value, None
        assert old is not None, "init makes an average where there is a decay."
        average = self.decay * old.astype(jnp.float32) + (1 - self.decay) * value
        corrected = average / (1 - self.decay**count) if self.debias else average
        return corrected, average.astype(old.dtype)


def adastar_optimizer(
    learning_rate: float,
    *,
    gradient_ema_decay: Optional[float],
    gradient_ema_debias: Optional[bool],
    gradient_square_ema_decay: float,
    gradient_square_ema_debias: bool,
    eps: float,
    eps_square: float,
    raw_update_clipping_threshold: Optional[float],
    update_ema_decay: Optional[float],
    update_ema_debias: Optional[bool],
    adam_update_transformation: Optional[ConfigOr[PartitionedGradientTransformation]] = None,
    weight_decay: float = 0,
    weight_decay_per_param_scale: Optional[ConfigOr[PerParamFn]] = None,
    update_schedule: schedule.Schedule,
    verbosity: int = 0,
) -> PartitionedGradientTransformation:
    """Steps of `-update_schedule * (learning_rate * u + weight_decay * scale * p)`.

    Of a gradient g, averages being over steps: `v = average(g ** 2 + eps_square)`, `r = average(g) / (sqrt(v) +
    eps)`, then r is scaled so that its root mean square over a parameter (over each layer of a Repeat) is at
    most `raw_update_clipping_threshold`, and `u = transformation(average(r))`.

    With debiased averages of g and g ** 2, and neither threshold nor average of r, it is
    `adamw_decoupled_optimizer`; with averages of r and g ** 2 that are not debiased it is `adafactor_optimizer`
    without factors, at constant decays.

    Args:
        learning_rate: The peak learning rate.
        gradient_ema_decay: Decay of the average of g; None: g itself.
        gradient_ema_debias: Whether to correct it for its start at zero; None where there is no average.
        gradient_square_ema_decay: Decay of the average of g ** 2.
        gradient_square_ema_debias: Likewise.
        eps: Is added to the root.
        eps_square: Is added to g ** 2.
        raw_update_clipping_threshold: See above; None: any.
        update_ema_decay: Decay of the average of r; None: r itself.
        update_ema_debias: Likewise.
        adam_update_transformation: Applied before the learning rate; None: nothing is.
        weight_decay: The rate of decay, which follows the schedule but not the learning rate.
        weight_decay_per_param_scale: See `add_decayed_weights`.
        update_schedule: The schedule of everything, mostly with a peak of 1.
        verbosity: 0: the schedule is logged; from 1 on, also the largest root mean squares of r (before
            the threshold) and of u.

    Returns:
        The optimizer. Its state is a dict with `compute_updates`, `transform_updates` and `apply_lr_and_wd`.
    """
    averages = _AdastarPerParamState(
        gradient_ema=_Average(gradient_ema_decay, gradient_ema_debias),
        gradient_square_ema=_Average(gradient_square_ema_decay, gradient_square_ema_debias),
        update_ema=_Average(update_ema_decay, update_ema_debias),
    )
    transformation = maybe_instantiate(adam_update_transformation) or stateless(
        lambda updates, params: updates
    )
    return named_chain(
        compute_updates=_compute_updates(
            averages,
            eps=eps,
            eps_square=eps_square,
            threshold=raw_update_clipping_threshold,
            is_verbose=verbosity > 0,
        ),
        transform_updates=transformation,
        apply_lr_and_wd=_apply_lr_and_wd(
            learning_rate,
            weight_decay=weight_decay,
            weight_decay_scale_fn=maybe_instantiate(weight_decay_per_param_scale),
            schedule_fn=schedule.as_schedule_fn(update_schedule),
            is_verbose=verbosity > 0,
        ),
    )


def _compute_updates(
    averages: _AdastarPerParamState,
    *,
    eps: float,
    eps_square: float,
    threshold: Optional[float],
    is_verbose: bool,
) -> PartitionedGradientTransformation:
    clip = clip_by_block_rms(threshold, summary_suffix="raw_update" if is_verbose else None)

    def init_one(param: OptParam) -> _AdastarPerParamState:
        return _AdastarPerParamState(
            *(None if average.decay is None else jnp.zeros(param.shape, param.dtype) for average in averages)
        )

    def init_fn(params: NestedOptParam) -> _AdastarState:
        pps = jax.tree.map(init_one, params, is_leaf=is_opt_param)
        return _AdastarState(count=jnp.zeros([], jnp.int32), pps=pps)

    def update_fn(
        updates: Nested[Tensor], state: _AdastarState, params: NestedOptParam
    ) -> tuple[Any, _AdastarState]:
        count = optax.safe_increment(state.count)

        def raw_update(grad: Tensor, old: _AdastarPerParamState) -> _WithState:
            grad = grad.astype(jnp.float32)
            smooth, gradient_ema = averages.gradient_ema.step(grad, old=old.gradient_ema, count=count)
            square, square_ema = averages.gradient_square_ema.step(
                jnp.square(grad) + eps_square, old=old.gradient_square_ema, count=count
            )
            new = old._replace(gradient_ema=gradient_ema, gradient_square_ema=square_ema)
            return _WithState(update=smooth / (jnp.sqrt(square) + eps), state=new)

        def smooth_update(grad: Tensor, raw: Tensor, old: _AdastarPerParamState) -> _WithState:
            smooth, update_ema = averages.update_ema.step(raw, old=old.update_ema, count=count)
            return _WithState(update=smooth.astype(grad.dtype), state=old._replace(update_ema=update_ema))

        raw, pps = _unzip(jax.tree.map(raw_update, updates, state.pps))
        raw, _ = clip.update(raw, clip.init(params), params)
        smooth, pps = _unzip(jax.tree.map(smooth_update, updates, raw, pps))
        return smooth, _AdastarState(count=count, pps=pps)

    def partition_fn(param_specs: Nested[ParameterSpec]) -> _AdastarState:
        def partition_one(spec: OptStateSpec) -> _AdastarPerParamState:
            return _AdastarPerParamState(*(None if average.decay is None else spec for average in averages))

        pps = jax.tree.map(partition_one, copy_partition(param_specs))
        return _AdastarState(count=scalar_spec(), pps=pps)

    return PartitionedGradientTransformation(init=init_fn, update=update_fn, partition=partition_fn)


class _WithState(NamedTuple):
    """An update of one parameter and its new state."""

    update: Tensor
    state: _AdastarPerParamState


def _unzip(tree: Nested[_WithState]) -> tuple[Nested[Tensor], Nested[_AdastarPerParamState]]:
    is_leaf = lambda node: isinstance(node, _WithState)  # noqa: E731
    return (
        jax.tree.map(lambda node: node.update, tree, is_leaf=is_leaf),
        jax.tree.map(lambda node: node.state, tree, is_leaf=is_leaf),
    )


def _apply_lr_and_wd(
    learning_rate: float,
    *,
    weight_decay: float,
    weight_decay_scale_fn: Optional[PerParamFn],
    schedule_fn: schedule.ScheduleFn,
    is_verbose: bool,
) -> PartitionedGradientTransformation:
    monitor = clip_by_block_rms(None, summary_suffix="smoothed_update" if is_verbose else None)

    def init_fn(params: NestedOptParam) -> optax.ScaleByScheduleState:
        del params
        return optax.ScaleByScheduleState(count=jnp.zeros([], jnp.int32))

    def update_fn(
        updates: Nested[Tensor], state: optax.ScaleByScheduleState, params: NestedOptParam
    ) -> tuple[Any, optax.ScaleByScheduleState]:
        step = optax.safe_increment(state.count)
        factor = jnp.asarray(schedule_fn(step), jnp.float32)
        add_summary("schedule_step", step)
        add_summary("schedule_scale", factor)
        add_summary("learning_rate", learning_rate * factor)
        monitor.update(updates, monitor.init(params), params)
        updates = jax.tree.map(lambda u: (learning_rate * u).astype(u.dtype), updates)
        updates = add_scaled_weights(
            updates, params, factor=weight_decay, per_param_scale=weight_decay_scale_fn
        )
        updates = jax.tree.map(lambda u: (-factor * u).astype(u.dtype), updates)
        return updates, optax.ScaleByScheduleState(count=step)

    def partition_fn(param_specs: Nested[ParameterSpec]) -> optax.ScaleByScheduleState:
        del param_specs
        return optax.ScaleByScheduleState(count=scalar_spec())

    return PartitionedGradientTransformation(init=init_fn, update=update_fn, partition=partition_fn)
