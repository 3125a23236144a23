"""Arrays as zarr 3: little-endian chunks, each followed by its CRC-32C, all of them written.

TensorStore encodes into memory, so that what reaches the disk is hashed on the way and made durable by one
piece of code; it decodes from the files, whose metadata was checked before: a chunk is never larger than its
file.
"""

import json
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from axlearn.common.checkpointer._errors import CorruptCheckpointError
from axlearn.common.checkpointer._file_ops import FileEntry
from axlearn.common.checkpointer._snapshot import ArraySnapshot
from axlearn.common.checkpointer._tensorstore import memory_store

DRIVER = "zarr3"
METADATA_NAME = "zarr.json"
_CRC_BYTES = 4


def _metadata(shape: Sequence[int], *, dtype: np.dtype, chunk_shape: Sequence[int]) -> dict[str, Any]:
    """What `zarr.json` says, in the one form in which we write it."""
    # The byte order is left out for types that have none.
    bytes_codec: dict[str, Any] = {"name": "bytes"}
    if dtype.itemsize > 1:
        bytes_codec["configuration"] = {"endian": "little"}
    zero: Any = {"b": False, "i": 0, "u": 0, "c": [0.0, 0.0]}.get(dtype.kind, 0.0)
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk_shape)}},
        "chunk_key_encoding": {"name": "default"},
        "codecs": [bytes_codec, {"name": "crc32c"}],
        "fill_value": zero,
    }


def encode_array(array: ArraySnapshot, *, has_metadata: bool) -> Iterator[tuple[str, bytes]]:
    """The files of an array.

    Args:
        array: What to encode.
        has_metadata: Whether `zarr.json` is among them; it is the same on every process, and one of them
            writes it.

    Yields:
        The name of a file in the array's folder, and its contents, one at a time.
    """
    metadata = _metadata(array.shape, dtype=array.dtype, chunk_shape=array.chunk_shape)
    store = memory_store(DRIVER, metadata=metadata)
    if has_metadata:
        yield METADATA_NAME, json.dumps(metadata).encode("utf-8")
    for shard in array.shards:
        grid = [size // chunk for size, chunk in zip(shard.value.shape, array.chunk_shape, strict=True)]
        for cell in np.ndindex(*grid):
            inner = tuple(slice(i * c, (i + 1) * c) for i, c in zip(cell, array.chunk_shape, strict=True))
            start = tuple(s + part.start for s, part in zip(shard.start, inner, strict=True))
            outer = tuple(slice(s, s + c) for s, c in zip(start, array.chunk_shape, strict=True))
            store[outer].write(shard.value[inner]).result()
            key = "/".join(["c", *(str(s // c) for s, c in zip(start, array.chunk_shape, strict=True))])
            yield key, store.kvstore.read(key).result().value
            store.kvstore.write(key, None).result()


def check_array_files(
    ckpt_dir: pathlib.Path,
    array_dir: str,
    *,
    metadata: bytes,
    files: Mapping[str, FileEntry],
    shape: tuple[int, ...],
    dtype: np.dtype,
) -> tuple[int, ...]:
    """Checks that the files of an array can be what `encode_array` made of one with this shape and type.

    Nothing is decoded before this, because a decoder believes the sizes that metadata claims.

    Args:
        ckpt_dir: The folder of the checkpoint.
        array_dir: The folder of the array in it.
        metadata: The contents of its `zarr.json`.
        files: The entries of its chunks, by name in the array's folder.
        shape: The shape that the index says.
        dtype: The type that the index says.

    Returns:
        The shape of its chunks.

    Raises:
        CorruptCheckpointError: If they cannot.
    """

    def corrupt(detail: str) -> CorruptCheckpointError:
        return CorruptCheckpointError(
            ckpt_dir=ckpt_dir, file=f"{array_dir}/{METADATA_NAME}", reason="bad-array", detail=detail
        )

    try:
        content = json.loads(metadata)
        chunk_shape = content["chunk_grid"]["configuration"]["chunk_shape"]
        is_legal = content == _metadata(shape, dtype=dtype, chunk_shape=chunk_shape)
        is_legal = is_legal and len(chunk_shape) == len(shape)
        is_legal = is_legal and all(
            type(c) is int and 1 <= c <= max(1, n) for c, n in zip(chunk_shape, shape, strict=True)
        )
    except (ValueError, TypeError, KeyError, RecursionError) as e:
        raise corrupt(f"is not the metadata of an array ({type(e).__name__}: {e}).") from e
    if not is_legal:
        raise corrupt(f"does not describe a {dtype.name} array of shape {shape} as we write them.")
    num_chunks = math.prod(-(-n // c) for n, c in zip(shape, chunk_shape, strict=True))
    num_bytes = math.prod(chunk_shape) * dtype.itemsize + _CRC_BYTES
    if len(files) != num_chunks or any(entry.size != num_bytes for entry in files.values()):
        raise corrupt(f"asks for {num_chunks} chunks of {num_bytes} bytes, which are not what is there.")
    return tuple(chunk_shape)
