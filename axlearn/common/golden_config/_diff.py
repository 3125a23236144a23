"""What differs between two dumps, by path."""

import re
from collections.abc import Iterator
from typing import NamedTuple, Optional

# A path ends at the first colon that stands in no quotes: keys of dicts are quoted.
_LINE = re.compile(r"""((?:'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|[^'":]|:(?! ))*): (.*)""")


class Change(NamedTuple):
    """A path that two texts do not have with the same value.

    Attributes:
        path: The path.
        old: The value before; None: it was not there.
        new: The value after; None: it is gone.
    """

    path: str
    old: Optional[str]
    new: Optional[str]

    @property
    def mark(self) -> str:
        """What stands before it in a list of differences: "+", "-" or "~"."""
        return "+" if self.old is None else "-" if self.new is None else "~"

    def __str__(self) -> str:
        values = " -> ".join(value for value in (self.old, self.new) if value is not None)
        return f"{self.mark} {self.path}: {values}"


def diff_items(old: str, new: str) -> list[Change]:
    """Returns what differs between two texts whose lines are "path: value", in the order of the texts.

    Args:
        old: The text before.
        new: The text after.
    """
    before, after = dict(_items(old)), dict(_items(new))
    return [
        Change(key[0], before.get(key), after.get(key))
        for key in _merged(list(before), list(after))
        if before.get(key) != after.get(key)
    ]


def diff_texts(old: str, new: str) -> list[str]:
    """Returns what differs between two texts whose lines are "path: value".

    Args:
        old: The text before.
        new: The text after.

    Returns:
        A line for each path that is not in both with the same value, in the order of the texts:
        "~ path: old -> new", "+ path: value" for what is new, "- path: value" for what is gone.
    """
    return [str(change) for change in diff_items(old, new)]


def diff_text(old: str, new: str, *, limit: int = 50) -> str:
    """Returns the first `limit` lines of `diff_texts`, with a count of the rest."""
    lines = diff_texts(old, new)
    rest = [f"... ({len(lines) - limit} more)"] if len(lines) > limit else []
    return "\n".join([*lines[:limit], *rest])


def _items(text: str) -> Iterator[tuple[tuple[str, int], str]]:
    """Yields the path of each line, with how often it stood before, and its value."""
    counts: dict[str, int] = {}
    for line in text.splitlines():
        match = _LINE.fullmatch(line)
        path, value = match.groups() if match else (line, "")
        count = counts[path] = counts.get(path, -1) + 1
        yield (path, count), value


def _merged(old: list[tuple[str, int]], new: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """All keys: the new ones in their order, each that is gone behind the key that it stood behind."""
    known = set(new)
    gone_behind: dict[object, list[tuple[str, int]]] = {}
    anchor: object = None
    for key in old:
        if key in known:
            anchor = key
        else:
            gone_behind.setdefault(anchor, []).append(key)
    merged = gone_behind.get(None, [])
    for key in new:
        merged = [*merged, key, *gone_behind.get(key, [])]
    return merged
