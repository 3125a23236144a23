"""What an override did, for people: the record of one, and lines of text."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from axlearn.common.config._formatters import format_leaf
from axlearn.common.config._names import public_name
from axlearn.common.config._paths import parse_path, split_assignment
from axlearn.common.config._same_fields import slot_of
from axlearn.common.config._values import is_config, named_values
from axlearn.common.config._wildcards import is_pattern


class Override(NamedTuple):
    """A value that was set from text.

    Attributes:
        path: Where, in the form of a dump.
        old: The value before.
        new: The value now.
        text: What was typed, `path=value`.
        dropped: What the old value said and the new one does not say, where another class or function came in
            the place of one: lines of `path: value`.
    """

    path: str
    old: Any
    new: Any
    text: str
    dropped: tuple[str, ...] = ()


def override_lines(overrides: Sequence[Override]) -> list[str]:
    """Returns what overrides did that their texts do not say: the places that a pattern meant, and values that were
    lost with a class or a function that another has replaced.

    Args:
        overrides: What `apply_overrides` returned.

    Returns:
        Lines for people; none for overrides that did what stands there.
    """
    lines = []
    for text, group in itertools.groupby(overrides, key=lambda override: override.text):
        members = list(group)
        is_broad = _is_pattern_text(text)
        if is_broad:
            lines.append(f"override '{text}' sets {len(members)} value{'s' if len(members) > 1 else ''}:")
        for override in members:
            if is_broad or override.dropped:
                change = f"{value_text(override.old)} -> {value_text(override.new)}"
                lines.append(f"{'  ' if is_broad else 'override '}{override.path}: {change}")
            kept = public_name(builds(override.new)) if override.dropped else ""
            lines += [f"  dropped, {kept} has no such field: {line}" for line in override.dropped]
    return lines


def _is_pattern_text(text: str) -> bool:
    """Whether the path of `path=value` may mean several places."""
    return any(is_pattern(step) for step in parse_path(split_assignment(text)[0]))


def value_text(value: Any) -> str:
    """Returns a value as one line of text: configs, also inside of containers, as what they build, anything else as
    dumps print it.
    """
    if is_config(value):
        built = builds(value)
        return f"a config of {public_name(built)}" if built is not None else f"a {type(value).__name__}"
    named = named_values(value)
    if named is not None:
        return f"{type(value).__name__}({', '.join(f'{name}={value_text(item)}' for name, item in named)})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {value_text(item)}" for key, item in value.items()) + "}"
    if type(value) in (list, tuple):
        items = ", ".join(value_text(item) for item in value)
        return f"[{items}]" if isinstance(value, list) else f"({items}{',' if len(value) == 1 else ''})"
    return format_leaf(value)


def builds(value: Any) -> Any:
    """Returns the class or function that a config builds; that itself where it is no config."""
    return getattr(value, slot_of(value), None) if is_config(value) else value
