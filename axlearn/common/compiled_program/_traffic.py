"""What a program reads from and writes to the device's memory, with the loops around it counted."""

import re
from collections.abc import Collection, Mapping
from typing import NamedTuple, Optional

from axlearn.common.compiled_program._computations import (
    Computation,
    Instruction,
    array_sizes,
    parse_program,
)
from axlearn.common.compiled_program._trips import called_by, executions_of

# Operations that only name what is there already, or are told by what they call.
_FREE = frozenset(
    [
        "parameter",
        "constant",
        "get-tuple-element",
        "tuple",
        "bitcast",
        "while",
        "conditional",
        "call",
        "after-all",
        "partition-id",
        "replica-id",
        "add-dependency",
        "opt-barrier",
    ]
)
# XLA for TPU writes matrix products as convolutions; a kernel is a custom call.
_PRODUCTS = frozenset(["dot", "convolution", "ragged-dot", "custom-call"])
_KERNEL = re.compile(r'custom_call_target="(tpu_custom_call|__cublas\S*|__gpu\$xla\.gpu\.triton)"')
_CONTROL = frozenset(["while", "conditional", "call", "async-start"])


class AccessedBytes(NamedTuple):
    """What the operations of a program read and write, on each device.

    Attributes:
        products: By operations with matrix products in them, and by kernels.
        others: By all others.
    """

    products: int
    others: int

    @property
    def total(self) -> int:
        """By all operations."""
        return self.products + self.others


def bytes_accessed(text: str, *, spaces: Optional[Collection[int]] = None) -> AccessedBytes:
    """Sums up what the operations of a program read and write.

    A fusion counts as one operation: what stays inside of it touches no memory. Of an array from which a slice is
    taken, or in which one is replaced, the slice counts. An operation that finds its input in a cache reads it all
    the same, so this is an upper bound.

    Args:
        text: From `Compiled.as_text()`.
        spaces: The memory spaces that count, as layouts name them. On TPUs 0 is the device's main memory, 1 the
            vector units' own, 5 the host's. None: all.

    Returns:
        Bytes on each device, in one run of the program.

    Raises:
        UnknownTripCountError: If the trips of a loop cannot be told.
    """
    computations = parse_program(text)
    counts = executions_of(computations)
    reader = _Reader(computations, spaces)
    products = others = 0
    for name in _control_computations(computations):
        for instruction in computations[name].instructions.values():
            size = counts[name] * reader.bytes_of(instruction, computations[name])
            if size and reader.has_product(instruction):
                products += size
            else:
                others += size
    return AccessedBytes(products, others)


def _control_computations(computations: Mapping[str, Computation]) -> set[str]:
    """The entry, and what loops, conditions and calls run: whose instructions are run one after another."""
    found: set[str] = set()
    open_names = [name for name, computation in computations.items() if computation.is_entry]
    while open_names:
        name = open_names.pop()
        if name in found:
            continue
        found.add(name)
        for instruction in computations[name].instructions.values():
            if instruction.operation in _CONTROL:
                open_names.extend(x for x in called_by(instruction) if x in computations)
    return found


class _Reader:
    """Counts the bytes of operations in some memory spaces."""

    def __init__(self, computations: Mapping[str, Computation], spaces: Optional[Collection[int]]):
        self._computations = computations
        self._spaces = spaces
        self._products: dict[str, bool] = {}

    def has_product(self, instruction: Instruction) -> bool:
        """Whether an operation is, or fuses, a matrix product or a kernel."""
        if instruction.operation in _PRODUCTS:
            return (
                instruction.operation != "custom-call" or _KERNEL.search(instruction.attributes) is not None
            )
        return any(self._body_has_product(name) for name in called_by(instruction))

    def _body_has_product(self, name: str) -> bool:
        if name not in self._products:
            body = self._computations.get(name)
            self._products[name] = body is not None and any(
                self.has_product(x) for x in body.instructions.values()
            )
        return self._products[name]

    def bytes_of(self, instruction: Instruction, computation: Computation) -> int:
        """What one run of an operation reads and writes."""
        operation = instruction.operation
        if operation in _FREE or operation.endswith(("-done", "-update")) or operation == "async-start":
            return 0
        operands = [self._size(computation.instructions.get(name)) for name in instruction.operands]
        written = self._size(instruction)
        if operation in ("dynamic-slice", "gather", "slice"):
            return 2 * written
        if operation == "dynamic-update-slice":
            return 2 * operands[1] if len(operands) > 1 else written
        if operation.endswith("-start"):
            # What a start returns holds its operands, too.
            return max(sum(operands), written)
        body = self._computations.get(instruction.attribute("calls") or "")
        if operation != "fusion" or body is None:
            return sum(operands) + written
        return sum(self._read_of_parameters(body, operands)) + self._written_by(body, written)

    def _size(self, instruction: Optional[Instruction]) -> int:
        return 0 if instruction is None else sum(array_sizes(instruction.shape, spaces=self._spaces))

    def _read_of_parameters(self, body: Computation, operands: list[int]) -> list[int]:
        """What a fusion reads of each of its operands."""
        reads = list(operands)
        for parameter in body.instructions.values():
            if parameter.operation == "parameter" and parameter.argument.isdigit():
                index = int(parameter.argument)
                if index < len(reads) and reads[index]:
                    reads[index] = min(reads[index], self._read_of(parameter, body))
        return reads

    def _read_of(self, value: Instruction, body: Computation) -> int:
        """What the users of a value in a fusion read of it: of what they take slices of, the slices."""
        users = [x for x in body.instructions.values() if value.name in x.operands]
        slices = self._slices(value, users, body) if users and not value.is_root else None
        return _whole_size(value) if slices is None else slices

    def _slices(self, value: Instruction, users: list[Instruction], body: Computation) -> Optional[int]:
        """The bytes of the slices that are taken of a value; None where a user takes all of it."""
        total = 0
        for user in users:
            if user.operation == "dynamic-slice" and user.operands[0] == value.name:
                total += _whole_size(user)
            elif user.operation == "dynamic-update-slice" and user.operands[0] == value.name:
                # What is replaced is not read.
                continue
            elif user.operation == "bitcast":
                total += self._read_of(user, body)
            elif user.operation == "fusion":
                total += self._read_by_fusion(user, value)
            else:
                return None
        return total

    def _read_by_fusion(self, fusion: Instruction, value: Instruction) -> int:
        body = self._computations.get(fusion.attribute("calls") or "")
        if body is None:
            return _whole_size(value)
        indices = [str(i) for i, name in enumerate(fusion.operands) if name == value.name]
        parameters = [
            x for x in body.instructions.values() if x.operation == "parameter" and x.argument in indices
        ]
        return sum(self._read_of(x, body) for x in parameters)

    def _written_by(self, body: Computation, written: int) -> int:
        """What a fusion writes: of an array that it changes in place, the slice."""
        root = next((x for x in body.instructions.values() if x.is_root), None)
        if root is None or not written:
            return written
        names = root.operands if root.operation == "tuple" else (root.name,)
        results = [body.instructions[name] for name in names if name in body.instructions]
        replaced = [x for x in results if x.operation == "dynamic-update-slice"]
        if not replaced:
            return written
        whole = sum(map(_whole_size, replaced))
        slices = sum(_whole_size(body.instructions.get(x.operands[1])) for x in replaced)
        return max(written - whole, 0) + slices


def _whole_size(instruction: Optional[Instruction]) -> int:
    """The bytes of a result; what is inside of a fusion has no memory space of its own."""
    return 0 if instruction is None else sum(array_sizes(instruction.shape))
