"""Where values of a config come from: what their class says, and who has set them."""

from collections.abc import Iterator
from typing import Any, NamedTuple, Optional

from axlearn.common.config._dump import flatten
from axlearn.common.config._fields import MISSING
from axlearn.common.config._formatters import format_leaf
from axlearn.common.config._names import public_qualname
from axlearn.common.config._paths import Place, children, parse_path, walk
from axlearn.common.config._places import owner_of
from axlearn.common.config._provenance import SourceLocation
from axlearn.common.config._required import REQUIRED


class Origin(NamedTuple):
    """A value in a tree of configs, and where it comes from.

    Attributes:
        path: Its path in the form of a dump.
        value: The value.
        declared_by: The public name of the config class that has the field which the value is, or is part of.
        has_default: Whether that class has a value at this place.
        default: That value; None where there is none.
        location: Who set the field last; None where it still has its default.
    """

    path: str
    value: Any
    declared_by: str
    has_default: bool
    default: Any
    location: Optional[SourceLocation]


def origin_of(root: Any, path: str) -> Origin:
    """Returns what is at a path of a config, and where it comes from.

    Args:
        root: The config.
        path: The path, as dumps print it or as people type it.

    Raises:
        PathError: If it is no path or leads nowhere.
    """
    places = walk(root, parse_path(path))
    owner, inner = owner_of(places)
    field = owner._config_fields[inner[0].key]
    default: Any = field.default
    for part in inner[1:]:
        below = children(Place("", default, None))
        default = next((child.value for child in below if child.key == part.key), MISSING)
    return Origin(
        path=places[-1].path,
        value=places[-1].value,
        declared_by=public_qualname(type(owner)),
        has_default=default is not MISSING,
        default=None if default is MISSING else default,
        location=owner.where_set(inner[0].key),
    )


def dump_lines(root: Any, path: str = "") -> dict[str, str]:
    """Returns the lines of a dump by their paths, or those of a part of it.

    Args:
        root: The config.
        path: The part; empty: all of it. What a dump leaves out because its default says nothing has a line where
            it is asked for itself.

    Raises:
        PathError: If it is no path or leads nowhere.
    """
    if not path:
        return {at: format_leaf(leaf) for at, leaf in root.to_flat_dict().items()}
    place = walk(root, parse_path(path))[-1]
    return value_lines(place.value, path=place.path)


def value_lines(value: Any, *, path: str) -> dict[str, str]:
    """Returns the lines of a dump for a value at a path, by their paths."""
    flat = dict(flatten(value, path=path, omitted=(None, REQUIRED)))
    return {at: format_leaf(leaf) for at, leaf in flat.items()}


def places_below(root: Any, *, closed: tuple[str, ...] = ()) -> Iterator[Place]:
    """Yields every place of a config that a path can name, in the order of a dump.

    Args:
        root: The config.
        closed: Fields of the root below which nothing is looked at.
    """
    pending = children(Place("", root, None))[::-1]
    while pending:
        place = pending.pop()
        yield place
        if place.path not in closed:
            pending += children(place)[::-1]
