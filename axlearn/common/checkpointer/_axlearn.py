"""AXLearn's layout: `index`, which is written last, and zarr 2 arrays. There are no hashes.

Such a checkpoint is somebody else's: it is read, and never renamed, replaced or deleted. Iterators of training data
are stored in formats of the libraries that they come from (`tf_<process>/`, `python_<process>/`) and are not read.
"""

import hashlib
import itertools
import pathlib
from collections.abc import Collection
from typing import Any, Optional

from axlearn.common.checkpointer._errors import CorruptCheckpointError
from axlearn.common.checkpointer._layout import ARRAYS_DIR, INDEX_NAME
from axlearn.common.checkpointer._manifest import MAX_JSON_BYTES
from axlearn.common.checkpointer._read_files import call_in_threads, read_small_file
from axlearn.common.checkpointer._stored import WHOLE, Share, StoredCheckpoint, tiles
from axlearn.common.checkpointer._tensorstore import ArrayReader
from axlearn.common.checkpointer._zarr2 import (
    DRIVER,
    METADATA_NAME,
    Zarr2Metadata,
    check_chunk,
    chunk_names,
    read_metadata,
)

# Chunks are looked at in batches: metadata may ask for more of them than there is memory for their names.
_NUM_CHUNKS_AT_ONCE = 4096


class AXLearnCheckpoint(StoredCheckpoint):
    """A checkpoint that AXLearn wrote, or one of ours that was exported."""

    writer = "AXLearn's"

    def __init__(self, ckpt_dir: pathlib.Path):
        super().__init__(ckpt_dir)
        self.unreadable_documents = self.index.documents
        self.index = self.index._replace(documents={})
        self._metadata: dict[str, Zarr2Metadata] = {}

    def _read_index_file(self) -> bytes:
        return read_small_file(self.ckpt_dir, INDEX_NAME, max_bytes=MAX_JSON_BYTES)

    def identity(self) -> str:
        return hashlib.sha256(self._read_index_file()).hexdigest()

    def check(self, *, paths: Optional[Collection[str]] = None, share: Share = WHOLE) -> None:
        for path in self.index.arrays if paths is None else paths:
            self._check_array(path, share=share)

    def _check_array(self, path: str, *, share: Share) -> None:
        entry = self.index.arrays[path]
        array_dir = f"{ARRAYS_DIR}/{path}"
        metadata = read_metadata(self.ckpt_dir, array_dir, entry=entry)

        def check(name: str) -> None:
            check_chunk(self.ckpt_dir, f"{array_dir}/{name}", metadata=metadata, dtype=entry.dtype)

        names = share.of(chunk_names(metadata, shape=entry.shape))
        while batch := list(itertools.islice(names, _NUM_CHUNKS_AT_ONCE)):
            call_in_threads(check, batch)
        self._metadata[path] = metadata

    def verify(self) -> None:
        self.check()
        for path, entry in self.index.arrays.items():
            reader = self.open_array(path)
            for index in tiles(entry.shape, self.chunk_shape(path)):
                reader.read(index)

    def open_array(self, path: str) -> ArrayReader:
        return ArrayReader(self.ckpt_dir, f"{ARRAYS_DIR}/{path}", driver=DRIVER, metadata_name=METADATA_NAME)

    def chunk_shape(self, path: str) -> tuple[int, ...]:
        return self._metadata[path].chunk_shape

    def read_document(self, path: str) -> Any:
        raise CorruptCheckpointError(
            ckpt_dir=self.ckpt_dir, file=path, reason="bad-document", detail="only AXLearn can read it."
        )
