"""Where the values of a program lie on the mesh: a plain form of the propagation that the compiler does.

What the state, the batch and the constraints in the program say is passed on to the values between them, from
operands to results and, for what is computed element by element, back again. What nobody says anything about
counts as a whole copy on every device, so what comes out errs on the side of too much.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Optional

from jax.sharding import NamedSharding, PartitionSpec

from axlearn.common.dry_run._program import DimAxes, Op, Program, Value
from axlearn.common.jax_compat import scan_operand_counts, shard_map_specs

# Of the same shape as their operand, but not computed element by element.
_MIXING = (
    "sort",
    "rev",
    "cumsum",
    "cumprod",
    "cummax",
    "cummin",
    "cumlogsumexp",
    "gather",
    "dynamic_update_slice",
)
_REDUCTIONS = ("argmax", "argmin")


def place(
    program: Program, *, inputs: Sequence[Optional[DimAxes]], outputs: Sequence[Optional[DimAxes]]
) -> None:
    """Says of every value of a program how it lies on the mesh.

    Args:
        program: The program; its values are changed.
        inputs: How each input lies; None where that is not known.
        outputs: How each output has to lie; None where the program decides.
    """
    for value, axes in zip(program.inputs, inputs, strict=True):
        if axes is not None:
            value.axes = axes
    for op in program.ops:
        _forward(op)
    for result, axes in zip(program.outputs, outputs, strict=True):
        _tell(result, axes)
    for op in reversed(program.ops):
        _backward(op)


def is_elementwise(op: Op) -> bool:
    """Returns whether each element of the results depends on the same element of the operands alone."""
    if op.bodies or not op.outputs or op.name in _MIXING or op.name.startswith("scatter"):
        return False
    shape = op.outputs[0].shape
    return all(value.shape == shape for value in op.outputs) and all(
        value is None or value.shape == () or _repeats_to(value.shape, shape) for value in op.inputs
    )


def _repeats_to(shape: tuple[int, ...], result: tuple[int, ...]) -> bool:
    """Returns whether an operand of an operation on elements is the result's shape, or of size 1 in some dims."""
    return len(shape) == len(result) and all(a in (1, b) for a, b in zip(shape, result, strict=True))


def axes_of_sharding(sharding: Any, *, ndim: int, undecided: Optional[DimAxes] = None) -> DimAxes:
    """Returns the mesh axes of each dimension under a sharding, without those that have one device.

    Args:
        sharding: A `NamedSharding`; of any other kind nothing is known.
        ndim: The number of dimensions.
        undecided: The axes of dimensions that the sharding leaves to the compiler. None: none.
    """
    if not isinstance(sharding, NamedSharding):
        return ((),) * ndim
    sizes = sharding.mesh.shape

    def axes(dim: int, entry: Any) -> tuple[str, ...]:
        if entry is PartitionSpec.UNCONSTRAINED:
            return () if undecided is None else undecided[dim]
        names = (entry,) if isinstance(entry, str) else entry or ()
        return tuple(name for name in names if sizes[name] > 1)

    known = [axes(dim, entry) for dim, entry in enumerate(sharding.spec)]
    return _distinct([*known, *[()] * (ndim - len(known))])


def _tell(value: Optional[Value], axes: Optional[DimAxes]) -> None:
    """Lets a value of which nothing is known lie as `axes` say."""
    if value is not None and axes is not None and not value.is_split and len(axes) == len(value.shape):
        value.axes = axes


def _distinct(entries: Iterable[tuple[str, ...]]) -> DimAxes:
    """Leaves each mesh axis to the first dimension that has it."""
    seen: set[str] = set()
    distinct = []
    for entry in entries:
        distinct.append(tuple(axis for axis in entry if axis not in seen))
        seen.update(entry)
    return tuple(distinct)


def _merged(candidates: Iterable[DimAxes]) -> DimAxes:
    """Returns, for each dimension, the axes of the candidate that splits it over most of them."""
    return _distinct(max(entries, key=len) for entries in zip(*candidates, strict=True))


def _forward(op: Op) -> None:
    operand = op.inputs[0] if op.inputs else None
    if op.bodies:
        _place_bodies(op)
    elif op.name == "sharding_constraint":
        for value in op.outputs:
            value.axes = axes_of_sharding(
                op.params["sharding"],
                ndim=len(value.shape),
                undecided=None if operand is None else operand.axes,
            )
    elif is_elementwise(op):
        result = op.outputs[0]
        candidates = [
            _kept_where_equal(value, result)
            for value in op.inputs
            if value is not None and len(value.shape) == len(result.shape)
        ]
        if candidates and result.shape:
            for value in op.outputs:
                value.axes = _merged(candidates)
    elif operand is not None:
        for value in op.outputs:
            value.axes = _axes_after(op, operand, value)


