"""What a config can hold: checking, copying, comparing and walking values.

Configs hold data by value: None, numbers, strings, enums, classes, functions, other configs, and lists,
tuples, dicts, dataclasses, namedtuples and attrs objects of these. Values of other kinds need a formatter or
a validator.
"""

import copy
import dataclasses
import enum
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Optional

from axlearn.common.config._errors import InvalidConfigValueError, error_message
from axlearn.common.config._formatters import has_formatter, is_function_like
from axlearn.common.config._required import RequiredFieldValue

# Values of exactly these types are kept as they are: nothing in them can change.
_ATOMS = frozenset({bool, complex, float, int, str, type(None), RequiredFieldValue, types.FunctionType})
_IMMUTABLE = (
    type,
    enum.Enum,
    int,
    float,
    str,
    range,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
)

MatchFn = Callable[[Any], bool]
ValidateFn = Callable[[Any], None]


class _Validator(NamedTuple):
    match_fn: MatchFn
    validate_fn: ValidateFn


_VALIDATORS: list[_Validator] = []


def register_validator(*, match_fn: MatchFn, validate_fn: ValidateFn) -> None:
    """Makes configs accept values of a kind that they do not know.

    Args:
        match_fn: Says of a value whether it is of this kind.
        validate_fn: Raises `InvalidConfigValueError` for values of this kind that are not legal. Of several
            registered validators that match a value, all run.
    """
    _VALIDATORS.append(_Validator(match_fn, validate_fn))


def is_config(value: Any) -> bool:
    """Whether the value is a config."""
    return getattr(type(value), "_config_fields", None) is not None


def is_named_tuple(value: Any) -> bool:
    """Whether the value is an instance of a `NamedTuple` or `collections.namedtuple` class."""
    return isinstance(value, tuple) and hasattr(value, "_fields") and hasattr(value, "_asdict")


def is_attrs(value: Any) -> bool:
    """Whether the value is an instance of an attrs class."""
    return not isinstance(value, type) and hasattr(type(value), "__attrs_attrs__")


