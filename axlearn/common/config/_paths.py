"""Paths into configs, as dumps print them and people type them: `a.b['key'][0].c`."""

import ast
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple, Optional

from axlearn.common.config._dump import join_path
from axlearn.common.config._errors import error_message
from axlearn.common.config._formatters import format_leaf
from axlearn.common.config._messages import LONG, SHORT
from axlearn.common.config._names import listing, nearest_names
from axlearn.common.config._values import is_config, named_values


class PathError(ValueError):
    """A path is not written as a path, or leads nowhere."""


class PrintedKey(str):
    """A key that prints as no literal, such as the member of an enum, as it prints."""


class Step(NamedTuple):
    """One part of a path.

    Attributes:
        key: The name after a dot, or the literal between brackets; a `PrintedKey` where there is `<...>`.
        is_name: Whether it stood after a dot.
    """

    key: Any
    is_name: bool


class Place(NamedTuple):
    """A value in a tree, and the way to it.

    Attributes:
        path: The path in the form of a dump.
        value: What is there.
        key: What the value is called in what contains it; None at the root.
    """

    path: str
    value: Any
    key: Any


def split_assignment(text: str) -> tuple[str, str]:
    """Splits `path=value` at the first equals sign that is not in brackets.

    Raises:
        PathError: If there is none.
    """
    for i, char, depth in unquoted(text):
        if char == "=" and depth == 0:
            return text[:i].strip(), text[i + 1 :].strip()
    raise PathError(error_message(what=f"'{text}' has no value", expected="path=value"))


def unquoted(text: str) -> Iterator[tuple[int, str, int]]:
    """Yields what is not between quotes in brackets: index, character, and depth of brackets behind it."""
    depth, quote, is_escaped = 0, "", False
    for i, char in enumerate(text):
        if quote:
            if char == quote and not is_escaped:
                quote = ""
            is_escaped = char == "\\" and not is_escaped
            continue
        if depth and char in "'\"":
            quote = char
        elif char in "[]":
            depth += 1 if char == "[" else -1
        yield i, char, depth


def parse_path(text: str) -> list[Step]:
    """Splits a path into its steps.

    Raises:
        PathError: If it is not a path.
    """
    steps: list[Step] = []
    rest = text
    while rest:
        if rest[0] == "[":
            end = _closing_bracket(rest)
            steps.append(Step(_key(rest[1:end].strip(), path=text), is_name=False))
            rest = rest[end + 1 :]
        else:
            if steps:
                rest = rest.removeprefix(".")
            name = rest.replace("[", ".").partition(".")[0]
            steps.append(Step(name, is_name=True))
            rest = rest[len(name) :]
            if not name or rest == ".":
                raise _not_a_path(text)
    if not steps:
        raise _not_a_path(text)
    return steps


def _key(text: str, *, path: str) -> Any:
    """Returns what stands between brackets."""
    if text == "*":
        return text
    if text.startswith("<") and text.endswith(">"):
        return PrintedKey(text)
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError) as e:
        raise _not_a_path(path) from e


def _not_a_path(text: str) -> PathError:
    return PathError(
        error_message(
            what=f"'{text}' is not a path", expected="names, keys and indices, as in a.b['key'][0].c"
        )
    )


def _closing_bracket(text: str) -> int:
    """Returns the index of the bracket that closes the one at the beginning."""
    for i, _, depth in unquoted(text):
        if depth == 0:
            return i
    raise _not_a_path(text)


