"""`path=value` from a command line, applied to a config: all of them, or none and every reason why not."""

import copy
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from axlearn.common.config._base import ConfigBase
from axlearn.common.config._errors import (
    FrozenConfigError,
    InvalidConfigValueError,
    error_message,
    join_messages,
)
from axlearn.common.config._fields import dataclass_fields
from axlearn.common.config._names import listing
from axlearn.common.config._parse_value import ParseError, parse_value
from axlearn.common.config._paths import PathError, Place, parse_path, split_assignment, walk
from axlearn.common.config._provenance import SourceLocation
from axlearn.common.config._types import describe_value, element_annotation, is_dtype_like
from axlearn.common.config._values import is_config, is_dataclass_instance, named_values, with_named_values


class Override(NamedTuple):
    """A value that was set from text.

    Attributes:
        path: Where, in the form of a dump.
        old: The value before.
        new: The value now.
        text: What was typed, `path=value`.
    """

    path: str
    old: Any
    new: Any
    text: str


class InvalidOverrideError(ValueError):
    """Overrides cannot be applied; the message has a reason for each."""


def apply_overrides(cfg: ConfigBase, overrides: Sequence[str]) -> list[Override]:
    """Sets values in a config from text.

    A path is what a dump prints before the colon; keys of dicts may also follow a dot without quotes. A value
    is read by the type of its place: numbers (`1e-3`, `1_000`), `true`, `false`, `None`, strings with or
    without quotes, names or values of enums, literal tuples, lists and dicts, names of dtypes, partition
    specs.

    Args:
        cfg: A config that is not frozen; it is changed in place.
        overrides: Texts of the form `path=value`. Of two for the same path the later wins.

    Returns:
        What was set, in the order given.

    Raises:
        FrozenConfigError: If the config is frozen.
        InvalidOverrideError: If any override cannot be applied. Then none is, and the message says of each
            why not.
    """
    if cfg.is_frozen:
        raise FrozenConfigError(
            error_message(
                what="overrides cannot be applied to a frozen config", advice="Apply them to cfg.clone()"
            )
        )
    trial = cfg.clone()
    problems = []
    for text in overrides:
        try:
            _apply(trial, text)
        except (InvalidConfigValueError, InvalidOverrideError, PathError) as e:
            problems.append(f"override '{text}': {e}")
    if problems:
        heading = f"{len(problems)} of {len(overrides)} overrides cannot be applied:"
        raise InvalidOverrideError(join_messages(problems, heading=heading))
    return [_apply(cfg, text) for text in overrides]


def _apply(cfg: ConfigBase, text: str) -> Override:
    path_text, value_text = split_assignment(text)
    places = walk(cfg, parse_path(path_text))
    target = places[-1]
    owner_index = max(i for i, place in enumerate(places[:-1]) if is_config(place.value))
    owner, inner = places[owner_index].value, places[owner_index + 1 :]
    new = _parse(value_text, target, annotation=_annotation_of(owner, inner))
    name = inner[0].key
    value = _replaced(inner, new)
    mismatch = owner._config_fields[name].check(value)
    if mismatch is not None:
        raise InvalidOverrideError(
            error_message(
                where=f"{inner[0].path}{mismatch.path}",
                what=f"cannot be {describe_value(mismatch.value)}",
                expected=mismatch.expected,
            )
        )
    setattr(owner, name, value)
    owner._sources[name] = SourceLocation(f"override '{text}'", 0)
    return Override(path=target.path, old=target.value, new=new, text=text)


def _annotation_of(owner: Any, inner: list[Place]) -> Any:
    """Returns the annotation of the last of the places that lead from a config's field to a value in it."""
    annotation = owner._config_fields[inner[0].key].annotation
    for container, part in itertools.pairwise(inner):
        if is_dataclass_instance(container.value):
            annotation = dataclass_fields(type(container.value))[part.key].annotation
        else:
            annotation = element_annotation(annotation, part.key)
    return annotation


def _parse(text: str, target: Place, *, annotation: Any) -> Any:
    try:
        return parse_value(text, annotation=annotation, current=target.value)
    except ParseError as e:
        expected, advice = str(e), None
        if is_config(target.value):
            fields = [f"{target.path}.{name}" for name, _ in target.value.items()]
            advice = f"Set its fields: {listing(fields, limit=5)}"
        elif not is_dtype_like(target.value) and callable(target.value):
            expected, advice = "a class or a function", "They are set in Python"
        elif target.value is None and "a config" in expected:
            advice = "Configs are set in Python"
        raise InvalidOverrideError(
            error_message(
                where=target.path, what=f"cannot be set to '{text}'", expected=expected, advice=advice
            )
        ) from e


def _replaced(inner: list[Place], new: Any) -> Any:
    """Returns the value of a config's field with one part of it replaced, leaving the old value as it is."""
    result = new
    for container, part in zip(reversed(inner[:-1]), reversed(inner[1:]), strict=True):
        result = _with_part(container.value, part.key, result)
    return result


def _with_part(container: Any, key: Any, value: Any) -> Any:
    if named_values(container) is not None:
        return with_named_values(container, {key: value})
    if isinstance(container, tuple):
        return tuple(value if i == key else item for i, item in enumerate(container))
    result = copy.copy(container)
    result[key] = value
    return result
