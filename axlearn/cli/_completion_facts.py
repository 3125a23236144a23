"""What completion needs to know of recipes, kept between two presses of TAB.

Making the configs takes jax, which takes most of a second; reading a file does not. It counts for as long as none of
the Python files changes that the answers came from.
"""

import contextlib
import hashlib
import importlib
import importlib.util
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any, Optional

import axlearn
from axlearn.common.file_system import cache_dir, write_text_durably

_FOLDER = "completion"
# Of more modules than these the oldest are forgotten.
_MAX_FILES = 32


class Facts:
    """What is known of the recipes of a module."""

    def __init__(self, module: Optional[str]):
        """Reads what is known, if it still holds.

        Args:
            module: The module; None: those that come with this package.
        """
        self._module = module
        self._path = _file_of(module)
        self._fingerprint = _fingerprint(module)
        self._content: dict[str, Any] = {"fingerprint": self._fingerprint, "machines": None, "paths": {}}
        with contextlib.suppress(OSError, ValueError):
            content = json.loads(self._path.read_text(encoding="utf-8"))
            if content["fingerprint"] == self._fingerprint:
                self._content = content

    @property
    def names(self) -> list[str]:
        """The names of the recipes, and their aliases."""
        return list(self._machines())

    def machines(self, name: str) -> list[str]:
        """The usual machines for which a recipe has a mesh rule; of no recipe in particular: of any."""
        known = self._machines()
        if name in known:
            return list(known[name])
        return sorted({machine for machines in known.values() for machine in machines})

    def paths(self, name: str) -> list[str]:
        """The paths of a recipe's config; none where there is no such recipe."""
        paths: dict[str, list[str]] = self._content["paths"]
        if name not in paths:
            if name not in self._machines():
                return []
            paths[name] = _library().paths_of(name, module=self._module)
            self._write()
        return paths[name]

    def _machines(self) -> dict[str, list[str]]:
        if self._content["machines"] is None:
            self._content["machines"] = _library().machines_by_name(module=self._module)
            self._write()
        machines: dict[str, list[str]] = self._content["machines"]
        return machines

    def _write(self) -> None:
        # Without the file the next press of TAB takes longer, and that is all.
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(mode=0o700, exist_ok=True)
            write_text_durably(self._path, json.dumps(self._content))
            files = sorted(self._path.parent.glob("*.json"), key=lambda path: path.stat().st_mtime)
            for path in files[:-_MAX_FILES]:
                path.unlink(missing_ok=True)


def facts_of(module: Optional[str]) -> Facts:
    """Returns what is known of the recipes of a module; None: of those that come with this package."""
    return Facts(module)


def _library() -> Any:
    """Returns what makes configs, which loads jax."""
    return importlib.import_module("axlearn.cli._completion_recipes")


def _file_of(module: Optional[str]) -> pathlib.Path:
    # A module is looked up from the working directory, too.
    key = f"{axlearn.__file__}\n{module or ''}\n{os.getcwd() if module else ''}"
    return cache_dir() / _FOLDER / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def _fingerprint(module: Optional[str]) -> str:
    """Changes whenever a Python file of the package, or of the module's own, does."""
    package = os.path.dirname(os.path.abspath(axlearn.__file__))
    roots = [package, os.path.join(package, "experiments")]
    if module is not None:
        roots += _roots_of(module.split(".")[0])
    digest = hashlib.sha256(repr(roots).encode())
    for root in roots:
        for path, changed in _python_files(root):
            digest.update(f"{path}\n{changed}\n".encode())
    return digest.hexdigest()


def _roots_of(name: str) -> list[str]:
    """The folders or the file of a top-level module, which may lie in the working directory as after `python -m`."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        here = os.path.abspath(name)
        return [path for path in (here, f"{here}.py") if os.path.exists(path)]
    if spec.submodule_search_locations:
        return [os.path.abspath(folder) for folder in spec.submodule_search_locations]
    return [spec.origin] if spec.origin else []


def _python_files(root: str) -> Iterator[tuple[str, int]]:
    """Yields the Python files below a folder with the time of their last change, in the order of their paths."""
    if os.path.isfile(root):
        yield root, os.stat(root).st_mtime_ns
        return
    for folder, subfolders, files in os.walk(root):
        subfolders.sort()
        for name in sorted(files):
            if name.endswith(".py"):
                path = os.path.join(folder, name)
                yield path, os.stat(path).st_mtime_ns
