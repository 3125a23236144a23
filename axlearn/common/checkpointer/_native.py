"""Our own layout: zarr 3, JSON, and a manifest with the hash of every file."""

import functools
import hashlib
import json
import pathlib
from collections.abc import Collection
from typing import Any, Optional

from axlearn.common.checkpointer._errors import CorruptCheckpointError
from axlearn.common.checkpointer._layout import ARRAYS_DIR, DOCUMENTS_DIR, INDEX_NAME, parse_step_from_dir
from axlearn.common.checkpointer._manifest import encode_manifest, read_manifest, read_verified, verify_files
from axlearn.common.checkpointer._stored import WHOLE, Share, StoredCheckpoint
from axlearn.common.checkpointer._tensorstore import ArrayReader
from axlearn.common.checkpointer._zarr import DRIVER, METADATA_NAME, check_array_files


class NativeCheckpoint(StoredCheckpoint):
    """A checkpoint that we wrote: nothing of it is believed that was not compared with its manifest."""

    writer = "ours"

    def __init__(self, ckpt_dir: pathlib.Path):
        self._manifest = read_manifest(ckpt_dir, step=parse_step_from_dir(ckpt_dir))
        super().__init__(ckpt_dir)
        self._chunk_shapes: dict[str, tuple[int, ...]] = {}

    def _read_index_file(self) -> bytes:
        return read_verified(self.ckpt_dir, self._manifest, name=INDEX_NAME)

    def identity(self) -> str:
        return hashlib.sha256(encode_manifest(self._manifest)).hexdigest()

    def check(self, *, paths: Optional[Collection[str]] = None, share: Share = WHOLE) -> None:
        if paths is None:
            names = list(self._manifest.files)
        else:
            names = [name for path in paths for name in self._files_by_array.get(path, ())]
        verify_files(self.ckpt_dir, self._manifest, names=share.of(names))
        # Small files that every process needs.
        for path in self.index.arrays if paths is None else paths:
            self._check_array(path)

    def _check_array(self, path: str) -> None:
        prefix = f"{ARRAYS_DIR}/{path}/"
        metadata = read_verified(self.ckpt_dir, self._manifest, name=prefix + METADATA_NAME)
        names = self._files_by_array[path]
        chunks = {name: self._manifest.files[name] for name in names if name != prefix + METADATA_NAME}
        entry = self.index.arrays[path]
        self._chunk_shapes[path] = check_array_files(
            self.ckpt_dir, prefix[:-1], metadata=metadata, files=chunks, shape=entry.shape, dtype=entry.dtype
        )

    def verify(self) -> None:
        # The hashes say as much as decoding would.
        self.check()

    def open_array(self, path: str) -> ArrayReader:
        return ArrayReader(self.ckpt_dir, f"{ARRAYS_DIR}/{path}", driver=DRIVER, metadata_name=METADATA_NAME)

    def chunk_shape(self, path: str) -> tuple[int, ...]:
        return self._chunk_shapes[path]

    def read_document(self, path: str) -> Any:
        name = f"{DOCUMENTS_DIR}/{path}"
        try:
            return json.loads(read_verified(self.ckpt_dir, self._manifest, name=name))
        except (ValueError, RecursionError) as e:
            raise CorruptCheckpointError(
                ckpt_dir=self.ckpt_dir, file=name, reason="bad-document", detail=f"is not JSON ({e})."
            ) from e

    @functools.cached_property
    def _files_by_array(self) -> dict[str, list[str]]:
        """The files below `gda/`, by the path of the array that they belong to."""
        suffix = f"/{METADATA_NAME}"
        names = self._manifest.files
        paths = {name[len(ARRAYS_DIR) + 1 : -len(suffix)] for name in names if name.endswith(suffix)}
        files: dict[str, list[str]] = {path: [] for path in paths}
        for name in names:
            parts = name.split("/")
            if parts[0] != ARRAYS_DIR:
                continue
            owner = next(
                ("/".join(parts[1:i]) for i in range(2, len(parts)) if "/".join(parts[1:i]) in paths), None
            )
            if owner is not None:
                files[owner].append(name)
        return files
