"""Numbers that differ between parameters: making them, applying them, writing them down for review."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Optional, Union

import jax
import jax.numpy as jnp

from axlearn.common.config import ConfigOr, maybe_instantiate
from axlearn.common.module import current_context
from axlearn.common.optimizer_base import (
    NestedOptParam,
    OptParam,
    PartitionedGradientTransformation,
    is_opt_param,
    opt_param_values,
)
from axlearn.common.optimizers._compose import stateless
from axlearn.common.utils import (
    Nested,
    Tensor,
    flatten_items,
    match_regex_rules,
    tree_paths,
    vectorized_tree_map,
)

# From a tree of parameters to a tree of numbers: Python's where they do not depend on the values.
PerParamFn = Callable[[NestedOptParam], Nested[Union[float, Tensor]]]


@dataclasses.dataclass(frozen=True)
class PerParamSettings:
    """What `register_per_param_settings` was told once.

    Attributes:
        description: What the numbers are, such as "weight_decay_scale".
        path: The context in which they are used, such as "root.optimizer".
        settings: The numbers by the path of the parameter.
    """

    description: str
    path: str
    settings: dict[str, Any]

    def __str__(self) -> str:
        """A header, then one line per parameter, sorted: the text of the `_regularizer` golden files."""
        bar = "=" * 20
        lines = [f"{path}: {value}" for path, value in sorted(self.settings.items())]
        return "\n".join([f"{bar}{self.description} {self.path}{bar}", *lines])


_collected: contextvars.ContextVar[Optional[list[PerParamSettings]]] = contextvars.ContextVar(
    "per_param_settings", default=None
)


@contextlib.contextmanager
def collect_per_param_settings() -> Iterator[list[PerParamSettings]]:
    """Collects what this thread registers inside the `with` block, in a list that grows meanwhile."""
    records: list[PerParamSettings] = []
    token = _collected.set(records)
    try:
        yield records
    finally:
        _collected.reset(token)


def register_per_param_settings(
    settings: Nested[Any], *, description: str, path: Optional[str] = None
) -> Nested[Any]:
    """Tells `collect_per_param_settings`, where that is active, about numbers that depend on the parameter.

    Args:
        settings: A tree of numbers like the parameters; None for parameters that have none.
        description: What they are.
        path: Where they are used; None: the path of the current context.

    Returns:
        `settings`.
    """
    records = _collected.get()
    if records is not None:
        context = current_context()
        if path is None:
            path = "" if context is None else context.path()
        records.append(
            PerParamSettings(description=description, path=path, settings=dict(flatten_items(settings)))
        )
    return settings


def per_param_scale_by_path(
    *, description: str, scale_by_path: Sequence[tuple[str, float]], default_scale: float = 1.0
) -> PerParamFn:
    """Numbers by the path of the parameter.

    Rules may match nothing: one list serves models that differ in which layers they have.

    Args:
        description: What the numbers are; goes to `register_per_param_settings`.
        scale_by_path: Regular expressions and numbers. The first that matches the whole path, such as
            "decoder/emb/token_emb/weight", counts.
        default_scale: The number where none matches.

    Returns:
        The function from parameters to numbers.
    """

    def scale_of(path: str) -> float:
        return match_regex_rules(path, rules=scale_by_path, default_value=default_scale)

    def fn(params: NestedOptParam) -> Nested[float]:
        scales = jax.tree.map(scale_of, tree_paths(params, is_leaf=is_opt_param))
        return register_per_param_settings(scales, description=description)

    return fn


def root_mean_square(x: Tensor) -> Tensor:
    """The root of the mean of the squares of all elements, in float32; 0 for an empty array."""
    return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32))) / max(x.size, 1))


def per_param_scale_by_rms(*, min_scale: float = 1e-4) -> PerParamFn:
    """The root mean square of each parameter, so that updates are relative to it.

    The layers of a Repeat count one by one.

    Args:
        min_scale: The least scale, so that parameters that start at zero can leave it.

    Returns:
        The function from parameters to numbers.
    """

    def fn(params: NestedOptParam) -> Nested[Tensor]:
        return vectorized_tree_map(
            lambda value: jnp.maximum(root_mean_square(value), min_scale), opt_param_values(params)
        )

    return fn


def scale_array(x: Tensor, scale: Union[float, Tensor]) -> Tensor:
    """`x * scale` in the type of `x`.

    Args:
        x: An array.
        scale: A Python number, of which 0 gives exact zeros and 1 the very array, or an array: a scalar, or
            one number per entry along the leading dimensions of `x`, such as one per layer.

    Returns:
        The product.
    """
    if isinstance(scale, int | float):
        if scale == 0:
            return jnp.zeros_like(x)
        return x if scale == 1 else x * scale
    scale = scale.reshape(scale.shape + (1,) * (x.ndim - scale.ndim)) if scale.ndim else scale
    return (x * scale).astype(x.dtype)


def scale_update_per_param(per_param_scale: ConfigOr[PerParamFn]) -> PartitionedGradientTransformation:
    """Multiplies the update of each parameter by a number of its own.

    Args:
        per_param_scale: The numbers, from the parameters; 0 leaves this parameter without an update.

    Returns:
        The transformation.
    """
    scale_fn = maybe_instantiate(per_param_scale)

    def scale_one(param: OptParam, update: Tensor, scale: Union[float, Tensor]) -> Tensor:
        del param
        return scale_array(update, scale)

    def update_tree(updates: Nested[Tensor], params: NestedOptParam) -> Nested[Tensor]:
        return jax.tree.map(scale_one, params, updates, scale_fn(params), is_leaf=is_opt_param)

    return stateless(update_tree)
