"""Runs a guide: writes the files that it shows, runs its commands one after another, compares what they print.

In the guide a file is a block ```` ```python file=my_project/recipes.py ````, and a change of it a block
```` ```diff file=my_project/recipes.py ````, with some lines around it, so that the place is the only one like it.
Commands with their output are a block ```` ```console ````, in which a line `$ command` is followed by what it prints
(both streams) and, where it is not 0, by the exit status as `[status 2]`. A line `...` of an output stands for any
number of lines, for what differs from run to run or does not matter.
"""

import difflib
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

# What differs from run to run or from machine to machine, and how guides show it.
REPLACEMENTS = (
    # Where this package lies, and on which line of it something stands.
    (re.escape(str(pathlib.Path(__file__).resolve().parents[2])) + r"/(\S+\.py):\d+", r".../\1:NN"),
    (r"(?m)^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "2026-11-21 12:00:00"),
    # Losses are equal to some digits only, between machines.
    (r"\bloss (\d+\.\d)\d*", r"loss \1"),
    (r"\b[\d,]+ tokens/s .*", "N tokens/s ..."),
    (r"\b(eval \w+ at step \d+) .*", r"\1  ..."),
    (r"\bMFU is of .*", "MFU is of ..."),
    (r"\bin \d+\.\d+s\b", "in 3.21s"),
    (r"free memory of .* GiB", "free memory"),
)

_BLOCK = re.compile(r"^```(?P<info>[^\n]*)\n(?P<body>.*?)^```$", re.DOTALL | re.MULTILINE)
_ANY_LINES = "..."
# What this run of the tests has set for itself.
# pytest does not shorten its lines where CI is set.
_OF_THIS_RUN = ("CI", "XLA_FLAGS", "PYTHONPATH", "PYTEST_", "UPDATE_", "JAX_")


class Command(NamedTuple):
    """A command of a guide.

    Attributes:
        line: What is typed.
        output: The lines that stand below it.
        end: Where in the guide its output ends.
    """

    line: str
    output: list[str]
    end: int


class Difference(NamedTuple):
    """A command that printed something else than the guide says."""

    command: Command
    printed: list[str]


def run_guide(
    text: str, *, folder: pathlib.Path, replacements: Sequence[tuple[str, str]] = ()
) -> list[Difference]:
    """Runs all of a guide.

    Args:
        text: The guide.
        folder: Where its files and commands live; empty.
        replacements: Regular expressions with what to put in place of their matches, in what is printed.

    Returns:
        What was printed otherwise than the guide says.
    """
    differences = []
    for block in _BLOCK.finditer(text):
        info, body = block["info"].strip(), block["body"]
        path = _file_of(info)
        if path is not None:
            _write(folder / path, body, is_change=info.startswith("diff"))
        for command in _commands(body, start=block.start("body")) if info == "console" else ():
            printed = _run(command.line, folder=folder, replacements=replacements)
            if not _matches(command.output, printed):
                differences.append(Difference(command, printed))
    return differences


def difference_text(difference: Difference) -> str:
    """Returns what a command printed and what it should have, for the message of a test."""
    (line, expected, _), printed = difference
    changes = difflib.unified_diff(expected, printed, "the guide", "printed", lineterm="")
    return "\n".join([f"$ {line}", *changes])


def updated(text: str, differences: Sequence[Difference]) -> str:
    """Returns the guide with what was printed in place of what it said; where it said `...`, all of it.

    Args:
        text: The guide.
        differences: What was printed otherwise, in the order of the guide.
    """
    for command, printed in reversed(differences):
        start = command.end - sum(len(line) + 1 for line in command.output)
        text = text[:start] + "".join(f"{line}\n" for line in printed) + text[command.end :]
    return text


def _write(path: pathlib.Path, body: str, *, is_change: bool) -> None:
    """Writes a file, or changes some of its lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if is_change:
        old, text = _side(body, other="+"), path.read_text(encoding="utf-8")
        assert text.count(old) == 1, f"these lines are {text.count(old)} times in {path.name}:\n{old}"
        body = text.replace(old, _side(body, other="-"))
    path.write_text(body, encoding="utf-8")


def _side(body: str, *, other: str) -> str:
    """One side of a change: the lines that are not marked as the other's."""
    return "".join(line[1:] or "\n" for line in body.splitlines(keepends=True) if not line.startswith(other))


def _file_of(info: str) -> str | None:
    match = re.search(r"\bfile=(\S+)", info)
    return match[1] if match else None


def _commands(body: str, *, start: int) -> list[Command]:
    """The commands of a block that begins at `start`."""
    commands: list[Command] = []
    for line in body.splitlines():
        start += len(line) + 1
        if line.startswith("$ "):
            commands.append(Command(line[2:], [], start))
            continue
        command = commands[-1]
        if command.line.endswith("\\") and not command.output:
            commands[-1] = Command(f"{command.line}\n{line}", [], start)
        else:
            commands[-1] = Command(command.line, [*command.output, line], start)
    return commands


def _run(line: str, *, folder: pathlib.Path, replacements: Sequence[tuple[str, str]]) -> list[str]:
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(_OF_THIS_RUN)},
        "PATH": os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "JAX_PLATFORMS": "cpu",
        "COLUMNS": "110",
        "TERM": "dumb",
    }
    result = subprocess.run(
        ["bash", "-c", line],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=300,
        text=True,
        check=False,
    )
    printed = result.stdout
    for pattern, replacement in [(re.escape(str(folder) + os.sep), ""), *replacements]:
        printed = re.sub(pattern, replacement, printed)
    lines = [line.rstrip() for line in printed.splitlines()]
    return lines if result.returncode == 0 else [*lines, f"[status {result.returncode}]"]


def _matches(expected: Sequence[str], printed: Sequence[str]) -> bool:
    """Tells whether lines are as expected, a line `...` standing for any number of them."""
    if not expected:
        return not printed
    if expected[0] == _ANY_LINES:
        return any(_matches(expected[1:], printed[i:]) for i in range(len(printed) + 1))
    return bool(printed) and expected[0] == printed[0] and _matches(expected[1:], printed[1:])