def _axes_after(op: Op, operand: Value, result: Value) -> DimAxes:
    """Returns how the result of an operation lies that rearranges or contracts dimensions."""
    axes = operand.axes
    match op.name:
        case "dot_general":
            return _axes_after_dot(op)
        case "transpose":
            return tuple(axes[dim] for dim in op.params["permutation"])
        case "broadcast_in_dim":
            entries: list[tuple[str, ...]] = [()] * len(result.shape)
            for dim, target in enumerate(op.params["broadcast_dimensions"]):
                if operand.shape[dim] == result.shape[target]:
                    entries[target] = axes[dim]
            return tuple(entries)
        case "reshape" | "squeeze" | "expand_dims":
            return _axes_after_reshape(operand, result.shape)
        case "gather":
            return _axes_after_gather(op, result)
        case "split" | "slice" | "pad" | "concatenate" | "dynamic_slice" | "dynamic_update_slice" | "rev":
            return axes if len(axes) == len(result.shape) else ((),) * len(result.shape)
        case "unstack":
            dim = op.params["axis"]
            return axes[:dim] + axes[dim + 1 :]
        case "stack":
            dim = op.params["axis"]
            return (*axes[:dim], (), *axes[dim:])
        case name if name.startswith("reduce_") or name in _REDUCTIONS:
            reduced = op.params.get("axes", ())
            kept = tuple(entry for dim, entry in enumerate(axes) if dim not in reduced)
            return kept if len(kept) == len(result.shape) else ((),) * len(result.shape)
    return _kept_where_equal(operand, result)


def _kept_where_equal(operand: Value, result: Value) -> DimAxes:
    if len(operand.shape) != len(result.shape):
        return ((),) * len(result.shape)
    return tuple(
        entry if before == after else ()
        for entry, before, after in zip(operand.axes, operand.shape, result.shape, strict=True)
    )


def _axes_after_dot(op: Op) -> DimAxes:
    (lhs_contracting, rhs_contracting), (lhs_batch, rhs_batch) = op.params["dimension_numbers"]
    lhs, rhs = op.inputs

    def entries(value: Optional[Value], dims: Iterable[int], ndim: int) -> list[tuple[str, ...]]:
        return [()] * ndim if value is None else [value.axes[dim] for dim in dims]

    def free(value: Optional[Value], *used: Sequence[int]) -> list[int]:
        taken = {dim for dims in used for dim in dims}
        return [] if value is None else [d for d in range(len(value.shape)) if d not in taken]

    batch = _merged(
        [
            tuple(entries(lhs, lhs_batch, len(lhs_batch))),
            tuple(entries(rhs, rhs_batch, len(rhs_batch))),
        ]
    )
    lhs_free, rhs_free = free(lhs, lhs_contracting, lhs_batch), free(rhs, rhs_contracting, rhs_batch)
    result = [*batch, *entries(lhs, lhs_free, 0), *entries(rhs, rhs_free, 0)]
    missing = len(op.outputs[0].shape) - len(result)
    return _distinct([*result, *[()] * missing])


def _axes_after_reshape(operand: Value, shape: tuple[int, ...]) -> DimAxes:
    """Keeps the axes of dimensions that stay, and of the outermost of those that are split or joined."""
    entries: list[tuple[str, ...]] = [()] * len(shape)
    i = j = 0
    while i < len(operand.shape) and j < len(shape):
        first_i, first_j = i, j
        size_i, size_j = operand.shape[i], shape[j]
        while size_i != size_j:
            if size_i < size_j and i + 1 < len(operand.shape):
                i += 1
                size_i *= operand.shape[i]
            elif size_j < size_i and j + 1 < len(shape):
                j += 1
                size_j *= shape[j]
            else:
                return tuple(entries)
        # Dimensions of size 1 in front say nothing.
        while first_i < i and operand.shape[first_i] == 1:
            first_i += 1
        while first_j < j and shape[first_j] == 1:
            first_j += 1
        entries[first_j] = operand.axes[first_i]
        i, j = i + 1, j + 1
    return tuple(entries)


