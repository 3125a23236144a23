"""A config as text: one line per leaf, a dotted path and a value, in an order that no edit changes."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Optional

from axlearn.common.config._formatters import format_leaf, leaf_value
from axlearn.common.config._values import (
    child_items,
    is_config,
    is_dataclass_instance,
    is_named_tuple,
    named_values,
)

# A path and what is there.
Item = tuple[str, Any]
VisitFn = Callable[[str, Any], None]
EnterFn = Callable[[str, Any, Optional[list[Item]]], Optional[list[Item]]]
ExitFn = Callable[[str, Any], None]


def join_path(path: str, name: str) -> str:
    """Appends the name of a field to a path, which may be empty."""
    return f"{path}.{name}" if path else name


def path_items(path: str, value: Any) -> Optional[list[Item]]:
    """Returns the paths and values directly below a value, or None for a leaf."""
    if is_config(value):
        return [(join_path(path, name), item) for name, item in value.items()]
    items = child_items(value)
    return None if items is None else [(path + suffix, item) for suffix, item in items]


def visit(
    value: Any, *, path: str, visit_fn: VisitFn, enter_fn: Optional[EnterFn], exit_fn: Optional[ExitFn]
) -> None:
    """Walks a value depth first; see `ConfigBase.visit`."""
    items = path_items(path, value)
    if enter_fn is not None:
        items = enter_fn(path, value, items)
    if items is None:
        visit_fn(path, value)
        return
    for item_path, item in items:
        visit(item, path=item_path, visit_fn=visit_fn, enter_fn=enter_fn, exit_fn=exit_fn)
    if exit_fn is not None:
        exit_fn(path, value)


def is_omitted(value: Any, default: Any, omitted: Sequence[Any]) -> bool:
    """Whether a field prints no line: it holds its own default, which is one of those that say nothing."""
    return value is default and any(default is x for x in omitted)


def _visible_items(value: Any, omitted: Sequence[Any]) -> Optional[list[Item]]:
    """Like `child_items`, without the dataclass fields that print nothing."""
    items = child_items(value)
    if items is None or not is_dataclass_instance(value):
        return items
    fields = type(value).__dataclass_fields__
    return [
        (f"[{name!r}]", item)
        for name, item in named_values(value) or ()
        if not fields[name].metadata.get("skip_serialization")
        and not is_omitted(item, fields[name].default, omitted)
    ]


def flatten(value: Any, *, path: str, omitted: Sequence[Any]) -> Iterator[Item]:
    """Yields the leaves of a value with their paths, leaving out what a dump leaves out.

    Args:
        value: A config, a container or a leaf.
        path: The path of `value`.
        omitted: The defaults, compared by identity, whose fields print nothing.
    """
    if is_config(value):
        for name, leaf in value.to_flat_dict(omit_default_values=omitted).items():
            yield join_path(path, name), leaf
        return
    items = _visible_items(value, omitted)
    if items is None:
        yield path, value
        return
    for suffix, item in items:
        yield from flatten(item, path=path + suffix, omitted=omitted)


def format_lines(flat: dict[str, Any], *, kv_separator: str, field_separator: str) -> str:
    """Writes the leaves of a config as text."""
    return field_separator.join(f"{path}{kv_separator}{format_leaf(leaf)}" for path, leaf in flat.items())


def to_plain(value: Any) -> Any:
    """Returns nested dicts, lists and leaves in place of configs; names in place of classes and functions."""
    if is_config(value):
        return {name: to_plain(item) for name, item in value.items()}
    named = named_values(value)
    if named is not None and not is_named_tuple(value):
        return {name: to_plain(item) for name, item in named}
    if named is not None:
        return type(value)(*(to_plain(item) for _, item in named))
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(to_plain(item) for item in value)
    return leaf_value(value)
