"""The directory of a run: its default place, and whether it can be written; loads nothing heavy."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from axlearn.common.config import ConfigBase, ConfigJsonError, config_from_json, error_message

# The file of a run directory that has the config of the run's trainer.
CONFIG_FILE = "trainer_config.json"


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


def read_run_config(run_dir: str, *, import_prefixes: Sequence[str] = ("axlearn.",)) -> Any:
    """Returns the trainer config that stands in a run directory; its paths are those of where that is now.

    Args:
        run_dir: The run directory.
        import_prefixes: As for `config_from_json`.

    Raises:
        FileNotFoundError: If there is none.
        ConfigJsonError: If it cannot be read.
    """
    path = os.path.join(run_dir, CONFIG_FILE)
    with open(path, encoding="utf-8") as f:
        text = f.read()
    try:
        cfg = config_from_json(text, import_prefixes=import_prefixes)
    except ConfigJsonError as e:
        raise ConfigJsonError(f"{path}: {e}") from e
    set_run_dir(cfg, run_dir)
    return cfg


def set_run_dir(cfg: ConfigBase, run_dir: str) -> None:
    """Makes a directory that of a run's config, and moves the paths along that lie in the one before.

    Args:
        cfg: The config of the trainer of a run, such as one whose directory has been moved or copied.
        run_dir: Where it is now.
    """
    trainer: Any = cfg
    before = trainer.dir
    trainer.dir = run_dir
    # An empty one would be the beginning of every path.
    if not isinstance(before, str) or before in ("", run_dir):
        return
    for owner in _configs(cfg):
        for name, value in owner.items():
            if isinstance(value, str) and value.startswith(os.path.join(before, "")):
                setattr(owner, name, os.path.join(run_dir, os.path.relpath(value, before)))


def _configs(value: Any) -> Iterator[ConfigBase]:
    """Yields a config and those below it."""
    children: list[Any] = []
    if isinstance(value, ConfigBase):
        yield value
        children = [child for _, child in value.items()]
    elif isinstance(value, dict):
        children = list(value.values())
    elif isinstance(value, (list, tuple)):
        children = list(value)
    for child in children:
        yield from _configs(child)


def _message(path: str, what: str) -> str:
    return error_message(
        where=f"run directory {path}",
        what=what,
        expected="a directory that can be made or written to",
        advice="Name another one with --trainer_dir.",
    )
