"""Text from a command line as the value of a field, by the field's annotation and by what it holds now."""

import ast
import enum
import importlib
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Optional

from axlearn.common.config._formatters import is_dtype, is_partition_spec
from axlearn.common.config._references import DTYPE_NAMES
from axlearn.common.config._required import REQUIRED, RequiredFieldValue
from axlearn.common.config._types import describe, is_dtype_like, union_members


class ParseError(ValueError):
    """A text is not a value of what was expected; the message is what was expected."""


_NONE_WORDS = ("None", "none", "null")
_BOOL_WORDS = {"true": True, "false": False}
_DTYPE_PREFIXES = ("jax.numpy.", "jnp.", "numpy.", "np.")
_SPEC_PREFIXES = ("PartitionSpec", "P")


class _NoValueError(Exception):
    """A text is not a value of one of the types that a field takes."""


def parse_value(text: str, *, annotation: Any, current: Any) -> Any:
    """Returns the value that a text means.

    Args:
        text: What stands after the equals sign. Strings may be quoted.
        annotation: The resolved annotation of the place; `Any` where there is none.
        current: The value there now, which says what is meant where the annotation does not.

    Returns:
        A value; it may still have to be checked against the annotation.

    Raises:
        ParseError: If the text is no value of the annotation's types.
    """
    members = [m for m in union_members(annotation) if m is not RequiredFieldValue]
    allows_none = any(m is None or m is type(None) for m in members)
    if text in _NONE_WORDS and (allows_none or members == [Any]):
        return None
    kinds = [m for m in members if m is not None and m is not type(None)]
    is_untyped = all(m in (Any, object) or isinstance(m, typing.TypeVar) for m in kinds)
    if is_untyped:
        if current is None or current is REQUIRED or isinstance(current, (list, tuple, dict)):
            return _parse_freely(text)
        kinds = [type(current)]
    if type(current) is int and (is_untyped or float in kinds):
        # Where a whole number stands in the place of a fraction, another one does too: dumps tell 1 from 1.0.
        kinds = [int, float, *kinds]
    for kind in sorted(kinds, key=_rank):
        parser = int if kind is int and float in kinds else _parser_for(kind, current)
        if parser is None:
            continue
        try:
            return parser(text)
        except (_NoValueError, SyntaxError, ValueError, OverflowError):
            continue
    raise ParseError(_expected(kinds, allows_none, current))


def _expected(kinds: list[Any], allows_none: bool, current: Any) -> str:
    """Returns in words what a text could have been."""
    if is_dtype_like(current):
        words = ["the name of a dtype, such as bfloat16"]
    else:
        words = ["true or false" if kind is bool else describe(kind) for kind in kinds]
    return " or ".join(dict.fromkeys([*words, *(["None"] if allows_none else [])]))


def _rank(kind: Any) -> int:
    """An int is also a float, so it is tried before; a string takes every text, so it comes last."""
    return {int: 0, float: 1, str: 3}.get(kind, 2)


def _parser_for(kind: Any, current: Any) -> Optional[Callable[[str], Any]]:
    """Returns what parses a text as one alternative of an annotation; None for what no text can say."""
    origin = typing.get_origin(kind) or kind
    if origin is Literal:
        return lambda text: _parse_literal(text, typing.get_args(kind))
    if not isinstance(origin, type):
        return None
    if issubclass(origin, enum.Enum):
        return lambda text: _parse_enum(text, origin)
    if is_dtype_like(current) or (origin.__name__ == "dtype" and origin.__module__ == "numpy"):
        return lambda text: _parse_dtype(text, as_dtype=is_dtype(current))
    if is_partition_spec(current) or origin.__name__ in _SPEC_PREFIXES:
        return _parse_partition_spec
    if origin in _SIMPLE_PARSERS:
        return _SIMPLE_PARSERS[origin]
    if issubclass(origin, (Mapping, Sequence)):
        return lambda text: _parse_container(text, origin, current)
    return None


def _parse_freely(text: str) -> Any:
    if text.lower() in _BOOL_WORDS:
        return _BOOL_WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def _parse_bool(text: str) -> bool:
    if text.lower() not in _BOOL_WORDS:
        raise _NoValueError
    return _BOOL_WORDS[text.lower()]


def _parse_int(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        # 1e6 is how people write a million.
        number = float(text)
        if not number.is_integer():
            raise _NoValueError from None
        return int(number)


def _parse_str(text: str) -> str:
    if text[:1] in ("'", '"') and text[-1:] == text[:1] and len(text) > 1:
        value = ast.literal_eval(text)
        if isinstance(value, str):
            return value
    return text


_SIMPLE_PARSERS: dict[type, Callable[[str], Any]] = {
    bool: _parse_bool,
    int: _parse_int,
    float: float,
    str: _parse_str,
}


def _parse_literal(text: str, choices: tuple[Any, ...]) -> Any:
    for choice in choices:
        if text in (str(choice), repr(choice)):
            return choice
    raise _NoValueError


def _parse_enum(text: str, cls: type[enum.Enum]) -> enum.Enum:
    bare = _parse_str(text).removeprefix(f"{cls.__name__}.")
    for member in cls:
        if bare in (member.name, str(member.value)) or text == repr(member):
            return member
    raise _NoValueError


def _parse_dtype(text: str, *, as_dtype: bool) -> Any:
    # As a dump prints it, or the name alone.
    name = _parse_str(text.removeprefix("dtype(").removesuffix(")"))
    for prefix in _DTYPE_PREFIXES:
        name = name.removeprefix(prefix)
    if name not in DTYPE_NAMES:
        raise _NoValueError
    scalar_type = getattr(importlib.import_module("jax.numpy"), name, None)
    if scalar_type is None:
        raise _NoValueError
    return importlib.import_module("numpy").dtype(scalar_type) if as_dtype else scalar_type


def _parse_partition_spec(text: str) -> Any:
    name, _, rest = text.partition("(")
    if name and name not in _SPEC_PREFIXES:
        raise _NoValueError
    arguments = rest.removesuffix(")").strip().removesuffix(",")
    axes = ast.literal_eval(f"({arguments},)" if arguments else "()")
    return importlib.import_module("jax.sharding").PartitionSpec(*axes)


def _parse_container(text: str, origin: type, current: Any) -> Any:
    value = ast.literal_eval(text)
    if issubclass(origin, Mapping):
        if not isinstance(value, dict):
            raise _NoValueError
        return value
    if not isinstance(value, (list, tuple)):
        raise _NoValueError
    if origin in (list, tuple):
        return origin(value)
    return type(current)(value) if type(current) in (list, tuple) else value
