"""Reading the arrays of a checkpoint one at a time, or in parts, without devices."""

import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, Optional

import numpy as np

from axlearn.common.checkpointer._index import ArrayEntry
from axlearn.common.checkpointer._layout import PathLike, parse_step_from_dir
from axlearn.common.checkpointer._open import open_stored
from axlearn.common.checkpointer._select import no_checkpoint, read_newest, read_step
from axlearn.common.checkpointer._snapshot import chunk_shape_for
from axlearn.common.checkpointer._stored import StoredCheckpoint, tiles
from axlearn.common.config import error_message, similar_names

# Where a part of an array is, and its values.
Part = tuple[tuple[slice, ...], np.ndarray]


class CheckpointReader:
    """The arrays of one checkpoint, in our layout or AXLearn's. Nothing is locked, renamed or held in memory.

    Attributes:
        path: The folder of the checkpoint.
        step: Its step.
        arrays: Shape and dtype of each array, by path.
        documents: The types of the leaves that are not arrays, by path.
        writer: Whose layout it is: "ours" or "AXLearn's".
    """

    def __init__(self, stored: StoredCheckpoint):
        """Use `open_checkpoint`.

        Args:
            stored: The checkpoint.
        """
        self._stored = stored
        # The arrays whose files were verified, as far as their layout allows it.
        self._checked: set[str] = set()
        self.path = stored.ckpt_dir
        self.step = stored.step
        self.arrays: Mapping[str, ArrayEntry] = stored.index.arrays
        self.documents: Mapping[str, str] = {**stored.index.documents, **stored.unreadable_documents}
        self.writer = stored.writer

    def read(self, path: str, index: Optional[tuple[slice, ...]] = None) -> np.ndarray:
        """Reads an array or a part of it; the files of the array are verified when it is first asked for.

        Args:
            path: The path of the array.
            index: One slice for each of the first dimensions, without steps. None: all of the array.

        Returns:
            The values, in memory of their own.

        Raises:
            CorruptCheckpointError: If the array is not what was written.
            ValueError: If there is no such array or no such part.
        """
        entry = self._entry(path)
        index = _whole_index(index or (), shape=entry.shape, where=f"{self.path}: {path}")
        self._check(path)
        return self._stored.open_array(path).read(index)

    def part_shape(self, path: str) -> tuple[int, ...]:
        """The shape of parts that tile an array and are cheap to read.

        Args:
            path: The path of the array.

        Returns:
            A shape that divides that of the array; at least 1 everywhere.

        Raises:
            CorruptCheckpointError: If the array is not what was written.
            ValueError: If there is no such array.
        """
        entry = self._entry(path)
        self._check(path)
        chunk_shape = self._stored.chunk_shape(path)
        if any(n % c for n, c in zip(entry.shape, chunk_shape, strict=True)):
            return chunk_shape_for(entry.shape, itemsize=entry.dtype.itemsize)
        return chunk_shape

    def parts(self, path: str) -> Iterator[Part]:
        """Reads an array part by part, as `CheckpointWriter.add_array` takes it; memory holds one part.

        Args:
            path: The path of the array.

        Yields:
            Where each part is, and its values.

        Raises:
            CorruptCheckpointError: If the array is not what was written.
            ValueError: If there is no such array.
        """
        part_shape = self.part_shape(path)
        array = self._stored.open_array(path)
        for index in tiles(self._entry(path).shape, part_shape):
            yield index, array.read(index)

    def verify(self) -> None:
        """Reads everything; see `verify_checkpoint`.

        Raises:
            CorruptCheckpointError: For the first file that is not what was written.
        """
        self._stored.verify()

    def _check(self, path: str) -> None:
        if path not in self._checked:
            self._stored.check(paths=[path])
            self._checked.add(path)

    def _entry(self, path: str) -> ArrayEntry:
        if path not in self.arrays:
            nearest = similar_names(path, self.arrays)
            raise ValueError(
                error_message(
                    where=str(self.path),
                    what=f"There is no array {path}",
                    nearest=nearest[0] if nearest else None,
                )
            )
        return self.arrays[path]


def _whole_index(index: tuple[slice, ...], *, shape: tuple[int, ...], where: str) -> tuple[slice, ...]:
    """One slice with a begin and an end for each dimension."""
    if len(index) > len(shape) or any(
        not isinstance(part, slice) or part.step not in (None, 1) for part in index
    ):
        raise ValueError(
            error_message(
                where=where,
                what=f"{index} is no part of an array of shape {shape}",
                expected="at most one slice per dimension, without steps",
            )
        )
    index = (*index, *[slice(None)] * (len(shape) - len(index)))
    bounds = (part.indices(n)[:2] for part, n in zip(index, shape, strict=True))
    return tuple(slice(start, max(start, stop)) for start, stop in bounds)


def open_checkpoint(path: PathLike, *, step: Optional[int] = None) -> CheckpointReader:
    """Opens a checkpoint to read single arrays, next to a run that may be writing.

    Args:
        path: The folder of all checkpoints of a run, or that of one checkpoint.
        step: The step. None: the newest whose index can be read, or that of `path` where it is one checkpoint.

    Returns:
        The reader. Arrays are verified when they are read.

    Raises:
        ValueError: If there is no such checkpoint.
        CorruptCheckpointError: If the one that was asked for is not what was written.
        NoUsableCheckpointError: If there are checkpoints, and none can be used.
    """
    base_dir = pathlib.Path(os.path.abspath(path))
    if step is None and base_dir.name.startswith("step_"):
        step, base_dir = parse_step_from_dir(base_dir), base_dir.parent
    if step is not None:
        opened: Any = read_step(base_dir, step=step, read=open_stored)
    else:
        opened = read_newest(base_dir, state=None, read=open_stored, is_owner=False).state
    if opened is None:
        raise no_checkpoint(base_dir)
    return CheckpointReader(opened)