def is_dataclass_instance(value: Any) -> bool:
    """Whether the value is an instance of a dataclass."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def named_values(value: Any) -> Optional[list[tuple[str, Any]]]:
    """Returns the fields of a dataclass, attrs object or namedtuple as declared; None for other values."""
    if has_formatter(value):
        return None
    if is_dataclass_instance(value):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    if is_attrs(value):
        return [(field.name, getattr(value, field.name)) for field in type(value).__attrs_attrs__]
    if is_named_tuple(value):
        return [(name, getattr(value, name)) for name in value._fields]
    return None


def with_named_values(value: Any, replaced: Mapping[str, Any]) -> Any:
    """Returns a copy of a dataclass, attrs object or namedtuple with some fields replaced.

    Dataclass and attrs objects are copied without running their `__init__`: they have been built once.
    """
    if is_named_tuple(value):
        return value._replace(**replaced)
    result = copy.copy(value)
    for name, item in replaced.items():
        object.__setattr__(result, name, item)
    return result


def child_items(value: Any) -> Optional[list[tuple[str, Any]]]:
    """Returns the parts of a container that is not a config, or None for a leaf.

    Returns:
        Pairs of what a dump appends to the container's path (`['key']`, `[0]`) and the part.
    """
    if type(value) in _ATOMS:
        return None
    named = named_values(value)
    if named is not None:
        return [(f"[{name!r}]", item) for name, item in named]
    if has_formatter(value):
        return None
    if isinstance(value, dict):
        return [(f"[{key!r}]", item) for key, item in value.items()]
    if isinstance(value, (list, tuple, range)):
        return [(f"[{i}]", item) for i, item in enumerate(value)]
    return None


def copy_value(value: Any) -> Any:
    """Returns a copy that shares nothing with `value` that could change."""
    if type(value) in _ATOMS:
        return value
    if is_config(value):
        return value._copy()
    if type(value).__module__ == "numpy" and isinstance(value, (float, str)):
        # np.float64 and np.str_ are Python's own float and str with another repr.
        return float(value) if isinstance(value, float) else str(value)
    if isinstance(value, _IMMUTABLE) or is_used_by_reference(value):
        return value
    named = named_values(value)
    if named is not None:
        copied = {name: copy_value(item) for name, item in named}
        return with_named_values(value, copied)
    if type(value) is tuple:
        items = [copy_value(item) for item in value]
        return value if all(a is b for a, b in zip(items, value, strict=True)) else tuple(items)
    if type(value) is list:
        return [copy_value(item) for item in value]
    if type(value) is dict:
        return {key: copy_value(item) for key, item in value.items()}
    return copy.deepcopy(value)


def is_used_by_reference(value: Any) -> bool:
    """Whether the value is kept as it is: leaves with a formatter and function-like objects never change."""
    return has_formatter(value) or is_function_like(value)


def values_equal(a: Any, b: Any) -> bool:
    """Whether two values are equal field by field, a NaN being equal to a NaN."""
    if a is b:
        return True
    if type(a) is not type(b):
        return bool(a == b) if not isinstance(a, (list, tuple)) else False
    if isinstance(a, float):
        return a == b or (a != a and b != b)
    named_a = named_values(a)
    if named_a is not None:
        return all(values_equal(x, getattr(b, name)) for name, x in named_a)
    if type(a) in (list, tuple):
        return len(a) == len(b) and all(values_equal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(values_equal(x, b[key]) for key, x in a.items())
    return bool(a == b)


class Unstorable(NamedTuple):
    """A value that configs cannot hold, and where it is inside of the value that was given."""

    path: str
    value: Any


def find_unstorable(value: Any, *, path: str = "") -> Optional[Unstorable]:
    """Returns the first part of `value` that a config cannot hold, or None.

    Args:
        value: Any value.
        path: What precedes the paths of the parts.

    Raises:
        InvalidConfigValueError: If a registered validator refuses a part.
    """
    matched = False
    for validator in _VALIDATORS:
        if validator.match_fn(value):
            validator.validate_fn(value)
            matched = True
    if matched or is_config(value) or _is_storable_leaf(value):
        return None
    items = child_items(value)
    if items is None or (isinstance(value, range) and not path):
        return Unstorable(path, value)
    for suffix, item in items:
        found = find_unstorable(item, path=path + suffix)
        if found is not None:
            return found
    return None


def _is_storable_leaf(value: Any) -> bool:
    if type(value) in _ATOMS:
        return True
    if isinstance(value, range):
        return False
    if isinstance(value, (*_IMMUTABLE, complex)) or has_formatter(value) or is_function_like(value):
        return True
    # Configurations and models of Hugging Face transformers.
    return callable(getattr(value, "from_pretrained", None))


def validate_config_field_value(value: Any) -> None:
    """Checks that configs can hold a value, containers with all their contents.

    Args:
        value: Any value.

    Raises:
        InvalidConfigValueError: If it, or a part of it, is of a kind that configs do not know.
    """
    found = find_unstorable(value)
    if found is not None:
        raise InvalidConfigValueError(unstorable_message(found, name="value", where=None))


def unstorable_message(found: Unstorable, *, name: str, where: Optional[str], set_at: str = "") -> str:
    """Writes the error about a value that configs cannot hold.

    Args:
        found: The value.
        name: The field that it was meant for.
        where: The config of the field. None: left out.
        set_at: The end of the sentence that says who set it, or nothing.
    """
    kind = type(found.value)
    kind_name = (
        kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    )
    advice = "Register other kinds with register_validator or register_formatter"
    if kind.__name__ == "partial":
        advice = "Write config_for_function(fn).set(...) in place of functools.partial(fn, ...)"
    elif isinstance(found.value, (set, frozenset)):
        advice = "Write a list or a tuple in place of a set"
    return error_message(
        where=where,
        what=f"{name}{found.path} is of type {kind_name}, which a config cannot hold{set_at}",
        expected="None, a number, string, enum, class, function or config, or a container of these",
        advice=advice,
    )
