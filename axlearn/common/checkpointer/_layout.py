"""The names below the folder of checkpoints, and what each of them means.

    step_00000100/                     a checkpoint
    step_00000200.tmp-<attempt>/       one being written, or what is left of an attempt that was killed
    step_00000100.corrupt-<reason>/    one that did not verify; set aside, never deleted
    step_00000100.replaced-<attempt>/  one whose step is just being saved again
    step_00000000.trash-<attempt>/     one being deleted
    step_00000300.uncommitted-<attempt>/  what somebody else began and we had to save under the same name
    .writer                            held by whoever writes here

Everything else belongs to somebody else and is left alone, links too. So do checkpoints in AXLearn's layout: they
are read, and never renamed, replaced or deleted.
"""

import logging
import os
import pathlib
import re
import shutil
import uuid
from typing import Optional, Union

from axlearn.common.file_system import fsync_dir

PathLike = Union[str, os.PathLike[str]]

INDEX_NAME = "index"
MANIFEST_NAME = "MANIFEST.json"
ARRAYS_DIR = "gda"
# Zero is the process; the state of an iterator is global, so one process writes it for all.
DOCUMENTS_DIR = "python_0"
# The metadata of our arrays, and of AXLearn's.
_OUR_ARRAY = "zarr.json"
_THEIR_ARRAY = ".zarray"

_STEP_PATTERN = re.compile(r"step_(\d{8,})")
_TRANSIENT_PATTERN = re.compile(r"(step_\d{8,})\.(tmp|trash|replaced)-[0-9a-f]+")
_CORRUPT_PATTERN = re.compile(r"(step_\d{8,})\.corrupt-[a-z0-9-]+")


def step_dir_name(step: int) -> str:
    """The name of the folder of a step."""
    return f"step_{step:08d}"


def parse_step_from_dir(path: PathLike) -> int:
    """The step that the name of a checkpoint's folder says.

    Raises:
        ValueError: If it is not such a name.
    """
    name = pathlib.Path(path).name
    step = _parse_step(name)
    if step is None:
        raise ValueError(
            f"{path}: {name!r} is not the name of a checkpoint. Expected one like 'step_00000100'."
        )
    return step


def _parse_step(name: str) -> Optional[int]:
    match = _STEP_PATTERN.fullmatch(name)
    # A second spelling of a number would be a second checkpoint of the same step.
    return int(match[1]) if match and name == step_dir_name(int(match[1])) else None


def new_attempt_path(base_dir: pathlib.Path, *, step: int, kind: str) -> pathlib.Path:
    """A name that nobody had before: "tmp", "trash", "replaced" or "uncommitted" of a step."""
    return base_dir / f"{step_dir_name(step)}.{kind}-{uuid.uuid4().hex[:16]}"


def _folders(base_dir: PathLike) -> list[pathlib.Path]:
    """The real folders below `base_dir`, in order; none where it does not exist."""
    try:
        with os.scandir(base_dir) as entries:
            names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []
    return [pathlib.Path(base_dir) / name for name in sorted(names)]


def linked_steps(base_dir: PathLike) -> list[str]:
    """The links below `base_dir` that have names of checkpoints, in order. They are not followed, so they are none."""
    try:
        with os.scandir(base_dir) as entries:
            names = [entry.name for entry in entries if entry.is_symlink()]
    except FileNotFoundError:
        return []
    return sorted(name for name in names if _parse_step(name) is not None)


def checkpoint_paths(base_dir: PathLike) -> list[str]:
    """The folders of checkpoints below `base_dir`, from the oldest to the newest step; unfinished ones are none.

    They were complete when they got their names, or their index. Whether they still are is found out when they
    are read.
    """
    steps = ((_parse_step(path.name), path) for path in _folders(base_dir))
    found = sorted((step, path) for step, path in steps if step is not None)
    return [str(path) for _, path in found if is_committed(path)]


def is_committed(ckpt_dir: pathlib.Path) -> bool:
    """Whether the folder of a step is a checkpoint, maybe a damaged one.

    One of ours always is, because it got its name when it was complete. One of AXLearn's is when it has an
    index, which is written last.
    """
    try:
        names = os.listdir(ckpt_dir)
    except FileNotFoundError:
        # It is deleted at this very moment.
        return False
    return INDEX_NAME in names or (bool(names) and is_ours(ckpt_dir))


