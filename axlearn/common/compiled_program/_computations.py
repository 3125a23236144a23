"""The text of an XLA module as computations of instructions.

Only what the analyses need is read: names, operations, shapes, operands, and the attributes as text. The grammar is
that of `Compiled.as_text()`, the same for CPU, GPU and TPU but for their layouts.
"""

import re
from collections.abc import Collection, Iterator
from typing import NamedTuple, Optional

# Bits of an element; a type that is not here is not an array's.
_BITS = {
    "pred": 8,
    "token": 0,
    "opaque": 0,
    **{f"{sign}{bits}": bits for sign in "su" for bits in (2, 4, 8, 16, 32, 64)},
    "bf16": 16,
    "f16": 16,
    "f32": 32,
    "f64": 64,
    "c64": 64,
    "c128": 128,
}
_ARRAY = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,<= ]*)\](\{[^{}]*\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
# A line that begins so within an instruction goes on with a second bracket: `}}, metadata=`.
_END = re.compile(r"^\}(,? *[a-z_]+=|\s*$)")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPERATION = re.compile(r"([\w\-]+)\(")
_NAME = re.compile(r"%([\w.\-]+)")


class Instruction(NamedTuple):
    """One operation of a computation.

    Attributes:
        name: What its result is called, without the percent sign.
        operation: Its operation, such as "all-gather" or "fusion".
        shape: The text of its result's shape, with the layout.
        operands: The names of what it reads.
        argument: The text between its brackets: the literal of a constant.
        attributes: The text behind its operands.
        is_root: Whether its result is that of the computation.
    """

    name: str
    operation: str
    shape: str
    operands: tuple[str, ...]
    argument: str
    attributes: str
    is_root: bool

    def attribute(self, name: str) -> Optional[str]:
        """Returns the text of an attribute that is a name or a number, or None where there is none."""
        match = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return match[1] if match else None


class Computation(NamedTuple):
    """A function of the program.

    Attributes:
        name: Its name, without the percent sign.
        is_entry: Whether the program begins here.
        instructions: What it does, by name, in the order of the text.
    """

    name: str
    is_entry: bool
    instructions: dict[str, Instruction]


def parse_program(text: str) -> dict[str, Computation]:
    """Reads the text of a compiled module.

    Args:
        text: From `Compiled.as_text()`.

    Returns:
        The computations by name.

    Raises:
        ValueError: If there is no entry computation, hence no module.
    """
    computations: dict[str, Computation] = {}
    current: Optional[Computation] = None
    for line in _whole_lines(text):
        header = _HEADER.match(line)
        if header:
            current = Computation(header[2], is_entry=bool(header[1]), instructions={})
            computations[current.name] = current
        elif _END.match(line):
            current = None
        elif current is not None:
            instruction = _parse_instruction(line)
            if instruction is not None:
                current.instructions[instruction.name] = instruction
    if not any(computation.is_entry for computation in computations.values()):
        raise ValueError("the text is no compiled module: it has no ENTRY computation.")
    return computations


def _whole_lines(text: str) -> Iterator[str]:
    """Yields the lines, those of one instruction as one: what a kernel notes of itself may have several."""
    parts: list[str] = []
    for line in text.splitlines():
        if parts and (_INSTRUCTION.match(line) or _HEADER.match(line) or _END.match(line)):
            yield " ".join(parts)
            parts = []
        if parts or _INSTRUCTION.match(line):
            parts.append(line)
        else:
            yield line
    if parts:
        yield " ".join(parts)


def _parse_instruction(line: str) -> Optional[Instruction]:
    match = _INSTRUCTION.match(line)
    if match is None:
        return None
    shape, rest = _split_shape(match[3])
    operation = _OPERATION.match(rest)
    if operation is None:
        return None
    end = _closing(rest, operation.end() - 1)
    return Instruction(
        name=match[2],
        operation=operation[1],
        shape=shape,
        operands=tuple(_NAME.findall(rest[operation.end() : end])),
        argument=rest[operation.end() : end],
        attributes=rest[end + 1 :],
        is_root=bool(match[1]),
    )


def _split_shape(text: str) -> tuple[str, str]:
    """Splits off the shape: up to the first space that is in no bracket."""
    depth = 0
    for i, char in enumerate(text):
        if char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        elif char == " " and depth == 0:
            return text[:i], text[i + 1 :]
    return text, ""


def _closing(text: str, opening: int) -> int:
    """Returns the place of the bracket that closes the one at `opening`."""
    depth = 0
    for i in range(opening, len(text)):
        if text[i] == "(":
            depth += 1
        elif text[i] == ")":
            depth -= 1
            if depth == 0:
                return i
    return len(text)


def array_sizes(shape: str, *, spaces: Optional[Collection[int]] = None) -> list[int]:
    """Returns the bytes of each array of a shape, of a tuple's in order; padding of the layout does not count.

    Args:
        shape: As the program writes it.
        spaces: The memory spaces that count, as layouts name them: 0 is the device's main memory. None: all.
    """
    sizes = []
    for kind, dims, layout in _ARRAY.findall(re.sub(r"/\*.*?\*/", "", shape)):
        bits = _bits_of(kind)
        if bits is None or (spaces is not None and _space_of(layout) not in spaces):
            continue
        count = 1
        for dim in dims.split(","):
            # A bounded dynamic size prints as <=N.
            count *= int(dim.strip().removeprefix("<=")) if dim.strip() else 1
        sizes.append(-(-count * bits // 8))
    return sizes


def _space_of(layout: str) -> int:
    match = _SPACE.search(layout)
    return int(match[1]) if match else 0


def _bits_of(kind: str) -> Optional[int]:
    if kind.startswith("f8"):
        return 8
    if kind.startswith("f4"):
        return 4
    return _BITS.get(kind)
