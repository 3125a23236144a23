"""Which words can stand at the cursor of a command line; loads no jax where the answers are known already."""

import argparse
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Optional

from axlearn.cli import config as config_verb
from axlearn.cli._completion_facts import facts_of
from axlearn.cli.main import verb_summaries

# Steps of a path between brackets that can be typed behind a dot as well: no shell asks for quotes then.
_PLAIN_KEY = re.compile(r"\[(?:'([A-Za-z_][\w-]*)'|(\d+))\]")
# A path that can be typed without quotes.
_TYPABLE = re.compile(r"[\w.-]+")


class _Line(NamedTuple):
    """A command line up to the cursor.

    Attributes:
        words: The words before the one that is being typed, without the command's own name.
        word: The one that is being typed; empty where it has not begun.
    """

    words: list[str]
    word: str


class _Command(NamedTuple):
    """A command of `axlearn config`.

    Attributes:
        flags: Its flags, and whether each takes a value.
        positionals: What its positional arguments are called.
    """

    flags: Mapping[str, bool]
    positionals: tuple[str, ...]


def candidates(line: str) -> list[str]:
    """Returns the words that could stand at the end of a line in the place of the last one.

    Args:
        line: A command line up to the cursor, the command first.

    Returns:
        Whole words in alphabetical order. One that is complete ends in a space. None where nothing is known.
    """
    words, word = _parse(line)
    if not words:
        return _complete(verb_summaries(), word)
    if words[0] != "config":
        return []
    commands = _commands()
    if len(words) == 1:
        return _complete(commands, word)
    command = commands.get(words[1])
    return [] if command is None else _of_command(command, words[2:], word)


def _parse(line: str) -> _Line:
    try:
        words = shlex.split(line)
    except ValueError:
        # A quote that is still open.
        words = line.split()
    word = words.pop() if words and not line[-1].isspace() else ""
    return _Line(words[1:], word)


def _commands() -> dict[str, _Command]:
    """The commands of `axlearn config` with what they take, by their parser."""
    parser = config_verb.make_parser()
    subparsers = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    found = {}
    for name, command in subparsers.choices.items():
        flags = {
            flag: action.nargs != 0
            for action in command._actions
            for flag in action.option_strings
            if flag.startswith("--")
        }
        positionals = tuple(action.dest for action in command._actions if not action.option_strings)
        found[name] = _Command(flags, positionals)
    return found


def _of_command(command: _Command, words: Sequence[str], word: str) -> list[str]:
    positionals, options, open_flag = _sort(command, words)
    if open_flag is not None:
        return _of_flag(open_flag, word, positionals, options)
    if word.startswith("--"):
        flag, equals, value = word.partition("=")
        if equals:
            return [f"{flag}={each}" for each in _of_flag(flag, value, positionals, options)]
        return [
            flag if takes_value else f"{flag} "
            for flag, takes_value in sorted((f"{f}=" if v else f, v) for f, v in command.flags.items())
            if flag.startswith(word)
        ]
    if len(positionals) >= len(command.positionals):
        return []
    if command.positionals[len(positionals)] == "path":
        return _paths(word, positionals, options, end=" ")
    return _configs(word, options)


def _sort(command: _Command, words: Sequence[str]) -> tuple[list[str], dict[str, str], Optional[str]]:
    """Tells positional arguments from flags with their values; the last flag may still lack its value."""
    positionals: list[str] = []
    options: dict[str, str] = {}
    pending: Optional[str] = None
    for word in words:
        flag, equals, value = word.partition("=")
        if pending is not None:
            options[pending], pending = word, None
        elif not word.startswith("--"):
            positionals.append(word)
        elif equals:
            options[flag] = value
        elif command.flags.get(flag):
            pending = flag
    return positionals, options, pending


def _of_flag(flag: str, value: str, positionals: Sequence[str], options: Mapping[str, str]) -> list[str]:
    match flag:
        case "--set":
            return [] if "=" in value else _paths(value, positionals, options, end="=")
        case "--path":
            return _paths(value, positionals, options, end=" ")
        case "--mesh_selector":
            return _complete(_machines(positionals, options), value)
    return []


def _configs(word: str, options: Mapping[str, str]) -> list[str]:
    name, at, machine = word.partition("@")
    if at:
        return [f"{name}@{each}" for each in _complete(_machines([name], options), machine)]
    return _complete(facts_of(options.get("--module")).names, word)


def _machines(positionals: Sequence[str], options: Mapping[str, str]) -> Iterable[str]:
    facts = facts_of(options.get("--module"))
    name = positionals[0].partition("@")[0] if positionals else ""
    return facts.machines(name)


def _paths(word: str, positionals: Sequence[str], options: Mapping[str, str], *, end: str) -> list[str]:
    """The paths that begin with a word, up to the next dot behind it."""
    if not positionals:
        return []
    facts = facts_of(options.get("--module"))
    found: dict[str, None] = {}
    for path in map(typed_path, facts.paths(positionals[0].partition("@")[0])):
        if not path.startswith(word) or not _TYPABLE.fullmatch(path):
            continue
        dot = path.find(".", len(word))
        found[path + end if dot < 0 else path[: dot + 1]] = None
    # What has parts is offered by its parts.
    return sorted(each for each in found if not (each.endswith(end) and f"{each[: -len(end)]}." in found))


def typed_path(path: str) -> str:
    """Returns a path of a dump as it is typed without quotes: `a['b'][0].c` as `a.b.0.c`."""
    return _PLAIN_KEY.sub(lambda match: f".{match[1] or match[2]}", path)


def _complete(words: Iterable[str], begun: str) -> list[str]:
    return [f"{word} " for word in sorted(words) if word.startswith(begun)]
