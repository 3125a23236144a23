"""Writing a checkpoint array by array, in parts: for what converts models that are larger than memory."""

import math
import pathlib
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, Optional

import numpy as np

from axlearn.common.checkpointer._commit import commit, remove_attempt
from axlearn.common.checkpointer._file_ops import FileOps, StepFolder
from axlearn.common.checkpointer._index import index_entry
from axlearn.common.checkpointer._layout import (
    ARRAYS_DIR,
    PathLike,
    check_leaf_path,
    new_attempt_path,
    step_dir_name,
    sweep_leftovers,
)
from axlearn.common.checkpointer._lease import WriterLease
from axlearn.common.checkpointer._reader import Part
from axlearn.common.checkpointer._save import index_as_json
from axlearn.common.checkpointer._snapshot import (
    STORABLE_DTYPES,
    ArraySnapshot,
    Shard,
    check_no_path_inside_another,
    chunk_shape_for,
)
from axlearn.common.checkpointer._zarr import encode_array
from axlearn.common.config import error_message


class CheckpointWriter:
    """Writes one checkpoint in our layout; memory holds one part of one array.

    A context manager: where its block ends normally, the checkpoint is verified and gets its name by one rename,
    as durably as a save of a run; where it ends by an exception, nothing is left. While it is open nobody else
    writes to the folder.

        with CheckpointWriter(run / "checkpoints", step=0) as writer:
            writer.add_array("model/w", shape=(2, 3), dtype=np.float32, parts=layers_of_w())
    """

    def __init__(self, base_dir: PathLike, *, step: int, files: Optional[FileOps] = None):
        """Touches nothing before the block begins.

        Args:
            base_dir: The folder of all checkpoints; made where it does not exist.
            step: The step; there must be no checkpoint of it.
            files: What changes the file system. None: what always does.

        Raises:
            ValueError: If `step` is negative.
        """
        if step < 0:
            raise ValueError(
                error_message(where="CheckpointWriter", what=f"step={step}", expected="0 or more")
            )
        self._base_dir = pathlib.Path(base_dir)
        self._step = step
        self._files = FileOps() if files is None else files
        self._lease = WriterLease(self._base_dir)
        self._folder: Optional[StepFolder] = None
        self._index: dict[str, Any] = {}
        self._unfinished: Optional[str] = None

    def __enter__(self) -> "CheckpointWriter":
        """Begins.

        Raises:
            DirectoryInUseError: If somebody else writes to the same folder.
            FileExistsError: If there is something of this step already.
            OSError: If the folder cannot be written to.
        """
        assert self._folder is None, "A writer writes one checkpoint."
        self._lease.acquire()
        try:
            sweep_leftovers(self._base_dir)
            check_is_free(self._final_dir)
            tmp_dir = new_attempt_path(self._base_dir, step=self._step, kind="tmp")
            self._folder = StepFolder(tmp_dir, files=self._files)
        except BaseException:
            self._lease.release()
            raise
        return self

    def __exit__(
        self,
        exc_type: Optional[type[BaseException]],
        exc: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        """Commits, or removes what there is.

        Raises:
            OSError: If something could not be written; nothing is left.
            CorruptCheckpointError: If what was written does not read back; nothing is left.
            ValueError: If there are no arrays, or an error about one of them was caught inside of the block.
        """
        assert self._folder is not None
        try:
            if exc_type is None:
                self._commit(self._folder)
        except BaseException:
            remove_attempt(self._folder.path, files=self._files)
            raise
        else:
            if exc_type is not None:
                remove_attempt(self._folder.path, files=self._files)
        finally:
            self._lease.release()

    @property
    def _final_dir(self) -> pathlib.Path:
        return self._base_dir / step_dir_name(self._step)

    def _commit(self, folder: StepFolder) -> None:
        if self._unfinished is not None or not self._index:
            what = (
                "There are no arrays" if self._unfinished is None else f"{self._unfinished} is not complete"
            )
            raise ValueError(
                error_message(where=str(self._final_dir), what=f"{what}; the checkpoint was not written")
            )
        check_no_path_inside_another(self._index, where="CheckpointWriter")
        leaves = [[path, self._index[path]] for path in sorted(self._index)]
        index = index_as_json([["step", self._step], *leaves])
        commit(folder, self._final_dir, step=self._step, index=index, files=self._files)

    def add_array(
        self, path: str, *, shape: tuple[int, ...], dtype: np.typing.DTypeLike, parts: Iterable[Part]
    ) -> None:
        """Writes an array.

        Args:
            path: Its path, such as "model/decoder/emb/token_emb/weight".
            shape: The shape of the whole array.
            dtype: Its type; parts must have it.
            parts: Where each part is, one slice per dimension, and its values. All parts have one shape, which
                divides that of the array; each place is in exactly one of them; their order is free. The
                next one is asked for when the one before is on its way to the disk.

        Raises:
            OSError: If it cannot be written.
            ValueError: If the path or the type cannot be stored, or the parts do not tile the array.
        """
        assert self._folder is not None, "Arrays are added inside of the block."
        where = f"CheckpointWriter: {path}"
        shape, dtype = tuple(shape), np.dtype(dtype)
        check_leaf_path(path)
        if path in self._index or self._unfinished is not None:
            what = "This array was written before" if path in self._index else "The array before failed"
            raise ValueError(error_message(where=where, what=what))
        if dtype.name not in STORABLE_DTYPES:
            expected = f"one of {', '.join(STORABLE_DTYPES)}"
            raise ValueError(error_message(where=where, what=f"dtype {dtype.name}", expected=expected))
        self._unfinished = path
        for name, data in _encode(shape, dtype, parts=parts, where=where):
            self._folder.write(f"{ARRAYS_DIR}/{path}/{name}", data)
        self._index[path] = index_entry(shape, dtype)
        self._unfinished = None


def check_is_free(final_dir: pathlib.Path) -> None:
    """Refuses the name of a step that is taken, whatever is there.

    Raises:
        FileExistsError: If it is.
    """
    if final_dir.is_symlink() or final_dir.exists():
        raise FileExistsError(
            error_message(
                where=str(final_dir),
                what="This step is there already, and is not replaced",
                advice="Remove it, or choose another folder",
            )
        )


def _encode(
    shape: tuple[int, ...], dtype: np.dtype, *, parts: Iterable[Part], where: str
) -> Iterator[tuple[str, bytes]]:
    """The files of an array, one at a time."""
    checked = iter(_check_parts(shape, dtype, parts=parts, where=where))
    first = next(checked, None)
    part_shape = (0,) * len(shape) if first is None else first.value.shape

    def shards() -> Iterator[Shard]:
        if first is not None:
            yield first
            yield from checked

    array = ArraySnapshot(
        shape=shape,
        dtype=dtype,
        chunk_shape=chunk_shape_for(part_shape, itemsize=dtype.itemsize),
        shards=shards(),
    )
    yield from encode_array(array, has_metadata=True)


def _check_parts(
    shape: tuple[int, ...], dtype: np.dtype, *, parts: Iterable[Part], where: str
) -> Iterator[Shard]:
    """Passes the parts on; raises ValueError for the first one that does not belong to a tiling."""

    def bad(what: str) -> ValueError:
        expected = f"parts of one shape that tile {shape} and have dtype {dtype.name}"
        return ValueError(error_message(where=where, what=what, expected=expected))

    part_shape: Optional[tuple[int, ...]] = None
    seen: set[tuple[int, ...]] = set()
    for index, value in parts:
        bounds = [part.indices(n) for part, n in zip(index, shape, strict=False)]
        start = tuple(begin for begin, _, _ in bounds)
        extent = tuple(max(0, end - begin) for begin, end, _ in bounds)
        if len(index) != len(shape) or any(step != 1 for _, _, step in bounds) or value.shape != extent:
            raise bad(f"a part of shape {value.shape} at {index}")
        if value.dtype != dtype:
            raise bad(f"the part at {index} has dtype {value.dtype.name}")
        part_shape = extent if part_shape is None else part_shape
        divides = all(
            n % max(1, c) == 0 and a % max(1, c) == 0 for n, c, a in zip(shape, extent, start, strict=True)
        )
        if extent != part_shape or not divides:
            raise bad(f"the part at {index} has shape {extent}, the first one {part_shape}")
        if start in seen:
            raise bad(f"there are two parts at {index}")
        seen.add(start)
        yield Shard(start=start, value=value)
    sizes = () if part_shape is None else part_shape
    num_missing = math.prod(shape) - len(seen) * (math.prod(sizes) if part_shape is not None else 0)
    if num_missing:
        raise bad(f"{num_missing} of {math.prod(shape)} elements are in no part")
