"""Single values read from text: numbers, strings, names of enums and dtypes, partition specs."""

import ast
import decimal
import enum
import importlib
from collections.abc import Callable, Sequence
from typing import Any, Optional

from axlearn.common.config._references import DTYPE_MODULES, DTYPE_NAMES

Parser = Callable[[str], Any]

_BOOL_WORDS = {"true": True, "false": False}
_DTYPE_PREFIXES = ("jax.numpy.", "jnp.", "numpy.", "np.")
SPEC_NAMES = ("PartitionSpec", "P")
QUOTES = ("'", '"')
# What is expected of strings that are parts of a longer text.
QUOTED = "quotes around strings within brackets"


class ParseError(ValueError):
    """A text is not a value of what was expected.

    Attributes:
        expected: What was expected, in words.
        nearest: The legal texts nearest to it.
        advice: What to do. None: nothing special.
        part: Where inside of the value, such as `[2]['key']`; empty for the value itself.
        part_text: What stands there; None for all of the text.
        message: The whole message, where it says more than that a value cannot be set. None: it does not.
    """

    def __init__(
        self,
        expected: str,
        *,
        nearest: Sequence[str] = (),
        advice: Optional[str] = None,
        message: Optional[str] = None,
    ) -> None:
        super().__init__(expected)
        self.message = message
        self.expected = expected
        self.nearest = list(nearest)
        self.advice = advice
        self.part = ""
        self.part_text: Optional[str] = None


class NoValueError(Exception):
    """A text is not a value of one of the types that a field takes."""


# What parsing raises besides ParseError of a text that is not what it looks for, Python's own parser included.
NOT_PARSED = (
    NoValueError,
    MemoryError,
    OverflowError,
    RecursionError,
    SyntaxError,
    TypeError,
    ValueError,
)


def expression(text: str) -> ast.expr:
    """Returns the syntax tree of a text."""
    return ast.parse(text.strip(), mode="eval").body


def dotted(node: ast.expr) -> str:
    """Returns the dotted name that an expression is, or nothing."""
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return f"{before}.{node.attr}" if before else ""
    return node.id if isinstance(node, ast.Name) else ""


def parse_bool(text: str) -> bool:
    if text.lower() not in _BOOL_WORDS:
        raise NoValueError
    return _BOOL_WORDS[text.lower()]


def parse_plain_int(text: str) -> int:
    return int(text)


def _parse_int(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        # 1e6 is how people write a million. A Decimal is exact where a float is not, as for 1e23.
        if "." in text or not float(text).is_integer():
            raise NoValueError from None
        return int(decimal.Decimal(text))


def parse_str(text: str) -> str:
    if text[:1] not in QUOTES:
        return text
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError) as e:
        raise ParseError("a string; the quotes around this one do not close") from e
    if not isinstance(value, str):
        raise NoValueError
    return value


def parse_outer_str(text: str) -> str:
    """Reads a string that is all of a text: but for quotes it says itself, unless it says that there is none."""
    if text == "None":
        raise ParseError("a string", advice=f"Write \"'{text}'\" with quotes for a string of these letters")
    return parse_str(text)


def parse_inner_str(text: str) -> str:
    if text[:1] not in QUOTES:
        raise ParseError(QUOTED)
    return parse_str(text)


SIMPLE_PARSERS: dict[type, Parser] = {bool: parse_bool, int: _parse_int, float: float}


def parse_literal(text: str, choices: tuple[Any, ...]) -> Any:
    for choice in choices:
        if text in (str(choice), repr(choice)):
            return choice
    raise NoValueError


def parse_enum(text: str, cls: type[enum.Enum]) -> enum.Enum:
    bare = parse_str(text).removeprefix(f"{cls.__name__}.")
    for member in cls:
        if bare in (member.name, str(member.value)) or text == repr(member):
            return member
    raise NoValueError


def is_numpy_dtype(kind: Any) -> bool:
    return isinstance(kind, type) and kind.__name__ == "dtype" and kind.__module__ == "numpy"


def is_dtype_name(name: str) -> bool:
    """Whether a dotted name is that of a dtype, with the module that has it."""
    module, _, last = name.rpartition(".")
    return module in DTYPE_MODULES and last in DTYPE_NAMES


def parse_dtype(text: str, *, as_dtype: bool) -> Any:
    # As a dump prints it, or the name alone.
    name = parse_str(text.removeprefix("dtype(").removesuffix(")"))
    for prefix in _DTYPE_PREFIXES:
        name = name.removeprefix(prefix)
    if name not in DTYPE_NAMES:
        raise NoValueError
    scalar_type = getattr(importlib.import_module("jax.numpy"), name, None)
    if scalar_type is None:
        raise NoValueError
    return importlib.import_module("numpy").dtype(scalar_type) if as_dtype else scalar_type


def parse_partition_spec(text: str) -> Any:
    node = expression(text)
    if isinstance(node, ast.Call):
        if dotted(node.func).rpartition(".")[2] not in SPEC_NAMES or node.keywords:
            raise NoValueError
        axes = tuple(ast.literal_eval(argument) for argument in node.args)
    else:
        axes = ast.literal_eval(node)
        if not isinstance(axes, (list, tuple)):
            raise NoValueError
    return importlib.import_module("jax.sharding").PartitionSpec(*axes)
