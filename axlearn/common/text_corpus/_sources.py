"""Where corpora come from: Python's own standard library, and any files of text."""

import glob
import os
import pathlib
import sysconfig
from collections.abc import Sequence

from axlearn.common.config import error_message
from axlearn.common.text_corpus._corpus import OnUnreadable, TextCorpus

# Installed packages are not the standard library, tests repeat what they test, the encodings are tables of
# characters, and pydoc_data is one generated file that would fill two thirds of whichever split it fell into.
_SKIPPED_STDLIB_FOLDERS = frozenset(
    {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idlelib", "encodings", "pydoc_data"}
)


def python_standard_library(*, heldout_percent: float = 5) -> TextCorpus:
    """Returns the sources of the running Python's standard library: text that every machine has.

    About 550 files and 9 MB, without tests, IDLE, character tables and installed packages. It differs
    between versions of Python.

    Args:
        heldout_percent: Share of the files, chosen by name, that is held out, in percent.

    Raises:
        ValueError: If this Python came without its sources.
    """
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    files = _files_below(root, suffixes=(".py",), skipped_folders=_SKIPPED_STDLIB_FOLDERS)
    if not files:
        raise ValueError(
            error_message(
                where=str(root),
                what="this Python came without the sources of its standard library",
                expected="files named *.py",
                advice="Use another Python, or set the recipe's corpus to text_files of your own.",
            )
        )
    return TextCorpus(name="python_standard_library", files=files, heldout_percent=heldout_percent)


def text_files(
    path: str,
    *,
    heldout_percent: float = 5,
    suffixes: Sequence[str] = (".txt", ".md", ".py"),
    on_unreadable: OnUnreadable = "skip",
) -> TextCorpus:
    """Returns the files of text at a path.

    Args:
        path: A file, a folder (all files below it whose names end in one of `suffixes`) or a glob pattern, in
            which `**` stands for any number of folders. `~` is the home folder.
        heldout_percent: Share of the files, chosen by their name below the folder, that is held out, in
            percent.
        suffixes: Endings of the names of the files to read, where `path` is a folder.
        on_unreadable: "skip" leaves out files that are not UTF-8 with a warning; "error" refuses the corpus.

    Raises:
        ValueError: If nothing is there.
    """
    expanded = os.path.expanduser(path)
    root = pathlib.Path(expanded)
    if root.is_file():
        files = {root.name: root}
    elif root.is_dir():
        files = _files_below(root, suffixes=tuple(suffixes), skipped_folders=frozenset())
    else:
        found = [pathlib.Path(match) for match in glob.glob(expanded, recursive=True)]
        files = _named_below_common_folder([match for match in found if match.is_file()])
    if not files:
        raise ValueError(
            error_message(
                where=path,
                what="no files of text here" if root.exists() else "no such file, folder or pattern of files",
                expected=f"a file, a folder with files ending in {', '.join(suffixes)}, or a glob pattern",
                advice=f"Relative paths start at {os.getcwd()}.",
            )
        )
    return TextCorpus(name=path, files=files, heldout_percent=heldout_percent, on_unreadable=on_unreadable)


def _files_below(
    root: pathlib.Path, *, suffixes: tuple[str, ...], skipped_folders: frozenset[str]
) -> dict[str, pathlib.Path]:
    """Returns the files below a folder by their path relative to it."""
    files = {}
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in skipped_folders]
        for name in names:
            path = pathlib.Path(folder, name)
            if name.endswith(suffixes) and path.is_file():
                files[path.relative_to(root).as_posix()] = path
    return files


def _named_below_common_folder(paths: list[pathlib.Path]) -> dict[str, pathlib.Path]:
    """Names files by their path relative to the deepest folder that holds all of them."""
    if not paths:
        return {}
    common = os.path.commonpath([path.parent.absolute() for path in paths])
    return {path.absolute().relative_to(common).as_posix(): path for path in paths}
