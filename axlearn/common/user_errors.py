"""What a command prints of an error: a message where the user can act on it, else the whole traceback."""

import dis
import os
import sysconfig
import traceback

from axlearn.common.config import UnknownConfigNameError, UnknownFieldError

TRACEBACK_VARIABLE = "AXLEARN_TRACEBACK"
# What reads files and imports modules fails for reasons outside of the program, wherever it is raised.
_OUTSIDE_ERRORS = (OSError, ImportError)
# The types that our own code raises for users; the same types are also what slips in it raise.
_USER_ERRORS = (ValueError, TypeError, RuntimeError, UnknownFieldError, UnknownConfigNameError)

# The instruction of a `raise` statement.
_RAISE = dis.opmap["RAISE_VARARGS"]


def is_for_users(e: BaseException) -> bool:
    """Returns whether an error is about what the user gave us, and not a slip of ours or of a library.

    An error is for users if the world outside is at fault (a file, an import), or if a `raise` statement in
    our code or the user's made it: `len(None)` is a TypeError as well, but nobody wrote its message for users.
    """
    if isinstance(e, _OUTSIDE_ERRORS):
        return True
    is_of_type = isinstance(e, _USER_ERRORS) and not isinstance(e, NotImplementedError)
    return is_of_type and _is_raised_on_purpose(e)


def error_text(e: BaseException, *, with_traceback: bool = False) -> str:
    """Returns what a command prints of an error, without a final newline.

    Args:
        e: The error.
        with_traceback: Whether to show where it was raised in any case; so does AXLEARN_TRACEBACK=1.
    """
    is_wanted = with_traceback or os.environ.get(TRACEBACK_VARIABLE, "") not in ("", "0")
    if is_wanted or not is_for_users(e):
        return "".join(traceback.format_exception(e)).rstrip("\n")
    lines = [str(e) or type(e).__name__, *getattr(e, "__notes__", ())]
    if not _is_raised_on_purpose(e):
        # Its message is the system's, so it may not say what we were about to do.
        if isinstance(e, ImportError):
            lines[0] = f"{type(e).__name__}: {lines[0]}{_where_imported(e)}"
        lines.append(f"({TRACEBACK_VARIABLE}=1 shows where this was raised.)")
    return "\n".join(lines)


def _is_raised_on_purpose(e: BaseException) -> bool:
    """Returns whether a `raise` statement outside of the libraries made this error."""
    tb = e.__traceback__
    if tb is None:
        return False
    while tb.tb_next is not None:
        tb = tb.tb_next
    # The bytecode rather than the line of the source, which may have been edited since it was loaded.
    code = tb.tb_frame.f_code
    return not _is_of_a_library(code.co_filename) and code.co_code[tb.tb_lasti] == _RAISE


def _is_of_a_library(filename: str) -> bool:
    return "site-packages" in filename or filename.startswith((sysconfig.get_path("stdlib"), "<frozen"))


def _where_imported(e: ImportError) -> str:
    frames = [f for f in traceback.extract_tb(e.__traceback__) if not f.filename.startswith("<frozen")]
    frames = [f for f in frames if f"{os.sep}importlib{os.sep}" not in f.filename]
    # The registry imports on the user's behalf: that is no place to look at.
    if not frames or os.path.basename(frames[-1].filename) == "registry.py":
        return ""
    return f" (imported at {frames[-1].filename}:{frames[-1].lineno})"
