"""How many bytes a program holds at its peak, by when each of its values is made and last read.

The compiler decides in the end. What it is expected to do is modelled by four rules:

- Operations on single elements, and those that only move elements about, are computed where they are read and take
  no memory, unless what reads them is a matrix product, a loop or another operation that needs whole arrays, or
  they are costly and read more than once.
- A reshaped or transposed value is the value itself.
- A result takes the place of an operand that is not read again, if it is computed element by element.
- A matrix that is split over axes that split the batch as well is gathered for the length of its product, and what a
  `shard_map` wants whole for the length of its program.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Optional

from axlearn.common.dry_run._placement import is_elementwise
from axlearn.common.dry_run._program import DimAxes, Op, Program, Value
from axlearn.common.jax_compat import scan_operand_counts

# The same bytes, read in another way.
_VIEWS = (
    "reshape", "squeeze", "expand_dims", "transpose", "copy", "copy_p", "name", "stop_gradient", "optimization_barrier"
)  # fmt: skip
# Moved elements, which whoever reads them finds himself.
_MOVES = ("broadcast_in_dim", "slice", "pad", "iota", "concatenate", "split", "stack", "unstack", "rev")
# Write into an operand.
_UPDATES = ("scatter", "dynamic_update_slice")
# What the compiler computes once rather than for each reader.
_COSTLY = (
    "exp",
    "exp2",
    "log",
    "log1p",
    "tanh",
    "logistic",
    "erf",
    "erf_inv",
    "sin",
    "cos",
    "pow",
    "random_bits",
)


class _Places:
    """Which value holds the bytes of a value, and how many these are."""

    def __init__(self, axis_sizes: Mapping[str, int]):
        self._axis_sizes = axis_sizes
        self._roots: dict[int, Value] = {}

    def root(self, value: Value) -> Value:
        return self._roots.get(id(value), value)

    def alias(self, value: Value, source: Value) -> None:
        self._roots[id(value)] = self.root(source)

    def size(self, value: Value, axes: Optional[DimAxes] = None) -> int:
        """Bytes on each device."""
        shards = [
            math.prod(self._axis_sizes.get(axis, 1) for axis in entry)
            for entry in (value.axes if axes is None else axes)
        ]
        return value.itemsize * math.prod(-(-dim // n) for dim, n in zip(value.shape, shards, strict=True))


def peak_bytes(program: Program, *, axis_sizes: Mapping[str, int], donated: Collection[int] = ()) -> int:
    """Returns the most bytes per device that a program holds at once, its inputs not counted.

    Args:
        program: The program, placed on the mesh.
        axis_sizes: The sizes of the mesh axes.
        donated: The numbers of the outputs that are written in the place of inputs.
    """
    kept = _present(program.outputs)
    in_place = _present([program.outputs[i] for i in donated])
    return _Walk(program, axis_sizes=axis_sizes, in_place=in_place, kept=kept).peak()


class _Walk:
    """One pass over a program.

    Args:
        program: The program.
        axis_sizes: The sizes of the mesh axes.
        in_place: Values that take no bytes of their own.
        kept: Values that live to the end.
        sliced: Inputs that are parts of arrays outside: to be read where they are, or copied.
    """

    def __init__(
        self,
        program: Program,
        *,
        axis_sizes: Mapping[str, int],
        in_place: Sequence[Value],
        kept: Sequence[Value],
        sliced: Sequence[Value] = (),
    ):
        self._ops = program.ops
        self._axis_sizes = axis_sizes
        self._places = _Places(axis_sizes)
        self._find_views()
        self._in_place = self._roots_of(in_place)
        self._kept = self._roots_of(kept)
        self._is_free = {id(value) for value in program.inputs} - {id(value) for value in sliced}
        self._sliced = sliced
        self._is_virtual = self._find_virtual()

    def _roots_of(self, values: Sequence[Value]) -> set[int]:
        return {id(self._places.root(value)) for value in values}

    def _find_views(self) -> None:
        for op in self._ops:
            if _is_view(op):
                for value, source in zip(op.outputs, op.inputs, strict=False):
                    if source is not None:
                        self._places.alias(value, source)

    def _find_virtual(self) -> set[int]:
        """Finds what is computed where it is read."""
        candidates = {id(self._places.root(value)) for value in self._sliced}
        costly: set[int] = set()
        for op in self._ops:
            if not _is_view(op) and _is_fusable(op):
                candidates.update(id(self._places.root(value)) for value in op.outputs)
                if _is_costly(op):
                    costly.update(id(value) for value in op.outputs)
        num_readers: dict[int, int] = {}
        for op in self._ops:
            if _is_view(op):
                continue
            for operand in _present(op.inputs):
                root = id(self._places.root(operand))
                num_readers[root] = num_readers.get(root, 0) + 1
                if not (_is_fusable(op) or _is_reduction(op)):
                    candidates.discard(root)
        return {
            root
            for root in candidates
            if root not in self._kept and not (root in costly and num_readers.get(root, 0) > 1)
        }

    def _last_reads(self) -> dict[int, int]:
        """For each value that takes memory, the last operation that reads it, directly or where it is computed."""
        last: dict[int, int] = {}
        for time in reversed(range(len(self._ops))):
            op = self._ops[time]
            if _is_view(op):
                continue
            reads_at = [time]
            for value in op.outputs:
                root = id(self._places.root(value))
                if root in self._is_virtual:
                    reads_at.append(last.get(root, time))
            for operand in _present(op.inputs):
                root = id(self._places.root(operand))
                last[root] = max(last.get(root, -1), *reads_at)
        return last

    def peak(self) -> int:
        """Returns the most bytes that are alive at once."""
        last = self._last_reads()
        ends: dict[int, list[Value]] = {}
        alive: dict[int, int] = {}
        live = peak = 0

        def begin(value: Value, time: int) -> None:
            nonlocal live
            root = self._places.root(value)
            key = id(root)
            if key in alive or key in self._is_free or key in self._is_virtual:
                return
            alive[key] = 0 if key in self._in_place else self._places.size(root)
            live += alive[key]
            if key not in self._kept:
                ends.setdefault(last.get(key, time), []).append(root)

        def end(time: int) -> None:
            nonlocal live
            for root in ends.pop(time, ()):
                live -= alive.pop(id(root))

        for value in self._sliced:
            begin(value, 0)
        for time, op in enumerate(self._ops):
            if _is_view(op):
                continue
            if is_elementwise(op) or op.name.startswith(_UPDATES):
                end(time)
            for value in op.outputs:
                begin(value, time)
            peak = max(peak, live + self._working_bytes(op))
            end(time)
        return max(peak, live)

    def _working_bytes(self, op: Op) -> int:
        """Bytes that an operation takes while it runs."""
        if op.name == "dot_general":
            return self._gathered_bytes(op)
        if op.name == "scan":
            return self._scan_bytes(op)
        gathered = self._entering_bytes(op) if op.name == "shard_map" else 0
        return gathered + max(
            (peak_bytes(body, axis_sizes=self._axis_sizes) for body in op.bodies), default=0
        )

    def _gathered_bytes(self, op: Op) -> int:
        (lhs_contracting, rhs_contracting), _ = op.params["dimension_numbers"]
        result_axes = {axis for entry in op.outputs[0].axes for axis in entry}
        total = 0
        for value, contracting in zip(op.inputs, (lhs_contracting, rhs_contracting), strict=True):
            if value is None:
                continue
            gathered = tuple(
                tuple(axis for axis in entry if dim not in contracting or axis not in result_axes)
                for dim, entry in enumerate(value.axes)
            )
            if gathered != value.axes:
                total += self._places.size(value, gathered)
        return total

    def _entering_bytes(self, op: Op) -> int:
        """Bytes of what a `shard_map` gathers before its program sees it."""
        sizes = [
            (0 if value is None else self._places.size(value), self._places.size(inside))
            for value, inside in zip(op.inputs, op.bodies[0].inputs, strict=True)
        ]
        return sum(inside for outside, inside in sizes if 0 < outside < inside)

    def _scan_bytes(self, op: Op) -> int:
        body = op.bodies[0]
        num_consts, num_carry = scan_operand_counts(op.params)
        sliced = body.inputs[num_consts + num_carry :]
        # A part of what the loop stacks up is written to its place outside when it is there.
        carried = _present(body.outputs[:num_carry])
        fused = {id(value) for inner in body.ops if _is_fusable(inner) for value in inner.outputs}
        in_place = [value for value in _present(body.outputs[num_carry:]) if id(value) in fused]
        return _Walk(
            body,
            axis_sizes=self._axis_sizes,
            in_place=[value for value in in_place if all(value is not other for other in carried)],
            kept=carried,
            sliced=sliced,
        ).peak()


def _present(values: Sequence[Optional[Value]]) -> list[Value]:
    return [value for value in values if value is not None]


def _is_view(op: Op) -> bool:
    if op.name == "sharding_constraint":
        return op.inputs[0] is None or op.inputs[0].axes == op.outputs[0].axes
    return op.name in _VIEWS


def _is_fusable(op: Op) -> bool:
    if op.name == "sharding_constraint":
        # Another place on the mesh is another buffer.
        return False
    return op.name in _MOVES or is_elementwise(op)


def _is_costly(op: Op) -> bool:
    """Returns whether the compiler computes a result once rather than for each of its readers."""
    repeats = any(value.shape not in ((), op.outputs[0].shape) for value in _present(op.inputs))
    return op.name in _COSTLY or (repeats and op.name not in _MOVES)


def _is_reduction(op: Op) -> bool:
    return op.name.startswith(("reduce_", "arg"))
