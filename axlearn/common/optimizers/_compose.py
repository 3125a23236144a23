"""From optax's transformations to ours, and from parts to a whole."""

from collections.abc import Callable
from typing import Any, Optional

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from axlearn.common.base_layer import ParameterSpec
from axlearn.common.config import ConfigOr, error_message, maybe_instantiate
from axlearn.common.optimizer_base import (
    NestedOptParam,
    OptStateSpec,
    PartitionedGradientTransformation,
    TransformPartitionSpecFn,
    opt_param_values,
)
from axlearn.common.utils import Nested, Tensor


def with_partition_fn(
    base: optax.GradientTransformation, partition_fn: TransformPartitionSpecFn
) -> PartitionedGradientTransformation:
    """Adds to a transformation of optax what says where its state lives.

    Args:
        base: The transformation.
        partition_fn: From the specs of the parameters to the specs of `base`'s state, of the same structure
            as that.

    Returns:
        The transformation.
    """

    def init_fn(params: NestedOptParam) -> Any:
        return base.init(opt_param_values(params))

    def update_fn(updates: Nested[Tensor], state: Any, params: NestedOptParam) -> tuple[Any, Any]:
        return base.update(updates, state, opt_param_values(params))

    return PartitionedGradientTransformation(init=init_fn, update=update_fn, partition=partition_fn)


def no_state_partition(param_specs: Nested[ParameterSpec]) -> optax.EmptyState:
    """The partition function of a transformation without state."""
    del param_specs
    return optax.EmptyState()


def stateless(
    update_tree: Callable[[Nested[Tensor], NestedOptParam], Nested[Tensor]],
) -> PartitionedGradientTransformation:
    """A transformation without state, from a function of the updates and the parameters."""

    def init_fn(params: NestedOptParam) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    def update_fn(updates: Nested[Tensor], state: Any, params: NestedOptParam) -> tuple[Any, Any]:
        return update_tree(updates, params), state

    return PartitionedGradientTransformation(init=init_fn, update=update_fn, partition=no_state_partition)


def copy_partition(
    param_specs: Nested[ParameterSpec], *, dtype: Optional[Any] = None
) -> Nested[OptStateSpec]:
    """The specs of a state that holds an array like each parameter, on the same devices.

    Args:
        param_specs: The specs of the parameters; None for those that are not optimized.
        dtype: The type of the arrays; None: that of the parameter.

    Returns:
        A tree like `param_specs`.
    """

    def copy_one(spec: ParameterSpec) -> OptStateSpec:
        return OptStateSpec(
            shape=tuple(spec.shape),
            dtype=spec.dtype if dtype is None else dtype,
            mesh_axes=spec.mesh_axes,
            memory_kind=spec.memory_kind,
        )

    return jax.tree.map(copy_one, param_specs)


def scalar_spec(dtype: Any = jnp.int32) -> OptStateSpec:
    """The spec of a number that every device has, such as a count of steps."""
    return OptStateSpec(shape=(), dtype=dtype, mesh_axes=PartitionSpec())


def _instantiate_one(arg: Any, *, where: str) -> PartitionedGradientTransformation:
    transformation = maybe_instantiate(arg)
    if not isinstance(transformation, PartitionedGradientTransformation):
        raise TypeError(
            error_message(
                where=where,
                what=f"{type(transformation).__name__} is not a partitioned transformation",
                expected="PartitionedGradientTransformation(init, update, partition), or the config of one",
                advice="Wrap transformations of optax by with_partition_fn",
            )
        )
    return transformation


def chain(*args: ConfigOr[PartitionedGradientTransformation]) -> PartitionedGradientTransformation:
    """Applies transformations one after another, the first to the gradients.

    Args:
        args: The transformations, or their configs.

    Returns:
        A transformation whose state is the tuple of their states.

    Raises:
        TypeError: If one is not a partitioned transformation.
    """
    parts = [_instantiate_one(arg, where=f"chain.args[{i}]") for i, arg in enumerate(args)]

    def init_fn(params: NestedOptParam) -> tuple:
        return tuple(part.init(params) for part in parts)

    def update_fn(updates: Nested[Tensor], state: tuple, params: NestedOptParam) -> tuple[Any, tuple]:
        new_state = []
        for part, part_state in zip(parts, state, strict=True):
            updates, part_state = part.update(updates, part_state, params)
            new_state.append(part_state)
        return updates, tuple(new_state)

    def partition_fn(param_specs: Nested[ParameterSpec]) -> tuple:
        return tuple(part.partition(param_specs) for part in parts)

    return PartitionedGradientTransformation(init=init_fn, update=update_fn, partition=partition_fn)


def named_chain(**kwargs: ConfigOr[PartitionedGradientTransformation]) -> PartitionedGradientTransformation:
    """Like `chain`, with names instead of positions in the state.

    Args:
        kwargs: The transformations, or their configs, by name, in the order in which they are applied.

    Returns:
        A transformation whose state is the dict of their states.

    Raises:
        TypeError: If one is not a partitioned transformation.
    """
    parts = {name: _instantiate_one(arg, where=f"named_chain.{name}") for name, arg in kwargs.items()}

    def init_fn(params: NestedOptParam) -> dict[str, Any]:
        return {name: part.init(params) for name, part in parts.items()}

    def update_fn(updates: Nested[Tensor], state: dict, params: NestedOptParam) -> tuple[Any, dict[str, Any]]:
        new_state = {}
        for name, part in parts.items():
            updates, new_state[name] = part.update(updates, state[name], params)
        return updates, new_state

    def partition_fn(param_specs: Nested[ParameterSpec]) -> dict[str, Any]:
        return {name: part.partition(param_specs) for name, part in parts.items()}

    return PartitionedGradientTransformation(init=init_fn, update=update_fn, partition=partition_fn)
