"""Where in somebody's code a field was set."""

import contextlib
import contextvars
import os
import sys
from collections.abc import Iterator
from types import FrameType
from typing import NamedTuple, Optional

_PACKAGE = __name__.rpartition(".")[0]

# Who sets fields at the moment, from the outermost on; empty where it is whoever calls.
_SETTERS: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("setters", default=())
# The frame up to which locations are to know their callers; None: they are not to.
_RECORDS_UP_TO: contextvars.ContextVar[Optional[FrameType]] = contextvars.ContextVar(
    "records_up_to", default=None
)
# The file of the frames of an import: whatever imports a module has not called it.
_IMPORT_FILES = ("<frozen importlib._bootstrap>", "<frozen importlib._bootstrap_external>")


class SourceLocation(NamedTuple):
    """A line of a file.

    Attributes:
        file: The file's name as Python knows it, or, for what no file says, a description such as an
            override's text.
        line: The line, counted from 1; 0 where there are no lines.
    """

    file: str
    line: int

    @property
    def callers(self) -> tuple["SourceLocation", ...]:
        """The lines that led there, the innermost first; empty outside of `recording_callers`."""
        return ()

    def __str__(self) -> str:
        if self.line == 0:
            return self.file
        here = os.path.join(os.getcwd(), "")
        return f"{self.file.removeprefix(here)}:{self.line}"


class _CalledLocation(SourceLocation):
    """A line that knows its callers. They are no item of the tuple: (file, line) is what others compare and unpack."""

    _callers: tuple[SourceLocation, ...]

    @property
    def callers(self) -> tuple[SourceLocation, ...]:
        return self._callers


@contextlib.contextmanager
def set_by(description: str) -> Iterator[None]:
    """A context in which `where_set` will say of the fields that are set that this has set them.

    Args:
        description: What sets them, where no line of a file says it: "mesh_rules[3] ('tpu-v5p-.*')". Contexts in
            each other add up.
    """
    token = _SETTERS.set((*_SETTERS.get(), description))
    try:
        yield
    finally:
        _SETTERS.reset(token)


class recording_callers:
    """A context in which `where_set` will also say by which lines, from here on, the one was reached that sets a field.

    A line in a library function says little without the line of the recipe that calls it. It is off by default
    because every field of every config would carry its stack.
    """

    def __enter__(self) -> None:
        self._token = _RECORDS_UP_TO.set(sys._getframe(1))

    def __exit__(self, *exception: object) -> None:
        _RECORDS_UP_TO.reset(self._token)


def caller_location() -> Optional[SourceLocation]:
    """Returns the innermost line on the stack that is not in this package, or None where there is none.

    Inside of `set_by` it is what that says.
    """
    setters = _SETTERS.get()
    if setters:
        return SourceLocation(", ".join(setters), 0)
    frame: Optional[FrameType] = sys._getframe(1)
    while frame is not None:
        if not _is_of_this_package(frame):
            end = _RECORDS_UP_TO.get()
            if end is None:
                return SourceLocation(frame.f_code.co_filename, frame.f_lineno)
            location = _CalledLocation(frame.f_code.co_filename, frame.f_lineno)
            location._callers = _callers(frame, end)
            return location
        frame = frame.f_back
    return None


def _is_of_this_package(frame: FrameType) -> bool:
    module = frame.f_globals.get("__name__", "")
    return bool(module == _PACKAGE or module.startswith(_PACKAGE + "."))


def _callers(frame: FrameType, end: FrameType) -> tuple[SourceLocation, ...]:
    """The lines outside of this package from which a frame was called, up to another frame or an import that ran it."""
    found: list[SourceLocation] = []
    if frame is end:
        return ()
    caller = frame.f_back
    while caller is not None and caller is not end and caller.f_code.co_filename not in _IMPORT_FILES:
        if not _is_of_this_package(caller):
            found.append(SourceLocation(caller.f_code.co_filename, caller.f_lineno))
        caller = caller.f_back
    return tuple(found)
