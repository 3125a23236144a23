"""Text from a command line as the value of a field, by the field's annotation and by what it holds now.

Where several readings are possible none is guessed: the text is refused and the ways to say each are named.
"""

import ast
import collections.abc
import enum
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Optional

from axlearn.common.config._configurable import Configurable
from axlearn.common.config._formatters import (
    format_leaf,
    is_dtype,
    is_function_like,
    is_partition_spec,
    is_remat_policy,
)
from axlearn.common.config._lookup import find_named, is_dotted_name, may_name
from axlearn.common.config._names import nearest_names
from axlearn.common.config._parse_parts import (
    Place,
    is_structured,
    parse_mapping,
    parse_object,
    parse_sequence,
    usage_of,
)
from axlearn.common.config._parse_scalar import (
    NOT_PARSED,
    QUOTED,
    QUOTES,
    SIMPLE_PARSERS,
    SPEC_NAMES,
    ParseError,
    Parser,
    expression,
    is_dtype_name,
    is_numpy_dtype,
    parse_bool,
    parse_dtype,
    parse_enum,
    parse_inner_str,
    parse_literal,
    parse_outer_str,
    parse_partition_spec,
    parse_plain_int,
)
from axlearn.common.config._references import DTYPE_NAMES, BadReferenceError
from axlearn.common.config._required import REQUIRED, RequiredFieldValue
from axlearn.common.config._same_fields import config_of, slot_of, taking_over
from axlearn.common.config._types import describe, is_dtype_like, union_members
from axlearn.common.config._values import child_items, is_config

_NONE_WORDS = ("None", "none", "null")
_OPENING = ("(", "[", "{")


def parse_value(
    text: str, *, annotation: Any, current: Any, import_prefixes: Sequence[str] = ("axlearn.",)
) -> Any:
    """Returns the value that a text means.

    Args:
        text: What stands after the equals sign. Strings may be quoted.
        annotation: The resolved annotation of the place; `Any` where there is none.
        current: The value there now, which says what is meant where the annotation does not.
        import_prefixes: The packages whose classes and functions the text may name.

    Returns:
        A value; it may still have to be checked against the annotation.

    Raises:
        ParseError: If the text is no value of the annotation's types, or could be several.
    """
    return _read(text, Place(annotation, current, tuple(import_prefixes)))


def _read(text: str, place: Place) -> Any:
    current = place.current
    if not is_config(current) and child_items(current) is None and text == format_leaf(current):
        # What a dump prints is the value it was printed from, of whatever kind.
        return current
    members = [m for m in union_members(place.annotation) if m is not RequiredFieldValue]
    allows_none = any(m is None or m is type(None) for m in members)
    kinds = [m for m in members if m is not None and m is not type(None)]
    is_untyped = all(m in (Any, object) or isinstance(m, typing.TypeVar) for m in kinds)
    if text in _NONE_WORDS and (allows_none or is_untyped):
        return None
    named = _read_name(text, place, kinds=kinds, is_untyped=is_untyped)
    if named is not None:
        return named
    if is_untyped:
        if not _says_its_type(current):
            return _read_freely(text, place)
        if place.is_inner and type(current) is str and text[:1] in _OPENING:
            # Several names in the place of one, as the axes of a dim in a partition spec.
            return _read_freely(text, place._replace(current=None))
        kinds = [type(current)]
    if type(current) is int and (is_untyped or (float in kinds and int not in kinds)):
        # Where a whole number stands in the place of a fraction, another one does too: dumps tell 1 from 1.0.
        parsers: list[Optional[Parser]] = [parse_plain_int, float]
    else:
        # What begins like a list and is none would be taken for a string.
        is_list = text[:1] in _OPENING and len(kinds) > 1
        tried = [kind for kind in kinds if not (is_list and kind is str)]
        parsers = [_parser_for(kind, place) for kind in sorted(tried, key=_rank)]
    return _first_success(text, place, kinds, parsers, allows_none=allows_none)


def _says_its_type(value: Any) -> bool:
    """Whether another value in the place of one must be of its type where there is no annotation."""
    is_data = isinstance(value, (bool, int, float, str, enum.Enum)) or is_dtype_like(value)
    has_parts = is_partition_spec(value) or is_config(value) or is_structured(type(value))
    return is_data or has_parts or is_class_or_function(value)


