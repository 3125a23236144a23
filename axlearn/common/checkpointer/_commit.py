"""The end of a save: the folder of an attempt is verified and gets the name of a checkpoint, or is removed."""

import logging
import os
import pathlib
from collections.abc import Mapping
from types import MappingProxyType

from axlearn.common.checkpointer._file_ops import FileEntry, FileOps, StepFolder
from axlearn.common.checkpointer._layout import (
    INDEX_NAME,
    MANIFEST_NAME,
    foreign_checkpoint_exists,
    is_committed,
    new_attempt_path,
)
from axlearn.common.checkpointer._manifest import (
    Manifest,
    check_sizes,
    encode_manifest,
    read_manifest,
    verify_files,
)
from axlearn.common.config import error_message


def check_not_foreign(final_dir: pathlib.Path) -> None:
    """Refuses to write a step of which there is a checkpoint that somebody else wrote.

    Raises:
        FileExistsError: If there is one.
    """
    if foreign_checkpoint_exists(final_dir):
        raise FileExistsError(
            error_message(
                where=str(final_dir),
                what="This step has a checkpoint in AXLearn's layout already, which we do not replace",
                advice="Move it away, or save in another folder",
            )
        )


def commit(
    folder: StepFolder,
    final_dir: pathlib.Path,
    *,
    step: int,
    index: str,
    files: FileOps,
    others: Mapping[str, FileEntry] = MappingProxyType({}),
) -> Manifest:
    """Finishes a folder that holds all else, verifies it, and gives it its name.

    Args:
        folder: The folder.
        final_dir: Its name to be.
        step: The step.
        index: The text of `index`.
        files: What changes the file system.
        others: What other processes wrote to the folder, made durable and verified.

    Returns:
        What was written.

    Raises:
        OSError: If something could not be written.
        CorruptCheckpointError: If what was written does not read back.
    """
    folder.write(INDEX_NAME, index.encode("utf-8"))
    own = dict(folder.entries)
    manifest = Manifest(step=step, files={**own, **others})
    folder.write(MANIFEST_NAME, encode_manifest(manifest))
    folder.sync()
    written = read_manifest(folder.path, step=step)
    verify_files(folder.path, written, names=own)
    # Whether what the others wrote can be seen from here.
    check_sizes(folder.path, written, names=others)
    _give_name(folder.path, final_dir, step=step, files=files)
    return manifest


def _give_name(tmp_dir: pathlib.Path, final_dir: pathlib.Path, *, step: int, files: FileOps) -> None:
    """Renames a finished folder; what has its name already keeps existing until that is durable."""
    base_dir = final_dir.parent
    replaced = None
    if os.path.lexists(final_dir):
        kind = "uncommitted" if _is_unfinished(final_dir) else "replaced"
        replaced = new_attempt_path(base_dir, step=step, kind=kind)
        files.rename(final_dir, replaced)
    try:
        files.rename(tmp_dir, final_dir)
    except OSError:
        if replaced is not None:
            files.rename(replaced, final_dir)
        raise
    files.sync_dir(base_dir)
    if replaced is None:
        return
    if replaced.is_symlink() or not replaced.is_dir():
        logging.warning(
            "%s is no checkpoint and had the name of one; it is called %s now.", final_dir, replaced.name
        )
        return
    if replaced.name.startswith(f"{final_dir.name}.uncommitted-"):
        logging.warning(
            "%s was begun and not finished by somebody else; it is called %s now.", final_dir, replaced.name
        )
        return
    try:
        files.remove_tree(replaced)
    except OSError as e:
        logging.warning(
            "%s was replaced and could not be removed; the next start tries again: %s", replaced, e
        )


def _is_unfinished(final_dir: pathlib.Path) -> bool:
    """Whether a folder holds what somebody else began to write, and did not finish."""
    is_folder = final_dir.is_dir() and not final_dir.is_symlink()
    return is_folder and bool(os.listdir(final_dir)) and not is_committed(final_dir)


def remove_attempt(tmp_dir: pathlib.Path, *, files: FileOps) -> None:
    """Removes what there is of an attempt that failed; what cannot be removed is logged."""
    try:
        if tmp_dir.exists():
            files.remove_tree(tmp_dir)
    except OSError as e:
        logging.warning(
            "%s was not finished and could not be removed; the next start tries again: %s", tmp_dir, e
        )
