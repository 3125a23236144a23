"""Where in somebody's code a field was set."""

import os
import sys
from types import FrameType
from typing import NamedTuple, Optional

_PACKAGE = __name__.rpartition(".")[0]


class SourceLocation(NamedTuple):
    """A line of a file.

    Attributes:
        file: The file's name as Python knows it, or, for what no file says, a description such as an
            override's text.
        line: The line, counted from 1; 0 where there are no lines.
    """

    file: str
    line: int

    def __str__(self) -> str:
        if self.line == 0:
            return self.file
        here = os.path.join(os.getcwd(), "")
        return f"{self.file.removeprefix(here)}:{self.line}"


def caller_location() -> Optional[SourceLocation]:
    """Returns the innermost line on the stack that is not in this package, or None where there is none."""
    frame: Optional[FrameType] = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module != _PACKAGE and not module.startswith(_PACKAGE + "."):
            return SourceLocation(frame.f_code.co_filename, frame.f_lineno)
        frame = frame.f_back
    return None
