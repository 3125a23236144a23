"""Turning a checkpoint of either layout into one of the other, array by array."""

import os
import pathlib
from typing import NamedTuple, Optional

from axlearn.common.checkpointer import _zarr2
from axlearn.common.checkpointer._commit import remove_attempt
from axlearn.common.checkpointer._file_ops import FileOps, StepFolder
from axlearn.common.checkpointer._index import index_entry
from axlearn.common.checkpointer._layout import (
    ARRAYS_DIR,
    INDEX_NAME,
    PathLike,
    new_attempt_path,
    step_dir_name,
)
from axlearn.common.checkpointer._manifest import Manifest, verify_files
from axlearn.common.checkpointer._reader import CheckpointReader
from axlearn.common.checkpointer._save import index_as_json
from axlearn.common.checkpointer._writer import CheckpointWriter, check_is_free


class Exported(NamedTuple):
    """What an export wrote.

    Attributes:
        path: The folder of the new checkpoint.
        num_arrays: How many arrays there are in it.
        num_bytes: The size of its files.
        left_out: The leaves that are not arrays, which have no place in the other layout, with their types.
    """

    path: pathlib.Path
    num_arrays: int
    num_bytes: int
    left_out: dict[str, str]


def export_axlearn(
    reader: CheckpointReader, *, output_dir: PathLike, files: Optional[FileOps] = None
) -> Exported:
    """Writes a checkpoint in AXLearn's layout: `step_%08d/index` and one zarr 2 array for each leaf.

    The chunks are those in which the arrays are stored now; memory holds one of them. The folder gets its name
    when everything in it is durable and reads back.

    Args:
        reader: What to export.
        output_dir: Where the folder of the step goes; made where it does not exist.
        files: What changes the file system. None: what always does.

    Returns:
        What was written.

    Raises:
        FileExistsError: If there is something of this step already.
        OSError: If it cannot be written; nothing is left of it.
        CorruptCheckpointError: If the checkpoint is not what was written.
    """
    files = FileOps() if files is None else files
    base_dir = pathlib.Path(os.path.abspath(output_dir))
    final_dir = base_dir / step_dir_name(reader.step)
    check_is_free(final_dir)
    base_dir.mkdir(parents=True, exist_ok=True)
    tmp_dir = new_attempt_path(base_dir, step=reader.step, kind="tmp")
    try:
        folder = StepFolder(tmp_dir, files=files)
        _write(reader, folder)
        folder.sync()
        verify_files(tmp_dir, Manifest(step=reader.step, files=folder.entries), names=folder.entries)
        # If somebody was faster, this fails: a folder that is not empty is not replaced.
        files.rename(tmp_dir, final_dir)
        files.sync_dir(base_dir)
    except BaseException:
        remove_attempt(tmp_dir, files=files)
        raise
    return Exported(
        path=final_dir,
        num_arrays=len(reader.arrays),
        num_bytes=sum(entry.size for entry in folder.entries.values()),
        left_out=dict(reader.documents),
    )


def _write(reader: CheckpointReader, folder: StepFolder) -> None:
    for path, entry in sorted(reader.arrays.items()):
        encoded = _zarr2.encode_array(entry, chunk_shape=reader.part_shape(path), parts=reader.parts(path))
        for name, data in encoded:
            folder.write(f"{ARRAYS_DIR}/{path}/{name}", data)
    leaves = [[path, index_entry(*entry)] for path, entry in sorted(reader.arrays.items())]
    # Last, because it is what makes a folder a checkpoint for AXLearn.
    folder.write(INDEX_NAME, index_as_json([["step", reader.step], *leaves]).encode("utf-8"))


def export_native(
    reader: CheckpointReader, *, output_dir: PathLike, files: Optional[FileOps] = None
) -> Exported:
    """Writes the arrays of a checkpoint in our layout; see `CheckpointWriter`.

    Args:
        reader: What to export.
        output_dir: Where the folder of the step goes; made where it does not exist.
        files: What changes the file system. None: what always does.

    Returns:
        What was written.

    Raises:
        DirectoryInUseError: If somebody writes to the same folder.
        FileExistsError: If there is something of this step already.
        OSError: If it cannot be written; nothing is left of it.
        CorruptCheckpointError: If the checkpoint is not what was written.
    """
    base_dir = pathlib.Path(os.path.abspath(output_dir))
    with CheckpointWriter(base_dir, step=reader.step, files=files) as writer:
        for path, entry in sorted(reader.arrays.items()):
            writer.add_array(path, shape=entry.shape, dtype=entry.dtype, parts=reader.parts(path))
    ckpt_dir = base_dir / step_dir_name(reader.step)
    num_bytes = sum(file.stat().st_size for file in ckpt_dir.rglob("*") if file.is_file())
    return Exported(
        path=ckpt_dir, num_arrays=len(reader.arrays), num_bytes=num_bytes, left_out=dict(reader.documents)
    )
