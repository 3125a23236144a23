"""A traced program as a flat list of operations on values, which is what the estimate of its memory walks."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Optional, Union

import jax.numpy as jnp
from jax.extend import core

from axlearn.common.jax_compat import called_jaxpr

# The mesh axes over which each dimension of a value is split.
DimAxes = tuple[tuple[str, ...], ...]


@dataclasses.dataclass(eq=False, slots=True)
class Value:
    """An array that the program makes or is given.

    Attributes:
        shape: Its shape, over all devices.
        itemsize: Bytes of an element; 0 for what is no array, such as a key.
        axes: How it lies on the mesh, as far as that is known.
    """

    shape: tuple[int, ...]
    itemsize: int
    axes: DimAxes

    @property
    def is_split(self) -> bool:
        """Whether it is known to lie on several devices in parts."""
        return any(self.axes)


@dataclasses.dataclass(eq=False, slots=True)
class Op:
    """One operation.

    Attributes:
        name: The name of its primitive, such as "dot_general".
        params: The parameters of its primitive.
        inputs: What it reads; None for a constant.
        outputs: What it makes.
        bodies: The programs that it runs, of a loop or of the branches of a condition.
    """

    name: str
    params: dict[str, Any]
    inputs: list[Optional[Value]]
    outputs: list[Value]
    bodies: list["Program"] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(eq=False, slots=True)
class Program:
    """A program: its operations in the order in which they were traced, without those that nobody needs.

    Attributes:
        inputs: What it is given.
        ops: What it does. Calls are replaced by what they call.
        outputs: What it returns; None for a constant.
    """

    inputs: list[Value]
    ops: list[Op]
    outputs: list[Optional[Value]]


def flatten(jaxpr: Union[core.Jaxpr, core.ClosedJaxpr], *, min_float_bytes: int = 1) -> Program:
    """Returns a program without calls, and without operations whose results nobody reads.

    Args:
        jaxpr: The program as it was traced.
        min_float_bytes: Bytes of the narrowest float that the devices compute with.
    """
    jaxpr = _open(jaxpr)
    inputs = [_value_of(var, min_float_bytes) for var in jaxpr.invars]
    ops: list[Op] = []
    outputs = _append(jaxpr, inputs, ops, min_float_bytes)
    return Program(inputs=inputs, ops=_needed(ops, outputs), outputs=outputs)


def _open(jaxpr: Any) -> core.Jaxpr:
    return jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr


def _value_of(var: Any, min_float_bytes: int) -> Value:
    shape = tuple(getattr(var.aval, "shape", ()))
    return Value(
        shape=shape,
        itemsize=_itemsize(getattr(var.aval, "dtype", None), min_float_bytes),
        axes=((),) * len(shape),
    )


def _itemsize(dtype: Any, min_float_bytes: int) -> int:
    if dtype is None or not (jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool_)):
        # Keys and tokens have types of their own.
        return 0
    itemsize: int = dtype.itemsize
    return max(itemsize, min_float_bytes) if jnp.issubdtype(dtype, jnp.floating) else itemsize


def _append(
    jaxpr: core.Jaxpr, inputs: Sequence[Optional[Value]], ops: list[Op], min_float_bytes: int
) -> list[Optional[Value]]:
    """Appends the operations of a program to `ops`, and returns its outputs."""
    env: dict[Any, Optional[Value]] = dict(zip(jaxpr.invars, inputs, strict=True))
    env.update((var, None) for var in jaxpr.constvars)

    def read(atom: Any) -> Optional[Value]:
        return None if isinstance(atom, core.Literal) else env[atom]

    for eqn in jaxpr.eqns:
        operands = [read(atom) for atom in eqn.invars]
        callee = called_jaxpr(eqn)
        results: list[Optional[Value]]
        if callee is not None:
            results = _append(callee, operands, ops, min_float_bytes)
        else:
            made = [_value_of(var, min_float_bytes) for var in eqn.outvars]
            results = [*made]
            ops.append(
                Op(
                    name=eqn.primitive.name,
                    params=eqn.params,
                    inputs=operands,
                    outputs=made,
                    bodies=[flatten(body, min_float_bytes=min_float_bytes) for body in _bodies(eqn)],
                )
            )
        env.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _bodies(eqn: Any) -> list[Any]:
    match eqn.primitive.name:
        case "scan" | "shard_map":
            return [eqn.params["jaxpr"]]
        case "while":
            return [eqn.params["body_jaxpr"]]
        case "cond":
            return list(eqn.params["branches"])
    return []


def _needed(ops: list[Op], outputs: Sequence[Optional[Value]]) -> list[Op]:
    """Returns the operations on whose results the outputs depend."""
    wanted = set(map(id, outputs))
    needed = []
    for op in reversed(ops):
        if any(id(value) in wanted for value in op.outputs):
            wanted.update(map(id, op.inputs))
            needed.append(op)
    return needed[::-1]