def _axes_after_gather(op: Op, result: Value) -> DimAxes:
    """Rows of a table: what the indices are split over, then what the columns of the table are."""
    table, indices = op.inputs[0], op.inputs[1]
    numbers = op.params["dimension_numbers"]
    entries: list[tuple[str, ...]] = [()] * len(result.shape)
    if table is not None:
        dropped = (*numbers.collapsed_slice_dims, *getattr(numbers, "operand_batching_dims", ()))
        kept = [dim for dim in range(len(table.shape)) if dim not in dropped]
        for dim, target in zip(kept, numbers.offset_dims, strict=True):
            if table.shape[dim] == result.shape[target]:
                entries[target] = table.axes[dim]
    if indices is not None:
        targets = [dim for dim in range(len(result.shape)) if dim not in numbers.offset_dims]
        for entry, target in zip(indices.axes[:-1], targets, strict=True):
            entries[target] = entry
    return _distinct(entries)


def _place_bodies(op: Op) -> None:
    match op.name:
        case "scan":
            _place_scan(op)
        case "while":
            body = op.bodies[0]
            carry = op.inputs[op.params["cond_nconsts"] :]
            place(
                body,
                inputs=[None if v is None else v.axes for v in carry],
                outputs=[None] * len(body.outputs),
            )
            _take_over(op.outputs, body.outputs)
        case "shard_map":
            _place_shard_map(op)
        case _:
            for branch in op.bodies:
                place(
                    branch,
                    inputs=[None if v is None else v.axes for v in op.inputs[1:]],
                    outputs=[None] * len(branch.outputs),
                )
                _take_over(op.outputs, branch.outputs)


def _place_shard_map(op: Op) -> None:
    """Places the program of each device, whose arrays are parts already, and the results as their specs say."""
    body, specs = op.bodies[0], shard_map_specs(op.params)

    def within(value: Optional[Value]) -> Optional[DimAxes]:
        if value is None:
            return None
        return tuple(tuple(axis for axis in entry if axis not in specs.axes) for entry in value.axes)

    place(body, inputs=[within(value) for value in op.inputs], outputs=[None] * len(body.outputs))
    for value, result, spec in zip(op.outputs, body.outputs, specs.outputs, strict=True):
        inside = ((),) * len(value.shape) if result is None else result.axes
        outside = (*spec, *[()] * (len(value.shape) - len(spec)))
        value.axes = _distinct((*a, *b) for a, b in zip(outside, inside, strict=True))


def _take_over(values: Sequence[Value], results: Sequence[Optional[Value]]) -> None:
    for value, result in zip(values, results, strict=True):
        if result is not None:
            _tell(value, result.axes)


def _place_scan(op: Op) -> None:
    """Places the body of a loop, and the loop's results; what is carried lies the same at both ends."""
    body = op.bodies[0]
    num_consts, num_carry = scan_operand_counts(op.params)
    num_fixed = num_consts + num_carry

    def body_inputs() -> list[Optional[DimAxes]]:
        axes = [None if value is None else value.axes for value in op.inputs]
        return [*axes[:num_fixed], *(None if entry is None else entry[1:] for entry in axes[num_fixed:])]

    outer = [value.axes if value.is_split else None for value in op.outputs]
    carry, stacked = outer[:num_carry], outer[num_carry:]
    inside = [*carry, *(None if entry is None else entry[1:] for entry in stacked)]
    place(body, inputs=body_inputs(), outputs=inside)
    for i, (value, result) in enumerate(zip(op.outputs, body.outputs, strict=True)):
        if result is not None:
            _tell(value, result.axes if i < num_carry else ((), *result.axes))
    for value, initial in zip(op.outputs[:num_carry], op.inputs[num_consts:num_fixed], strict=True):
        _tell(initial, value.axes)
        if initial is not None:
            _tell(value, initial.axes)


def _backward(op: Op) -> None:
    """Lets operands of which nothing is known lie as the results do."""
    if op.name == "scan":
        _place_scan(op)
    elif is_elementwise(op) and op.name != "sharding_constraint":
        known = [value.axes for value in op.outputs if value.is_split]
        if known:
            for value in (*op.inputs, *op.outputs):
                if value is not None and value.shape == op.outputs[0].shape:
                    _tell(value, known[0])
    elif op.name == "transpose" and op.outputs[0].is_split:
        axes: list[tuple[str, ...]] = [()] * len(op.outputs[0].shape)
        for dim, source in enumerate(op.params["permutation"]):
            axes[source] = op.outputs[0].axes[dim]
        _tell(op.inputs[0], tuple(axes))
    elif op.name in ("reshape", "squeeze", "expand_dims") and op.outputs[0].is_split:
        operand = op.inputs[0]
        if operand is not None:
            _tell(operand, _axes_after_reshape(op.outputs[0], operand.shape))