def is_ours(ckpt_dir: pathlib.Path) -> bool:
    """Whether we wrote a checkpoint, also where its manifest is lost: then the format of its arrays tells."""
    return os.path.lexists(ckpt_dir / MANIFEST_NAME) or _has_our_arrays(ckpt_dir / ARRAYS_DIR)


def _has_our_arrays(folder: pathlib.Path) -> bool:
    for _, _, names in os.walk(folder):
        if _OUR_ARRAY in names:
            return True
        if _THEIR_ARRAY in names:
            # Nobody mixes them, and there may be very many files.
            return False
    return False


def foreign_checkpoint_exists(ckpt_dir: pathlib.Path) -> bool:
    """Whether there is a checkpoint in a folder that somebody else wrote."""
    is_folder = ckpt_dir.is_dir() and not ckpt_dir.is_symlink()
    return is_folder and is_committed(ckpt_dir) and not is_ours(ckpt_dir)


def checkpoint_steps(base_dir: PathLike) -> list[int]:
    """The steps of which there are checkpoints below `base_dir`, ascending."""
    return [parse_step_from_dir(path) for path in checkpoint_paths(base_dir)]


def latest_checkpoint_path(base_dir: PathLike) -> str:
    """The folder of the newest checkpoint.

    Raises:
        IndexError: If there is none.
    """
    paths = checkpoint_paths(base_dir)
    if not paths:
        raise IndexError(f"{base_dir}: there is no checkpoint. Expected a folder like 'step_00000100'.")
    return paths[-1]


def latest_checkpoint_step(base_dir: PathLike) -> int:
    """The step of the newest checkpoint; `latest_checkpoint_path` says what it raises."""
    return parse_step_from_dir(latest_checkpoint_path(base_dir))


def corrupt_paths(base_dir: PathLike) -> list[pathlib.Path]:
    """What was set aside as corrupt."""
    return [path for path in _folders(base_dir) if _CORRUPT_PATTERN.fullmatch(path.name)]


def set_aside(ckpt_dir: pathlib.Path, *, reason: str) -> pathlib.Path:
    """Renames a checkpoint that cannot be used, so that nobody tries it again and nobody loses it.

    Args:
        ckpt_dir: Its folder.
        reason: Lower-case words joined by dashes.

    Returns:
        Its new name.

    Raises:
        OSError: If it cannot be renamed.
    """
    target = ckpt_dir.with_name(f"{ckpt_dir.name}.corrupt-{reason}")
    num_earlier = 0
    while target.exists():
        num_earlier += 1
        target = ckpt_dir.with_name(f"{ckpt_dir.name}.corrupt-{reason}-{num_earlier + 1}")
    ckpt_dir.rename(target)
    fsync_dir(ckpt_dir.parent)
    return target


def sweep_leftovers(base_dir: pathlib.Path) -> None:
    """Clears away what attempts left behind that were killed. Only for the one who holds the lease.

    A checkpoint that was being replaced when its successor did not come gets its name back.

    Raises:
        OSError: If something cannot be removed.
    """
    for path in _folders(base_dir):
        match = _TRANSIENT_PATTERN.fullmatch(path.name)
        if match is None:
            continue
        final = base_dir / match[1]
        if match[2] == "replaced" and not final.exists():
            logging.info("%s: restored from %s, whose successor was never finished.", final, path.name)
            path.rename(final)
        else:
            logging.info("%s: removing what an earlier attempt left behind.", path)
            shutil.rmtree(path)
    fsync_dir(base_dir)


def check_leaf_path(path: str) -> None:
    """Refuses paths of leaves that cannot be paths of files below a folder.

    Raises:
        ValueError: If `path` is empty, absolute, or goes up, or has characters that file systems do not take.
    """
    parts = path.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\\" in path or any(ord(c) < 32 for c in path):
        raise ValueError(
            f"checkpointer: {path!r} cannot be the path of a leaf in a checkpoint. Expected names joined by "
            "'/', none of them empty, '.' or '..', without backslashes and control characters."
        )
