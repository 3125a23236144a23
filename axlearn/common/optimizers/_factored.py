"""Adafactor's parts: second moments kept as the product of a row and a column, and trust ratios."""

from typing import Any, NamedTuple, Optional

import jax
import jax.numpy as jnp
import optax

from axlearn.common import schedule
from axlearn.common.base_layer import FactorizationSpec, ParameterSpec
from axlearn.common.config import error_message
from axlearn.common.optimizer_base import (
    NestedOptParam,
    OptParam,
    OptStateSpec,
    PartitionedGradientTransformation,
    is_opt_param,
    opt_param_values,
)
from axlearn.common.optimizers._compose import scalar_spec, stateless
from axlearn.common.optimizers._per_param import root_mean_square, scale_array
from axlearn.common.utils import Nested, Tensor, vectorized_tree_map


class _Moments(NamedTuple):
    """Second moments of one parameter, or their specs: either `row` and `col` or `full`; what is not used has
    one element, 0."""

    row: Any
    col: Any
    full: Any


class _Dims(NamedTuple):
    """Which dimensions of a parameter are its rows and columns."""

    row: int
    col: int


def _factored_dims(
    shape: tuple[int, ...], spec: Optional[FactorizationSpec], *, factored: bool
) -> Optional[_Dims]:
    """Returns the dimensions to factor by; None: the moments are kept in full."""
    if not factored or spec is None:
        return None
    axes = tuple(spec.axes)
    if len(axes) != len(shape):
        raise ValueError(
            error_message(
                where="factorization",
                what=f"{axes} for a parameter of shape {tuple(shape)}",
                expected=f"{len(shape)} entries",
            )
        )
    if axes.count("row") != 1 or axes.count("col") != 1:
        return None
    return _Dims(row=axes.index("row"), col=axes.index("col"))


def _without(values: Any, dim: int) -> tuple:
    values = tuple(values)
    return (*values[:dim], *values[dim + 1 :])


def _split(tree: Nested[_Moments]) -> dict[str, Any]:
    """Returns the three trees of which `FactoredState` consists."""
    is_leaf = lambda node: isinstance(node, _Moments)  # noqa: E731
    names = {"v_row": "row", "v_col": "col", "v": "full"}
    return {
        name: jax.tree.map(lambda m, field=field: getattr(m, field), tree, is_leaf=is_leaf)
        for name, field in names.items()
    }


def scale_by_factored_rms(
    factored: bool = True, *, decay_rate: schedule.Schedule, epsilon: float = 1e-30
) -> PartitionedGradientTransformation:
    """Divides gradients by the root of their second moments, which are kept as a product where that is allowed.

    Where `FactorizationSpec` names a dimension "row" and one "col", the state has the moments' means over
    columns (`v_row`) and over rows (`v_col`), on the devices where the parameter's rows and columns are, and
    `v` has one element. All other dimensions, such as that of the layers of a Repeat, count one by one. Where it
    does not, `v` has the moments in full and the other two have one element.

    Args:
        factored: False: nothing is factored.
        decay_rate: Decay of the moments, by step from 1.
        epsilon: Is added to the squares.

    Returns:
        The transformation. Its state is `optax.FactoredState`.

    Raises:
        ValueError: If a `FactorizationSpec` has another number of dimensions than its parameter.

    Reference:
        Shazeer and Stern, Adafactor (https://arxiv.org/abs/1804.04235), algorithms 1 and 4.
    """
    decay_fn = schedule.as_schedule_fn(decay_rate)

    def init_one(param: OptParam) -> _Moments:
        dims = _factored_dims(param.shape, param.factorization_spec, factored=factored)
        unused = jnp.zeros([1], param.dtype)
        if dims is None:
            return _Moments(row=unused, col=unused, full=jnp.zeros(param.shape, param.dtype))
        return _Moments(
            row=jnp.zeros(_without(param.shape, dims.col), param.dtype),
            col=jnp.zeros(_without(param.shape, dims.row), param.dtype),
            full=unused,
        )

    def init_fn(params: NestedOptParam) -> optax.FactoredState:
        moments = jax.tree.map(init_one, params, is_leaf=is_opt_param)
        return optax.FactoredState(count=jnp.zeros([], jnp.int32), **_split(moments))

    def update_fn(
        updates: Nested[Tensor], state: optax.FactoredState, params: NestedOptParam
    ) -> tuple[Any, optax.FactoredState]:
        step = optax.safe_increment(state.count)
        decay = decay_fn(step)

        def update_one(param: OptParam, grad: Tensor, row: Tensor, col: Tensor, full: Tensor) -> Any:
            dims = _factored_dims(param.shape, param.factorization_spec, factored=factored)
            old = _Moments(row=row, col=col, full=full)
            return _rescale(grad, old, dims=dims, decay=decay, epsilon=epsilon)

        results = jax.tree.map(
            update_one, params, updates, state.v_row, state.v_col, state.v, is_leaf=is_opt_param
        )
        is_pair = lambda node: isinstance(node, _Rescaled)  # noqa: E731
        new_updates = jax.tree.map(lambda r: r.update, results, is_leaf=is_pair)
        moments = jax.tree.map(lambda r: r.moments, results, is_leaf=is_pair)
        return new_updates, optax.FactoredState(count=step, **_split(moments))

    def partition_one(spec: ParameterSpec) -> _Moments:
        dims = _factored_dims(tuple(spec.shape), spec.factorization, factored=factored)
        mesh_axes = tuple(spec.mesh_axes or ())
        mesh_axes = (*mesh_axes, *(None for _ in spec.shape[len(mesh_axes) :]))
        unused = OptStateSpec(shape=(1,), dtype=spec.dtype, mesh_axes=jax.sharding.PartitionSpec(None))

        def place(dropped: Optional[int]) -> OptStateSpec:
            axes = mesh_axes if dropped is None else _without(mesh_axes, dropped)
            return OptStateSpec(
                shape=tuple(spec.shape) if dropped is None else _without(spec.shape, dropped),
                dtype=spec.dtype,
                mesh_axes=spec.mesh_axes if dropped is None else jax.sharding.PartitionSpec(*axes),
                memory_kind=spec.memory_kind,
            )

        if dims is None:
            return _Moments(row=unused, col=unused, full=place(None))
        return _Moments(row=place(dims.col), col=place(dims.row), full=unused)

    def partition_fn(param_specs: Nested[ParameterSpec]) -> optax.FactoredState:
        moments = jax.tree.map(partition_one, param_specs)
        return optax.FactoredState(count=scalar_spec(), **_split(moments))

    return PartitionedGradientTransformation(init=init_fn, update=update_fn, partition=partition_fn)


