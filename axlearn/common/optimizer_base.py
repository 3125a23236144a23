"""What an optimizer is: three functions, the third of which says where its state lives on the mesh."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Optional, Protocol

import jax
import jax.numpy as jnp

from axlearn.common.base_layer import FactorizationSpec, ParameterSpec
from axlearn.common.utils import Nested, Tensor, TensorSpec

# Shape, type and place of one array of an optimizer's state.
OptStateSpec = TensorSpec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OptParam:
    """A parameter as an optimizer sees it.

    It is a tree with one leaf, so that trees of parameters pass through jit. Functions that want it whole map
    with `is_leaf=is_opt_param`.

    Attributes:
        value: The parameter, float.
        factorization_spec: Which of its dimensions a factored second moment may sum over; None: not factored.
        weight_decay_scale: What its weight decay is multiplied by; None: as the optimizer says.
    """

    value: Tensor
    factorization_spec: Optional[FactorizationSpec] = dataclasses.field(
        default=None, metadata={"static": True}
    )
    weight_decay_scale: Optional[float] = dataclasses.field(default=None, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the value."""
        return self.value.shape

    @property
    def dtype(self) -> jnp.dtype:
        """The type of the value."""
        return self.value.dtype

    @property
    def ndim(self) -> int:
        """The rank of the value."""
        return self.value.ndim


NestedOptParam = Nested[OptParam]


def is_opt_param(node: Any) -> bool:
    """Whether `node` is an OptParam: the `is_leaf` of maps over trees of them."""
    return isinstance(node, OptParam)


def opt_param_values(params: NestedOptParam) -> Nested[Tensor]:
    """The values of a tree of OptParam; None where there is None."""
    return jax.tree.map(lambda param: param.value, params, is_leaf=is_opt_param)


def make_opt_params(
    model_params: Nested[Tensor], *, model_param_specs: Optional[Nested[ParameterSpec]] = None
) -> NestedOptParam:
    """Puts parameters and what their specs tell an optimizer together.

    Args:
        model_params: The parameters.
        model_param_specs: Their specs, a tree of the same structure; None: nothing is known about them.

    Returns:
        A tree like `model_params`.
    """
    if model_param_specs is None:
        return jax.tree.map(OptParam, model_params)

    def join(value: Tensor, spec: ParameterSpec) -> OptParam:
        factorization = spec.factorization
        if factorization is not None:
            # Hashable, as whatever is static under jit must be; layers mostly give a list.
            factorization = FactorizationSpec(axes=tuple(factorization.axes))
        return OptParam(
            value=value, factorization_spec=factorization, weight_decay_scale=spec.weight_decay_scale
        )

    return jax.tree.map(join, model_params, model_param_specs)


class InitFn(Protocol):
    """Makes the first state of an optimizer."""

    def __call__(self, params: NestedOptParam) -> Any:
        """Takes the parameters, None for those that are not optimized, and returns the state."""


class UpdateFn(Protocol):
    """Turns gradients, or the updates of the optimizer before it in a chain, into updates."""

    def __call__(self, updates: Nested[Tensor], state: Any, params: NestedOptParam) -> tuple[Any, Any]:
        """Returns updates, which the caller adds to the parameters, and a new state of the same structure."""


# From the specs of the parameters (None for those that are not optimized) to those of the state, which has
# the same structure as the state itself.
TransformPartitionSpecFn = Callable[[Nested[ParameterSpec]], Any]


class PartitionedGradientTransformation(NamedTuple):
    """An optimizer, or a part of one: `optax.GradientTransformation` with a third function.

    Attributes:
        init: Makes the state from the parameters.
        update: Makes updates from gradients; the caller adds them to the parameters.
        partition: Makes the specs of the state from those of the parameters, without any array.
    """

    init: InitFn
    update: UpdateFn
    partition: TransformPartitionSpecFn