def is_class_or_function(value: Any) -> bool:
    """Whether a value is a class, a function or a remat policy, and no dtype."""
    return callable(value) and value is not REQUIRED and not is_dtype_like(value)


def _first_success(
    text: str, place: Place, kinds: list[Any], parsers: Sequence[Optional[Parser]], *, allows_none: bool
) -> Any:
    deepest: Optional[ParseError] = None
    for parser in parsers:
        if parser is None:
            continue
        try:
            return parser(text)
        except ParseError as e:
            deepest = deepest or e
        except NOT_PARSED:
            continue
    if deepest is not None:
        raise deepest
    raise ParseError(
        _expected(kinds, allows_none, place.current), nearest=_nearest_values(text, kinds, place)
    )


def _expected(kinds: list[Any], allows_none: bool, current: Any) -> str:
    """Returns in words what a text could have been."""
    if is_dtype_like(current):
        words = ["the name of a dtype, such as bfloat16"]
    else:
        words = [_in_words(kind) for kind in kinds] or ["a value as Python writes it"]
    return " or ".join(dict.fromkeys([*words, *(["None"] if allows_none else [])]))


def _in_words(kind: Any) -> str:
    if kind is bool:
        return "true or false"
    return usage_of(kind) if is_structured(kind) else describe(kind)


def _nearest_values(text: str, kinds: list[Any], place: Place) -> list[str]:
    """Returns the names among the legal values that are nearest to a text."""
    names: list[str] = []
    if is_dtype_like(place.current) or any(is_numpy_dtype(typing.get_origin(k) or k) for k in kinds):
        names += DTYPE_NAMES
    for kind in kinds:
        if typing.get_origin(kind) is Literal:
            names += [str(choice) for choice in typing.get_args(kind)]
        elif isinstance(kind, type) and issubclass(kind, enum.Enum):
            names += [member.name for member in kind]
    return nearest_names(text.strip("'\""), sorted(names))


def _rank(kind: Any) -> int:
    """An int is also a float, so it is tried before; a string takes every text, so it comes last."""
    return {int: 0, float: 1, str: 3}.get(kind, 2)


# Names of classes and functions.


def _read_name(text: str, place: Place, *, kinds: list[Any], is_untyped: bool) -> Any:
    """Returns what the name of a class or a function means in a place; None where a text is no such name."""
    is_quoted = text[:1] in QUOTES and len(text) > 1 and text[-1] == text[0]
    name = text[1:-1] if is_quoted else text
    takes_object = is_untyped or any(_takes_object(kind) for kind in kinds)
    takes_config = is_untyped or any(_takes_config(kind) for kind in kinds)
    if not is_dotted_name(name) or not (takes_object or takes_config):
        return None
    if not may_name(name, import_prefixes=place.import_prefixes):
        is_other = is_quoted or str in kinds or isinstance(place.current, str) or is_dtype_name(name)
        if is_other or is_dtype_like(place.current):
            return None
    try:
        found = find_named(name, import_prefixes=place.import_prefixes)
    except BadReferenceError as e:
        raise ParseError("the name of a class or a function", message=str(e)) from e
    return _meant_by(found, name, place, takes=_Takes(takes_object, takes_config), is_quoted=is_quoted)


class _Takes(NamedTuple):
    """Whether a place takes a class or function itself, and a config of it."""

    itself: bool
    config: bool


def _meant_by(found: Any, name: str, place: Place, *, takes: _Takes, is_quoted: bool) -> Any:
    """Returns a class or function itself, or a config of it; refuses to choose where either could be meant."""
    current = place.current
    is_configurable = isinstance(found, type) and issubclass(found, Configurable)
    if not takes.config or is_remat_policy(found) or (is_quoted and takes.itself):
        return found
    if not takes.itself or is_configurable:
        return config_in_place(found, old=current if is_config(current) else None)
    try:
        new = config_of(found)
    except ValueError:
        # It has parameters that no config can hold, as remat policies have, so itself is meant.
        return found
    if is_config(current):
        if any(name in current for name, _ in new.items() if name != slot_of(new)):
            return config_in_place(found, old=current)
    elif isinstance(current, type) or is_function_like(current):
        return found
    raise ParseError(
        "either the thing itself or a config of it",
        advice=f"Write \"'{name}'\" with quotes for the former, as dumps print it, and PATH."
        f"{slot_of(new)}={name} for the latter",
    )


