"""Rematerialization of a layer: its methods run inside of `jax.checkpoint`."""

import dataclasses
from collections.abc import Callable
from typing import Any, Optional, TypeVar

import jax
import numpy as np

from axlearn.common.config import ConfigOr
from axlearn.common.module import (
    REMAT_NAME,
    InvocationContext,
    new_output_collection,
    set_current_context,
)
from axlearn.common.utils import RematPolicy

_F = TypeVar("_F", bound=Callable[..., Any])

_NO_REMAT = "_axlearn_no_remat"


@dataclasses.dataclass
class RematSpec:
    """Arguments of `jax.checkpoint`.

    Attributes:
        prevent_cse: Whether the compiler is kept from undoing the rematerialization. False inside of a loop
            over layers, where it cannot, and where keeping it from doing so costs speed.
        policy: What to save. None: nothing but the inputs.
    """

    prevent_cse: bool = True
    policy: Optional[ConfigOr[RematPolicy]] = None


def no_remat(fn: _F) -> _F:
    """Marks a method that runs without rematerialization even where the layer has a remat_spec."""
    setattr(fn, _NO_REMAT, True)
    return fn


def needs_remat(fn: Callable[..., Any], context: InvocationContext) -> bool:
    """Whether a method, called in this context of its layer, is rematerialized: in training, and once."""
    return context.is_training and context.name != REMAT_NAME and not getattr(fn, _NO_REMAT, False)


class _Split:
    """The leaves of a tree, arrays apart from everything else."""

    def __init__(self, tree: Any):
        leaves, self._treedef = jax.tree.flatten(tree)
        self._is_array = [isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves]
        self.arrays = [leaf for leaf, is_array in zip(leaves, self._is_array, strict=True) if is_array]
        self._others = [leaf for leaf, is_array in zip(leaves, self._is_array, strict=True) if not is_array]

    def join(self, arrays: list[Any]) -> Any:
        """The tree with other arrays."""
        arrays_left, others_left = iter(arrays), iter(self._others)
        leaves = [next(arrays_left if is_array else others_left) for is_array in self._is_array]
        return jax.tree.unflatten(self._treedef, leaves)


def call_with_remat(
    fn: Callable[..., Any],
    context: InvocationContext,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    **checkpoint_kwargs: Any,
) -> Any:
    """Calls a method in `jax.checkpoint`.

    Arrays among the arguments and the results pass through; whatever else there is, is seen by the trace as
    it is.

    Args:
        fn: The method, unbound.
        context: The current context, that of its module.
        args: Its positional arguments.
        kwargs: Its named arguments.
        checkpoint_kwargs: Arguments of `jax.checkpoint`.

    Returns:
        What the method returns. Its other outputs are in the output collection of `context`.
    """
    inputs = _Split((args, kwargs))
    results: list[_Split] = []

    def run(state: Any, prng_key: Any, arrays: list[Any]) -> list[Any]:
        inner = dataclasses.replace(
            context,
            name=REMAT_NAME,
            parent=context,
            state=state,
            prng_key=prng_key,
            output_collection=new_output_collection(),
        )
        inner_args, inner_kwargs = inputs.join(arrays)
        with set_current_context(inner):
            output = fn(context.module, *inner_args, **inner_kwargs)
        results.append(_Split((output, inner.output_collection)))
        return results[-1].arrays

    arrays = jax.checkpoint(run, **checkpoint_kwargs)(context.state, context.prng_key, inputs.arrays)
    output, outputs = results[-1].join(arrays)
    context.output_collection.update(outputs)
    return output
