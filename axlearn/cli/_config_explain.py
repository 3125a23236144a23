"""`axlearn config explain`: who set a value, and what has changed it since."""

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Optional

import axlearn
from axlearn.cli._config_history import FILE, OVERRIDE, RECIPE, Stage, recorded_overrides, stages
from axlearn.cli._config_source import Options, Source, parse_source
from axlearn.cli._config_terminal import Styled, json_value, print_json, print_lines
from axlearn.common.config import (
    ConfigBase,
    Origin,
    PathError,
    SourceLocation,
    dump_lines,
    origin_of,
    value_lines,
    value_text,
)

_DEFAULT, _LIBRARY = "default", "library"
_STYLES = {RECIPE: "", _DEFAULT: "dim", _LIBRARY: "dim", FILE: "", OVERRIDE: "magenta"}
_ABSENT = "(not there)"
_LIBRARY_DIR = os.path.join(os.path.dirname(os.path.abspath(axlearn.__file__)), "")


class Event(NamedTuple):
    """A moment at which a value became what it was until the next.

    Attributes:
        kind: "default", "library", "recipe", "file", "mesh_rule" or "override".
        by: What did it, in words.
        value: The value then, as dumps print it; None: it was not there.
        written_at: The lines that say so, the innermost first.
    """

    kind: str
    by: str
    value: Optional[str]
    written_at: tuple[SourceLocation, ...]


def run(args: argparse.Namespace, options: Options) -> int:
    """Prints where the value at `args.path` comes from; returns the exit status."""
    source = parse_source(args.source, options)
    way = stages(source, options)
    origin = origin_of(way[-1].cfg, args.path)
    told, found = list(_recorded(source, origin.path)), events(way, origin.path)
    # A run's record is about how its file came to be.
    index = next((i for i, event in enumerate(found) if event.kind == FILE), len(found))
    found[index:index] = told
    leaves = dict(dump_lines(way[-1].cfg, origin.path)) if _has_parts(origin.value) else {}
    histories = {path: events(way, path) for path in leaves}
    if args.json:
        print_json(
            {
                "config": source.label,
                "path": origin.path,
                "declared_by": origin.declared_by,
                "value": json_value(_text(origin.value)),
                "events": [_json_event(event) for event in found],
                "leaves": [
                    {
                        "path": path,
                        "value": json_value(text),
                        "events": [_json_event(event) for event in histories[path]],
                    }
                    for path, text in leaves.items()
                ],
            }
        )
        return 0
    print_lines(_lines(origin, found))
    print_lines(_leaf_lines(leaves, histories))
    return 0


def events(way: Sequence[Stage], path: str) -> list[Event]:
    """Returns what a value went through.

    Args:
        way: The stages of its config.
        path: The path of the value, in the form of a dump.
    """
    found: list[Event] = []
    before: Any = None
    for i, stage in enumerate(way):
        origin = _origin(stage.cfg, path)
        now = None if origin is None else _fingerprint(origin.value)
        if i == 0 and origin is not None:
            found += _first_events(origin, stage)
        elif now != before or (origin is not None and _is_set_again(way[i - 1], stage, path)):
            shown = None if origin is None else _text(origin.value)
            found.append(Event(stage.kind, stage.by, shown, stage.written_at))
        before = now
    return found


def _first_events(origin: Origin, stage: Stage) -> Iterator[Event]:
    """What the class, and then the recipe or the file say."""
    if origin.has_default:
        yield Event(_DEFAULT, f"the default of {origin.declared_by}", _text(origin.default), ())
    location = origin.location
    if stage.kind == FILE:
        if not origin.has_default or _fingerprint(origin.default) != _fingerprint(origin.value):
            yield Event(FILE, stage.by, _text(origin.value), ())
        return
    if location is None:
        return
    lines = (location, *location.callers)
    lines = tuple(line for line in lines if not _is_of_command(line))
    kind = RECIPE if any(not is_of_library(line) for line in lines) else _LIBRARY
    by = stage.by if kind == RECIPE else "the class that has it as a part"
    yield Event(kind, by, _text(origin.value), lines)