def config_in_place(found: Any, *, old: Any) -> Any:
    """Returns the config of a class or function that comes in the place of another one.

    Args:
        found: The class or function.
        old: The config in whose place it comes. Where it builds the same, it stays as it is; else its value of
            each field that both have counts, where the new field takes it. None: there was none.
    """
    if old is not None and getattr(old, slot_of(old), None) is found:
        return old
    return config_of(found) if old is None else taking_over(config_of(found), old=old).cfg


def _takes_object(kind: Any) -> bool:
    """Whether an annotation is about classes or functions themselves."""
    origin = typing.get_origin(kind) or kind
    is_protocol = getattr(origin, "_is_protocol", False) and "__call__" in vars(origin)
    return origin in (type, Callable, collections.abc.Callable) or is_protocol


def _takes_config(kind: Any) -> bool:
    """Whether an annotation is about configs."""
    return getattr(typing.get_origin(kind) or kind, "_config_fields", None) is not None


# Places without a type.


def _read_freely(text: str, place: Place) -> Any:
    """Reads a text where neither an annotation nor the value there says what it is."""
    current = place.current
    if place.is_inner and text.replace(".", "").isidentifier() and text.lower() not in ("true", "false"):
        raise ParseError(QUOTED)
    if isinstance(current, (list, tuple, dict)):
        return _first_success(text, place, [type(current)], [_free_parser(place)], allows_none=True)
    return _first_success(text, place, [], [_free_parser(place), _free_word(place)], allows_none=False)


def _free_parser(place: Place) -> Parser:
    def parse(text: str) -> Any:
        if text.lower() in ("true", "false"):
            return parse_bool(text)
        if text in ("inf", "-inf", "nan"):
            return float(text)
        is_dtype_text = text.startswith("dtype(")
        if is_dtype_text or is_dtype_name(text.strip("'\"")):
            return parse_dtype(text, as_dtype=is_dtype_text)
        node, current = expression(text), place.current
        if isinstance(node, ast.Call):
            value = parse_object(text, place, classes=[], read=_read)
            return tuple(value) if type(current) is tuple and is_partition_spec(value) else value
        if isinstance(node, ast.Dict):
            return parse_mapping(text, Any, place, read=_read)
        if isinstance(node, (ast.Tuple, ast.List)):
            return parse_sequence(text, type(current), Any, place, read=_read)
        return ast.literal_eval(text)

    return parse


def _free_word(place: Place) -> Parser:
    def parse(text: str) -> str:
        expected = "a value as Python writes it"
        if place.is_inner or text[:1] in (*QUOTES, *_OPENING, ""):
            raise ParseError(expected, advice="Put quotes around strings")
        if text in DTYPE_NAMES:
            raise ParseError(
                expected, advice=f"Write jax.numpy.{text} for the dtype, '{text}' for the string"
            )
        if is_dotted_name(text):
            raise ParseError(expected, advice="Put quotes around it if it is a string")
        return text

    return parse


# Single values.


def _parser_for(kind: Any, place: Place) -> Optional[Parser]:
    """Returns what parses a text as one alternative of an annotation; None for what no text can say."""
    origin = typing.get_origin(kind) or kind
    current = place.current
    if origin is Literal:
        return lambda text: parse_literal(text, typing.get_args(kind))
    if not isinstance(origin, type):
        return None
    if issubclass(origin, enum.Enum):
        return lambda text: parse_enum(text, origin)
    if is_dtype_like(current) or is_numpy_dtype(origin):
        return lambda text: parse_dtype(text, as_dtype=is_dtype(current))
    if is_partition_spec(current) or origin.__name__ in SPEC_NAMES:
        return parse_partition_spec
    if origin is str:
        return parse_inner_str if place.is_inner else parse_outer_str
    if origin in SIMPLE_PARSERS:
        return SIMPLE_PARSERS[origin]
    if is_structured(origin):
        return lambda text: parse_object(text, place, classes=[origin], read=_read)
    if issubclass(origin, Mapping):
        return lambda text: parse_mapping(text, kind, place, read=_read)
    if issubclass(origin, Sequence):
        return lambda text: parse_sequence(text, origin, kind, place, read=_read)
    return None
