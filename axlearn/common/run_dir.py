"""The directory of a run: its default place, and whether it can be written; loads nothing heavy."""

import os
import tempfile

from axlearn.common.config import error_message


def default_run_dir(config_name: str) -> str:
    """Returns the run directory of a config where none is given: `runs/<config>`."""
    return os.path.join("runs", config_name)


def check_run_dir(path: str) -> None:
    """Checks that a directory can be made or written to; leaves nothing behind.

    Args:
        path: The run directory.

    Raises:
        OSError: If it cannot.
    """
    # What exists of the path decides: the directory itself, or the nearest one in which to make the others.
    existing = os.path.abspath(path)
    while not os.path.lexists(existing):
        existing = os.path.dirname(existing)
    if not os.path.isdir(existing):
        raise NotADirectoryError(_message(path, f"{existing} is a file"))
    # Tried rather than asked: permissions do not tell of full, read-only or virtual file systems.
    try:
        with tempfile.TemporaryDirectory(dir=existing, prefix=".axlearn-"):
            pass
    except OSError as e:
        raise type(e)(_message(path, f"{existing}: {e.strerror or e}")) from e


def make_run_dir(path: str) -> None:
    """Makes a run directory.

    Args:
        path: The run directory.

    Raises:
        OSError: If it cannot be made or written to.
    """
    check_run_dir(path)
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as e:
        raise type(e)(_message(path, e.strerror or str(e))) from e


def _message(path: str, what: str) -> str:
    return error_message(
        where=f"run directory {path}",
        what=what,
        expected="a directory that can be made or written to",
        advice="Name another one with --trainer_dir.",
    )
