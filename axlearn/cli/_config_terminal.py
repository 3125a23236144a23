"""What `axlearn config` writes: plain text to files and pipes, colours to people, JSON to programs."""

import ast
import json
import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


class Styled(NamedTuple):
    """A line, and how it looks where there are colours.

    Attributes:
        text: The line.
        style: What rich calls it, such as "green"; empty: as it is.
    """

    text: str
    style: str = ""


def print_lines(lines: Iterable[Styled]) -> None:
    """Prints lines, in colour if a person reads them and does not mind ($NO_COLOR)."""
    if not _is_colourful():
        for line in lines:
            print(line.text)
        return
    console, text_cls = _load_rich()
    for line in lines:
        console.print(text_cls(line.text, style=line.style), soft_wrap=True)


def print_dump(text: str) -> None:
    """Prints a dump. A file gets exactly the dump, which does not end in a newline, as golden files do not."""
    sys.stdout.write(text)
    if sys.stdout.isatty():
        sys.stdout.write("\n")


def print_json(content: Mapping[str, Any]) -> None:
    """Prints a JSON object."""
    print(json.dumps(content, indent=2, allow_nan=False))


def json_value(text: str) -> Any:
    """Returns what JSON has for a value of a dump: numbers, strings, true, false and null; else the dump's text."""
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text
    return value if value is None or isinstance(value, bool | int | float | str) else text


def _is_colourful() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _load_rich() -> tuple[Any, Any]:
    """rich takes 40 ms to load, which only a terminal is worth."""
    from rich.console import Console
    from rich.text import Text

    return Console(highlight=False), Text
