"""What a program reads from and writes to the device's memory, with the loops around it counted."""

from collections.abc import Mapping

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
_CONTROL = frozenset(["while", "conditional", "call", "async-start"])


def bytes_accessed(text: str) -> int:
    """Sums up what the operations of a program read and write.

    A fusion counts as one operation: what stays inside of it touches no memory. Of an array from which a slice is
    taken, or in which one is replaced, the slice counts. What a device keeps in a nearer memory than its main one
    counts as well, so this is an upper bound.

    Args:
        text: From `Compiled.as_text()`.

    Returns:
        Bytes on each device, in one run of the program.

    Raises:
        UnknownTripCountError: If the trips of a loop cannot be told.
    """
    computations = parse_program(text)
    counts = executions_of(computations)
    total = 0
    for name in _control_computations(computations):
        computation = computations[name]
        per_run = sum(_bytes_of(x, computation, computations) for x in computation.instructions.values())
        total += counts[name] * per_run
    return total


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


def _bytes_of(
    instruction: Instruction, computation: Computation, computations: Mapping[str, Computation]
) -> int:
    operation = instruction.operation
    if operation in _FREE or operation.endswith(("-done", "-update")) or operation == "async-start":
        return 0
    operands = [_size(computation.instructions.get(name)) for name in instruction.operands]
    written = sum(array_sizes(instruction.shape))
    if operation in ("dynamic-slice", "gather", "slice"):
        return 2 * written
    if operation == "dynamic-update-slice":
        return 2 * operands[1] if len(operands) > 1 else written
    body = computations.get(instruction.attribute("calls") or "")
    if operation != "fusion" or body is None:
        return sum(operands) + written
    return sum(_read_of_parameters(body, operands)) + _written_by(body, written)


def _size(instruction: Instruction | None) -> int:
    return 0 if instruction is None else sum(array_sizes(instruction.shape))


def _read_of_parameters(body: Computation, operands: list[int]) -> list[int]:
    """What a fusion reads of each of its operands."""
    reads = list(operands)
    for parameter in body.instructions.values():
        if parameter.operation != "parameter" or not parameter.argument.isdigit():
            continue
        users = [x for x in body.instructions.values() if parameter.name in x.operands]
        index = int(parameter.argument)
        if users and index < len(reads) and all(_takes_slice(user, parameter.name) for user in users):
            reads[index] = sum(_slice_size(user, body) for user in users)
    return reads


def _takes_slice(user: Instruction, name: str) -> bool:
    return user.operation in ("dynamic-slice", "dynamic-update-slice") and user.operands[0] == name


def _slice_size(user: Instruction, body: Computation) -> int:
    if user.operation == "dynamic-slice":
        return _size(user)
    # What is replaced is not read.
    return 0


def _written_by(body: Computation, written: int) -> int:
    """What a fusion writes: of an array that it changes in place, the slice."""
    root = next((x for x in body.instructions.values() if x.is_root), None)
    if root is None:
        return written
    names = root.operands if root.operation == "tuple" else (root.name,)
    results = [body.instructions[name] for name in names if name in body.instructions]
    if not results:
        return written
    return sum(
        _size(body.instructions.get(x.operands[1])) if x.operation == "dynamic-update-slice" else _size(x)
        for x in results
    )
