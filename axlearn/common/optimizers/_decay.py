"""Weight decay: towards zero in each update (decoupled), or as part of the gradient (an L2 penalty)."""

from typing import Any, NamedTuple, Optional, Union

import jax
import jax.numpy as jnp
import optax

from axlearn.common import schedule
from axlearn.common.base_layer import ParameterSpec
from axlearn.common.config import ConfigOr, error_message, maybe_instantiate
from axlearn.common.optimizer_base import (
    NestedOptParam,
    OptParam,
    PartitionedGradientTransformation,
    is_opt_param,
)
from axlearn.common.optimizers._compose import scalar_spec, stateless
from axlearn.common.optimizers._per_param import PerParamFn, register_per_param_settings, scale_array
from axlearn.common.utils import Nested, Tensor


class AddDecayedWeightsState(NamedTuple):
    """State of a weight decay that depends on the learning rate.

    Attributes:
        count: How many updates there were.
    """

    count: Any


def _weight_decay_scales(
    params: NestedOptParam, *, per_param_scale: Optional[PerParamFn], description: Optional[str]
) -> Nested[Union[float, Tensor]]:
    """The scale of each parameter: its own where it has one, else by `per_param_scale`, else 1.

    They are registered under `description`; None: they are not.
    """
    if per_param_scale is None:
        scales = jax.tree.map(lambda _: 1, params, is_leaf=is_opt_param)
    else:
        scales = per_param_scale(params)

    def own_or(param: OptParam, scale: Union[float, Tensor]) -> Union[float, Tensor]:
        return scale if param.weight_decay_scale is None else param.weight_decay_scale

    scales = jax.tree.map(own_or, params, scales, is_leaf=is_opt_param)
    return scales if description is None else register_per_param_settings(scales, description=description)


def _add_weights(
    updates: Nested[Tensor], params: NestedOptParam, *, factor: Union[float, Tensor], scales: Nested[Any]
) -> Nested[Tensor]:
    """`updates + factor * scales * params`; parameters of scale 0 keep their very update."""

    def add_one(param: OptParam, update: Tensor, scale: Union[float, Tensor]) -> Tensor:
        rate = factor * scale
        if isinstance(rate, int | float) and rate == 0:
            return update
        return update + scale_array(param.value, rate).astype(update.dtype)

    return jax.tree.map(add_one, params, updates, scales, is_leaf=is_opt_param)


def add_scaled_weights(
    updates: Nested[Tensor],
    params: NestedOptParam,
    *,
    factor: Union[float, Tensor],
    per_param_scale: Optional[PerParamFn],
) -> Nested[Tensor]:
    """`updates + factor * scale * parameter`; the scales are registered only where there is a function of them.

    Args:
        updates: The updates.
        params: The parameters.
        factor: The rate.
        per_param_scale: As for `add_decayed_weights`, instantiated.
    """
    # Without a function the reference's `_regularizer` files of such optimizers have nothing.
    description = None if per_param_scale is None else "weight_decay_scale"
    scales = _weight_decay_scales(params, per_param_scale=per_param_scale, description=description)
    return _add_weights(updates, params, factor=factor, scales=scales)


def add_decayed_weights(
    weight_decay: float,
    *,
    learning_rate_exponent: Optional[float] = None,
    learning_rate: Optional[schedule.Schedule] = None,
    per_param_scale: Optional[ConfigOr[PerParamFn]] = None,
) -> PartitionedGradientTransformation:
    """Adds `weight_decay * scale * parameter` to the updates.

    It belongs after the moments, and before the sign turns.

    Args:
        weight_decay: The rate, at least 0.
        learning_rate_exponent: The rate is multiplied by `learning_rate(step)` to this power; None: it is
            not.
        learning_rate: The schedule for that, required where there is an exponent.
        per_param_scale: From the parameters to their scales; None: all 1. A parameter whose spec has a
            `weight_decay_scale` uses that instead.

    Returns:
        The transformation. Without an exponent it has no state, with one the count of updates.

    Raises:
        ValueError: If there is an exponent without a learning rate.

    Reference:
        Loshchilov and Hutter, Decoupled weight decay regularization (https://arxiv.org/abs/1711.05101),
        algorithm 2.
    """
    scale_fn = maybe_instantiate(per_param_scale)

    def scales_of(params: NestedOptParam) -> Nested[Any]:
        return _weight_decay_scales(params, per_param_scale=scale_fn, description="weight_decay_scale")

    if learning_rate_exponent is None:
        return stateless(
            lambda updates, params: _add_weights(
                updates, params, factor=weight_decay, scales=scales_of(params)
            )
        )
    if learning_rate is None:
        raise ValueError(
            error_message(
                where="add_decayed_weights",
                what=f"learning_rate_exponent={learning_rate_exponent} without a learning_rate",
                expected="both or none of them",
            )
        )
    learning_rate_fn = schedule.as_schedule_fn(learning_rate)

    def init_fn(params: NestedOptParam) -> AddDecayedWeightsState:
        del params
        return AddDecayedWeightsState(count=jnp.zeros([], jnp.int32))

    def update_fn(
        updates: Nested[Tensor], state: AddDecayedWeightsState, params: NestedOptParam
    ) -> tuple[Any, AddDecayedWeightsState]:
        step = optax.safe_increment(state.count)
        factor = weight_decay * learning_rate_fn(step) ** learning_rate_exponent
        updates = _add_weights(updates, params, factor=factor, scales=scales_of(params))
        return updates, AddDecayedWeightsState(count=step)

    def partition_fn(param_specs: Nested[ParameterSpec]) -> AddDecayedWeightsState:
        del param_specs
        return AddDecayedWeightsState(count=scalar_spec())

    return PartitionedGradientTransformation(init=init_fn, update=update_fn, partition=partition_fn)


def l2_regularizer(
    regularizer_weight: float = 0.0, *, per_param_scale: Optional[ConfigOr[PerParamFn]] = None
) -> PartitionedGradientTransformation:
    """Adds the gradient of `regularizer_weight / 2 * scale * sum(parameter ** 2)`.

    It belongs before the moments.

    Args:
        regularizer_weight: The weight of the penalty.
        per_param_scale: As for `add_decayed_weights`.

    Returns:
        The transformation; it has no state.
    """
    scale_fn = maybe_instantiate(per_param_scale)

    def update_tree(updates: Nested[Tensor], params: NestedOptParam) -> Nested[Tensor]:
        scales = _weight_decay_scales(params, per_param_scale=scale_fn, description="l2_regularizer_scale")
        return _add_weights(updates, params, factor=regularizer_weight, scales=scales)

    return stateless(update_tree)
