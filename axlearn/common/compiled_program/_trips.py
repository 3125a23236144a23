"""How often each computation of a program runs: loops multiply."""

import re
from collections.abc import Mapping
from typing import Optional

from axlearn.common.compiled_program._computations import Computation, Instruction

_KNOWN_TRIPS = re.compile(r'"known_trip_count":\s*\{\s*"n":\s*"(\d+)"')
_CALLS = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_CALL_LISTS = re.compile(r"\b(?:branch_computations|called_computations|calls)=\{([^}]*)\}")


class UnknownTripCountError(ValueError):
    """A loop of the program runs a number of times that its text does not tell."""


def executions_of(computations: Mapping[str, Computation]) -> dict[str, int]:
    """Counts how often each computation runs in one run of the program.

    Both branches of a condition count as if they were taken: the count is an upper bound there.

    Args:
        computations: From `parse_program`.

    Returns:
        The count by name; 0 for what is never called.

    Raises:
        UnknownTripCountError: If the trips of a loop cannot be told.
    """
    counts = dict.fromkeys(computations, 0)
    entry = next(name for name, computation in computations.items() if computation.is_entry)

    def visit(name: str, times: int) -> None:
        counts[name] += times
        for instruction in computations[name].instructions.values():
            inner = times
            if instruction.operation == "while":
                inner *= _trip_count(instruction, computations)
            for called in called_by(instruction):
                if called in computations:
                    visit(called, inner)

    visit(entry, 1)
    return counts


def called_by(instruction: Instruction) -> list[str]:
    """Returns the names of the computations that an instruction runs; what only waits for one runs none."""
    if instruction.operation.endswith(("-done", "-update")):
        return []
    names = _CALLS.findall(instruction.attributes)
    for listed in _CALL_LISTS.findall(instruction.attributes):
        names.extend(re.findall(r"%?([\w.\-]+)", listed))
    return names


def _trip_count(loop: Instruction, computations: Mapping[str, Computation]) -> int:
    """Reads the number of trips from what the compiler noted, or else from a condition `i < constant`."""
    known = _KNOWN_TRIPS.search(loop.attributes)
    if known:
        return int(known[1])
    condition = computations[loop.attribute("condition") or ""]
    limit = _limit(condition)
    if limit is None:
        raise UnknownTripCountError(
            f"{loop.name}: how often this loop runs is not in the program's text: its condition {condition.name} "
            "is no comparison of a counter with a constant."
        )
    return limit


def _limit(condition: Computation) -> Optional[int]:
    """The constant of a condition that is `counter < constant`: jax's loops count from 0."""
    root = next((x for x in condition.instructions.values() if x.is_root), None)
    # A backend may have put the comparison into a fusion of its own.
    if root is None or root.operation not in ("compare", "fusion"):
        return None
    if root.operation == "compare" and "direction=LT" not in root.attributes:
        return None
    constants = [
        int(x.argument)
        for name in root.operands
        if (x := condition.instructions[name]).operation == "constant" and x.argument.isdigit()
    ]
    return constants[0] if len(constants) == 1 else None
