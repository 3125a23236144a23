"""Paths with `*` in them: which places of a config they mean."""

import fnmatch
from collections.abc import Collection, Iterator
from typing import Any

from axlearn.common.config._paths import Place, Step, children

_ANY_STEP, _ANY_STEPS = "*", "**"


def is_pattern(step: Step) -> bool:
    """Whether a step of a path may mean several places: `*`, `**` or a name with a star in it."""
    return isinstance(step.key, str) and "*" in step.key and (step.is_name or step.key == _ANY_STEP)


def matching_places(root: Any, steps: list[Step], *, closed: Collection[str] = ()) -> list[Place]:
    """Returns the places that a pattern means, those inside of others before these.

    The config itself is no such place: there is no putting another in its place.

    Args:
        root: The config.
        steps: The pattern. `*` is any one step, `**` any number of steps and none, `linear*` any name that
            begins so.
        closed: Fields of the root that no pattern goes into.
    """
    found: dict[str, Place] = {}
    for place in _matches(Place("", root, None), steps, closed=closed):
        if place.path:
            found.setdefault(place.path, place)
    # A walk comes to a place before it comes to what is inside.
    return list(reversed(found.values()))


def _matches(place: Place, steps: list[Step], *, closed: Collection[str]) -> Iterator[Place]:
    if not steps:
        yield place
        return
    first, rest = steps[0], steps[1:]
    below = [child for child in children(place) if not (place.path == "" and child.key in closed)]
    if first.is_name and first.key == _ANY_STEPS:
        yield from _matches(place, rest, closed=closed)
        for child in below:
            yield from _matches(child, steps, closed=closed)
        return
    for child in below:
        if _fits(child, first):
            yield from _matches(child, rest, closed=closed)


def _fits(child: Place, step: Step) -> bool:
    if is_pattern(step):
        return step.key == _ANY_STEP or fnmatch.fnmatchcase(str(child.key), step.key)
    return bool(child.key == step.key) if not step.is_name else str(child.key) == step.key
