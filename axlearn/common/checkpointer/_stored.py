"""What every layout of a checkpoint on disk offers to those who read it, whoever wrote it."""

import abc
import dataclasses
import itertools
import pathlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Optional, TypeVar

from axlearn.common.checkpointer._errors import CorruptCheckpointError
from axlearn.common.checkpointer._index import CheckpointIndex, parse_index
from axlearn.common.checkpointer._layout import INDEX_NAME, check_leaf_path, parse_step_from_dir
from axlearn.common.checkpointer._tensorstore import ArrayReader

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Share:
    """One of equal parts of the files of a checkpoint, which are dealt out in turn.

    Attributes:
        index: Which part.
        count: How many there are.
    """

    index: int
    count: int

    def of(self, items: Iterable[T]) -> Iterator[T]:
        """The items of this part."""
        return itertools.islice(items, self.index, None, self.count)


WHOLE = Share(index=0, count=1)


class StoredCheckpoint(abc.ABC):
    """A checkpoint whose index was read. Its arrays are believed after `check`.

    Attributes:
        writer: Whose layout it is, for messages.
        ckpt_dir: The folder.
        step: The step.
        index: The arrays, and the documents that can be read here.
        unreadable_documents: The types of documents that only their writer can read, by path.
    """

    writer: str

    def __init__(self, ckpt_dir: pathlib.Path):
        self.ckpt_dir = ckpt_dir
        self.step = parse_step_from_dir(ckpt_dir)
        self.index = self._read_index()
        self.unreadable_documents: Mapping[str, str] = {}

    def _read_index(self) -> CheckpointIndex:
        data = self._read_index_file()
        try:
            index = parse_index(data)
            if index.step != self.step:
                raise ValueError(f"is the index of step {index.step}.")
            for path in index.arrays:
                check_leaf_path(path)
        except ValueError as e:
            raise CorruptCheckpointError(
                ckpt_dir=self.ckpt_dir, file=INDEX_NAME, reason="bad-index", detail=str(e)
            ) from e
        return index

    @abc.abstractmethod
    def _read_index_file(self) -> bytes:
        """The contents of `index`, as far as they can be verified."""

    @abc.abstractmethod
    def identity(self) -> str:
        """A hash of what the checkpoint says it consists of, to compare with what another process sees."""

    @abc.abstractmethod
    def check(self, *, paths: Optional[Collection[str]] = None, share: Share = WHOLE) -> None:
        """Checks everything that can be checked before a value is decoded.

        Args:
            paths: The arrays that will be read. None: all of them, and every other file.
            share: Which of the files to read, where several processes check one checkpoint.

        Raises:
            CorruptCheckpointError: For the first file that is not what was written.
        """

    @abc.abstractmethod
    def verify(self) -> None:
        """Reads everything, and raises for the first file that is not what was written.

        Raises:
            CorruptCheckpointError: For this file.
        """

    @abc.abstractmethod
    def open_array(self, path: str) -> ArrayReader:
        """Opens an array that was checked."""

    @abc.abstractmethod
    def chunk_shape(self, path: str) -> tuple[int, ...]:
        """The shape of the pieces in which an array that was checked is stored; at least 1 everywhere."""

    @abc.abstractmethod
    def read_document(self, path: str) -> Any:
        """Reads one of the documents of the index.

        Raises:
            CorruptCheckpointError: If it is not what was written.
        """


def tiles(shape: tuple[int, ...], tile_shape: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """Where the tiles of an array are, in order; those at its ends may be cut off.

    Args:
        shape: The shape of the array.
        tile_shape: That of a tile, at least 1 everywhere.

    Yields:
        One slice per dimension for each tile.
    """
    starts = (range(0, n, c) for n, c in zip(shape, tile_shape, strict=True))
    for corner in itertools.product(*starts):
        yield tuple(slice(a, min(a + c, n)) for a, c, n in zip(corner, tile_shape, shape, strict=True))
