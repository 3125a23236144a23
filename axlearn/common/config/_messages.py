"""What configs say about a field that is unknown, frozen or given a wrong value."""

from collections.abc import Callable
from typing import Any, Optional

from axlearn.common.config._errors import error_message
from axlearn.common.config._fields import Field
from axlearn.common.config._names import listing, nearest_names, public_qualname
from axlearn.common.config._provenance import SourceLocation
from axlearn.common.config._types import Mismatch, describe_value

# How many names are listed where the right one has been suggested, and where it has not.
SHORT, LONG = 8, 40


def where_is(cfg: Any) -> str:
    """Returns what to call a config in a message: its path where it is known, and its class."""
    name = public_qualname(type(cfg))
    return f"{cfg._path} ({name})" if cfg._path else name


def set_at(location: Optional[SourceLocation]) -> str:
    """Returns the words that say who set a field; empty where nobody knows."""
    if location is None:
        return ""
    return f" (set {'at' if location.line else 'by'} {location})"


def unknown_field_message(cfg: Any, name: str, location: Optional[SourceLocation]) -> str:
    """Writes the error about a field that a config does not have."""
    nearest = nearest_names(name, cfg.keys())
    return error_message(
        where=where_is(cfg),
        what=f"unknown field '{name}'{set_at(location)}",
        nearest=nearest,
        advice=f"Fields: {listing(cfg.keys(), limit=SHORT if nearest else LONG)}",
    )


def frozen_message(cfg: Any, name: str, location: Optional[SourceLocation]) -> str:
    """Writes the error about setting a field of a frozen config."""
    return error_message(
        where=where_is(cfg),
        what=f"cannot set '{name}' of a frozen config{set_at(location)}",
        advice=f"Configs are frozen when something is built from them; change a copy: cfg.clone({name}=...)",
    )


def mismatch_message(cfg: Any, field: Field, mismatch: Mismatch, location: Optional[SourceLocation]) -> str:
    """Writes the error about a value of the wrong type."""
    nearest, advice = None, None
    value = describe_value(mismatch.value)
    if isinstance(mismatch.value, type) and hasattr(mismatch.value, "default_config"):
        advice = f"Write {mismatch.value.__name__}.default_config() in place of the class"
    elif not mismatch.path:
        nearest = _nearest_value(field, mismatch.value)
    return error_message(
        where=where_is(cfg),
        what=f"{field.name}{mismatch.path}={value} has the wrong type{set_at(location)}",
        expected=mismatch.expected,
        nearest=nearest,
        advice=advice,
    )


def _nearest_value(field: Field, value: Any) -> Any:
    """Returns `value` converted to a type that the field takes, or None where no conversion is obvious."""
    conversions: list[Callable[[Any], Any]] = []
    if isinstance(value, str):
        conversions = [int, float]
    elif isinstance(value, float) and value.is_integer():
        conversions = [int]
    elif isinstance(value, (list, tuple)):
        conversions = [tuple, list]
    for convert in conversions:
        try:
            converted = convert(value)
        except ValueError:
            continue
        if field.check(converted) is None:
            return converted if not isinstance(converted, list) else repr(converted)
    return None