def _recorded(source: Source, path: str) -> Iterator[Event]:
    """What the record of a run says of a value."""
    for when, record in recorded_overrides(source):
        if record.get("path") == path:
            new = record.get("new")
            text = new if isinstance(new, str) else json.dumps(new)
            yield Event(OVERRIDE, f"--set {record.get('text')}, at {when}", text, ())


def _is_set_again(before: Stage, stage: Stage, path: str) -> bool:
    """Whether a stage set a value to what it was."""
    old, new = _origin(before.cfg, path), _origin(stage.cfg, path)
    return old is not None and new is not None and old.location != new.location


def _origin(cfg: ConfigBase, path: str) -> Optional[Origin]:
    try:
        return origin_of(cfg, path)
    except PathError:
        return None


def is_of_library(location: SourceLocation) -> bool:
    """Whether a line is in the library, and not in a recipe, ours or the user's."""
    recipes = os.path.join(_LIBRARY_DIR, "experiments", "")
    return location.file.startswith(_LIBRARY_DIR) and not location.file.startswith(recipes)


def _is_of_command(location: SourceLocation) -> bool:
    """Whether a line only led to the recipe: the command, what starts it, or the registry of recipes."""
    return location.file.startswith("<") or location.file.startswith(os.path.join(_LIBRARY_DIR, "cli", ""))


# Text.


def _has_parts(value: Any) -> bool:
    """Whether a value is worth a line for each of its parts."""
    return isinstance(value, ConfigBase) or not _is_short(value)


def _fingerprint(value: Any) -> tuple[tuple[str, str], ...]:
    """All that a dump says of a value."""
    return tuple(value_lines(value, path="").items())


def _text(value: Any) -> str:
    """A value in one line; of a large one, what kind of thing it is."""
    if isinstance(value, ConfigBase) or _is_short(value):
        return value_text(value)
    num_lines = len(_fingerprint(value))
    return f"a {type(value).__name__} of {num_lines} line{'' if num_lines == 1 else 's'}"


def _is_short(value: Any) -> bool:
    """Whether a value is a leaf of a dump, or a list of some of them."""
    if type(value) in (list, tuple):
        return all(_is_short(item) and type(item) is not dict for item in value)
    return not isinstance(value, ConfigBase) and set(value_lines(value, path="")) == {""}


def _lines(origin: Origin, found: Sequence[Event]) -> Iterator[Styled]:
    yield Styled(f"{origin.path}: {_text(origin.value)}", "bold")
    width = max((len(event.kind) for event in found), default=0)
    for event in found:
        value = _ABSENT if event.value is None else event.value
        kind = event.kind.replace("_", " ")
        yield Styled(f"  {kind:<{width}}  {value}  ({event.by})", _STYLES.get(event.kind, "cyan"))
        for i, location in enumerate(event.written_at):
            yield Styled(f"  {'':<{width}}    {'at' if i == 0 else 'from'} {location}", "dim")


def _leaf_lines(leaves: dict[str, str], histories: dict[str, list[Event]]) -> Iterator[Styled]:
    """The dump of a part, each line with who set it last."""
    if leaves:
        yield Styled("")
    for path, text in leaves.items():
        last = histories[path][-1] if histories[path] else None
        comment = "" if last is None else f"  # {_comment(last, histories[path])}"
        yield Styled(f"{path}: {text}{comment}", _STYLES.get(last.kind if last else "", "cyan"))


def _comment(event: Event, history: Sequence[Event]) -> str:
    """Who set a value last, in few words."""
    if event.kind in (RECIPE, _LIBRARY):
        lines = [line for line in event.written_at if event.kind == _LIBRARY or not is_of_library(line)]
        return str(lines[0])
    if event.kind == _DEFAULT:
        return "default"
    was = history[-2].value if len(history) > 1 else None
    return event.by if was in (None, event.value) else f"{event.by}; was {was}"


def _json_event(event: Event) -> dict[str, Any]:
    return {
        "kind": event.kind,
        "by": event.by,
        "value": None if event.value is None else json_value(event.value),
        "is_there": event.value is not None,
        "written_at": [str(location) for location in event.written_at],
    }