class _Rescaled(NamedTuple):
    """What `_rescale` makes of one gradient."""

    update: Tensor
    moments: _Moments


def _rescale(
    grad: Tensor, old: _Moments, *, dims: Optional[_Dims], decay: Tensor, epsilon: float
) -> _Rescaled:
    """Divides one gradient by the root of its moments, in float32."""
    dtype = grad.dtype
    grad = grad.astype(jnp.float32)
    square = jnp.square(grad) + epsilon

    def average(before: Tensor, now: Tensor) -> Tensor:
        return decay * before.astype(jnp.float32) + (1.0 - decay) * now

    if dims is None:
        full = average(old.full, square)
        moments = old._replace(full=full.astype(old.full.dtype))
        return _Rescaled(update=(grad * jax.lax.rsqrt(full)).astype(dtype), moments=moments)
    row = average(old.row, jnp.mean(square, axis=dims.col))
    col = average(old.col, jnp.mean(square, axis=dims.row))
    row_dim = dims.row - (dims.col < dims.row)
    # Their product over the mean of one of them has the sums of rows and columns that were averaged.
    row_factor = jax.lax.rsqrt(row / jnp.mean(row, axis=row_dim, keepdims=True))
    update = grad * jnp.expand_dims(row_factor, dims.col) * jnp.expand_dims(jax.lax.rsqrt(col), dims.row)
    moments = old._replace(row=row.astype(old.row.dtype), col=col.astype(old.col.dtype))
    return _Rescaled(update=update.astype(dtype), moments=moments)


def scale_by_trust_ratio() -> PartitionedGradientTransformation:
    """Makes each update as long as its parameter; where one of the two is zero it stays as it is.

    The layers of a Repeat count one by one.

    Returns:
        The transformation; it has no state.

    Reference:
        You et al., Large batch training of convolutional networks (https://arxiv.org/abs/1708.03888),
        algorithm 1, without its coefficient.
    """

    def scale_one(update: Tensor, value: Tensor) -> Tensor:
        update_rms, value_rms = root_mean_square(update), root_mean_square(value)
        is_defined = (update_rms > 0) & (value_rms > 0)
        ratio = jnp.where(is_defined, value_rms / jnp.where(is_defined, update_rms, 1.0), 1.0)
        return scale_array(update, ratio)

    def update_tree(updates: Nested[Tensor], params: NestedOptParam) -> Nested[Tensor]:
        return vectorized_tree_map(scale_one, updates, opt_param_values(params))

    return stateless(update_tree)