def children(place: Place) -> list[Place]:
    """Returns the places directly below one."""
    value, path = place.value, place.path
    if is_config(value):
        return [Place(join_path(path, name), item, name) for name, item in value.items()]
    named = named_values(value)
    if named is not None:
        return [Place(f"{path}[{name!r}]", item, name) for name, item in named]
    if isinstance(value, dict):
        return [Place(f"{path}[{key!r}]", item, key) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return [Place(f"{path}[{i}]", item, i) for i, item in enumerate(value)]
    return []


def _find_child(place: Place, step: Step) -> Optional[Place]:
    below = children(place)
    is_sequence = isinstance(place.value, (list, tuple)) and named_values(place.value) is None
    key = step.key
    if is_sequence and step.is_name and key.lstrip("-").isdigit():
        key = int(key)
    if is_sequence and isinstance(key, int) and -len(below) <= key < 0:
        key += len(below)
    if isinstance(key, PrintedKey):
        return next((child for child in below if repr(child.key) == key), None)
    exact = [child for child in below if child.key == key and type(child.key) is type(key)]
    if exact or not step.is_name:
        return exact[0] if exact else None
    # A key of a dict that is not a string, or holds other marks, may be typed as it prints.
    similar = [child for child in below if isinstance(place.value, dict) and str(child.key) == key]
    return similar[0] if len(similar) == 1 else None


def walk(root: Any, steps: list[Step], *, closed: Collection[str] = ()) -> list[Place]:
    """Follows a path from a config.

    Args:
        root: The config.
        steps: The path.
        closed: Fields of the root that an error names no places of.

    Returns:
        The root and the place after each step.

    Raises:
        PathError: If a step leads nowhere, with the legal path that is nearest and what there is at the last
            good place.
    """
    places = [Place("", root, None)]
    for i, step in enumerate(steps):
        child = _find_child(places[-1], step)
        if child is None:
            raise PathError(_dead_end(root, places[-1], steps[i:], closed=closed))
        places.append(child)
    return places


def value_at(root: Any, path: str, *, closed: Collection[str] = ()) -> Any:
    """Returns what is at a path of a config, as dumps print paths: `a.b['key'][0].c`.

    Args:
        root: The config.
        path: The path.
        closed: Fields of the root that an error names no places of.

    Returns:
        The value itself, no copy: what is set in a config found so is set in `root`.

    Raises:
        PathError: If it is no path or leads nowhere, with the legal path that is nearest.
    """
    return walk(root, parse_path(path), closed=closed)[-1].value


def _dead_end(root: Any, place: Place, rest: list[Step], *, closed: Collection[str]) -> str:
    below = children(place)
    step = rest[0]
    typed = str(step.key) if step.is_name else f"[{step.key!r}]"
    where = place.path or "the config"
    elsewhere = _elsewhere(root, rest, closed=closed)
    if not below and isinstance(place.value, (dict, list, tuple)):
        return error_message(
            where=where, what=f"there is no '{typed}': this is empty", advice="Set all of it"
        )
    if not below:
        return error_message(
            where=where,
            what=f"'{typed}' leads nowhere: {format_leaf(place.value)} has no parts",
            advice=elsewhere,
        )
    names = {str(child.key): child for child in below}
    near = [names[name].path for name in nearest_names(str(step.key), list(names))]
    if near and len(rest) > 1:
        # With this step mended the others may well be right.
        elsewhere = None
    closing = "To add a key, set all of it" if isinstance(place.value, dict) else None
    shown = [str(child.key) if is_config(place.value) else f"[{child.key!r}]" for child in below]
    kind = "Fields" if is_config(place.value) else "Keys"
    if isinstance(place.value, (list, tuple)) and named_values(place.value) is None:
        return error_message(
            where=where,
            what=f"there is no '{typed}'",
            expected=f"an index from 0 to {len(below) - 1}",
            advice=elsewhere or "To make it longer or shorter, set all of it",
        )
    legal = f"{kind}: {listing(shown, limit=SHORT if near or elsewhere else LONG)}."
    return error_message(
        where=where,
        what=f"there is no '{typed}'",
        nearest=near,
        advice=" ".join(part for part in (elsewhere, legal, closing) if part),
    )


def _elsewhere(root: Any, rest: list[Step], *, closed: Collection[str]) -> Optional[str]:
    """Names the places in the whole tree that end in what was typed."""
    if not (rest[0].is_name and rest[-1].is_name):
        return None
    found: list[str] = []
    pending = [place for place in children(Place("", root, None)) if place.key not in closed]
    while pending:
        place = pending.pop(0)
        if place.key == rest[-1].key:
            found.append(place.path)
        pending += children(place)
    # More than a few would not help to choose.
    limit = 3
    return f"There is {listing(found, limit=limit)}." if found else None
