"""Runs a guide: writes the files that it shows, runs its commands one after another, compares what they print.

In the guide a file is a block ```` ```python file=my_project/recipes.py ````, and commands with their output are
a block ```` ```console ````, in which a line `$ command` is followed by what it prints (both streams) and, where it
is not 0, by the exit status as `[status 2]`. A line `...` of an output stands for any number of lines, for what
differs from run to run.
"""

import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

_BLOCK = re.compile(r"^```(?P<info>[^\n]*)\n(?P<body>.*?)^```$", re.DOTALL | re.MULTILINE)
_ANY_LINES = "..."


class Command(NamedTuple):
    """A command of a guide.

    Attributes:
        line: What is typed.
        output: The lines that stand below it.
    """

    line: str
    output: list[str]


class Difference(NamedTuple):
    """A command that printed something else than the guide says."""

    line: str
    expected: list[str]
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
    for info, body in _blocks(text):
        path = _file_of(info)
        if path is not None:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(body, encoding="utf-8")
        for command in _commands(body) if info == "console" else ():
            printed = _run(command.line, folder=folder, replacements=replacements)
            if not _matches(command.output, printed):
                differences.append(Difference(command.line, expected=command.output, printed=printed))
    return differences


def updated(text: str, differences: Sequence[Difference]) -> str:
    """Returns the guide with what was printed in place of what it said."""
    for command, expected, printed in differences:
        old = "\n".join([f"$ {command}", *expected])
        assert text.count(old + "\n") == 1, f"two commands of the guide are the same: {command}"
        text = text.replace(old + "\n", "\n".join([f"$ {command}", *printed]) + "\n")
    return text


def _blocks(text: str) -> Iterator[tuple[str, str]]:
    for match in _BLOCK.finditer(text):
        yield match["info"].strip(), match["body"]


def _file_of(info: str) -> str | None:
    match = re.search(r"\bfile=(\S+)", info)
    return match[1] if match else None


def _commands(body: str) -> list[Command]:
    commands: list[Command] = []
    for line in body.splitlines():
        if line.startswith("$ "):
            commands.append(Command(line[2:], []))
        elif commands and commands[-1].line.endswith("\\") and not commands[-1].output:
            commands[-1] = Command(f"{commands[-1].line}\n{line}", [])
        else:
            commands[-1].output.append(line)
    return commands


def _run(line: str, *, folder: pathlib.Path, replacements: Sequence[tuple[str, str]]) -> list[str]:
    environment = {
        **{k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PYTEST_CURRENT_TEST")},
        "PATH": os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(folder),
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
