"""The floating-point operations of a traced program, with its loops counted."""

import math
from collections.abc import Iterator
from typing import Any


def flops_of(jaxpr: Any) -> float:
    """Counts the operations of the matrix products of a program, over all devices.

    What is computed again in the backward pass counts again: the program has it twice. Of a condition the dearer branch
    counts; of a `while` loop, which may run any number of times, one trip. A Pallas kernel counts its body once for
    each place of its grid, also where a mask lets it skip the work.

    Args:
        jaxpr: The traced program.

    Returns:
        The operations; a multiplication and an addition are two.
    """
    total = 0.0
    for equation in _open(jaxpr).eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            total += _dot_flops(equation)
        elif name == "ragged_dot_general" or name == "ragged_dot":
            total += 2.0 * math.prod(equation.outvars[0].aval.shape) * equation.invars[0].aval.shape[-1]
        elif name == "cond":
            total += max((flops_of(branch) for branch in params["branches"]), default=0.0)
        else:
            inner = sum(flops_of(body) for body in _bodies(params))
            total += inner and inner * _times(name, params)
    return total


def _open(jaxpr: Any) -> Any:
    return getattr(jaxpr, "jaxpr", jaxpr)


def _bodies(params: dict[str, Any]) -> Iterator[Any]:
    """Yields the programs that an equation runs; of those of a custom derivative, what is computed."""
    for name, value in params.items():
        if name in ("fwd_jaxpr_thunk", "bwd", "jvp_jaxpr_fun", "cond_jaxpr"):
            continue
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(_open(item), "eqns"):
                yield item


def _times(name: str, params: dict[str, Any]) -> float:
    if name == "scan":
        return float(params["length"])
    if name == "shard_map":
        mesh = params["mesh"]
        axes = params.get("manual_axes") or mesh.axis_names
        return float(math.prod(mesh.shape[axis] for axis in axes))
    if name == "pallas_call":
        grid = params["grid_mapping"].grid
        return float(math.prod(size if isinstance(size, int) else 1 for size in grid))
    return 1.0


def _dot_flops(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    lhs = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(lhs[dim] for dim in contracted)
