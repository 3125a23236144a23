"""Arrays as zarr 2, the format of AXLearn's checkpoints: what is checked before decoding, and encoding.

Such an array has no checksums of its own, so what can be checked is that its metadata says what the index says,
that every chunk is there, and that the sizes which the compressed chunks claim are those of a chunk.
"""

import itertools
import json
import math
import os
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Optional

import numpy as np

from axlearn.common.checkpointer._errors import CorruptCheckpointError
from axlearn.common.checkpointer._index import ArrayEntry
from axlearn.common.checkpointer._read_files import open_regular, read_small_file
from axlearn.common.checkpointer._tensorstore import memory_store

DRIVER = "zarr"
METADATA_NAME = ".zarray"
# The metadata of an array is some 200 bytes.
_MAX_METADATA_BYTES = 2**20
# What TensorStore 0.1.86 decodes; None: chunks are stored as they are.
_COMPRESSORS = (None, "blosc", "bz2", "gzip", "zlib", "zstd")
_NUMPY_DTYPE_PATTERN = re.compile(r"[<>|][biufc]\d{1,2}")
# A chunk may reach beyond the array, and is decoded whole. Padding beyond this is nobody's, 64 MiB being the largest
# chunk that we would write.
_MAX_PADDED_CHUNK_BYTES = 64 * 2**20
# Enough for the headers of zstd (18 bytes, RFC 8878, section 3.1.1) and blosc (16 bytes, its README_CHUNK_FORMAT).
_NUM_HEADER_BYTES = 18
_ZSTD_MAGIC = bytes.fromhex("28b52ffd")
# How AXLearn compresses.
_WRITTEN_COMPRESSOR = {"id": "zstd", "level": 1}


class Zarr2Metadata(NamedTuple):
    """What `.zarray` says, as far as it is needed here.

    Attributes:
        chunk_shape: The shape of a chunk; at least 1 everywhere.
        separator: Between the numbers in the name of a chunk: "." or "/".
        compressor: The name of the compression; None: none.
    """

    chunk_shape: tuple[int, ...]
    separator: str
    compressor: Optional[str]


def read_metadata(ckpt_dir: pathlib.Path, array_dir: str, *, entry: ArrayEntry) -> Zarr2Metadata:
    """Reads the metadata of an array and compares it with the index.

    Args:
        ckpt_dir: The folder of the checkpoint.
        array_dir: The folder of the array in it.
        entry: What the index says.

    Returns:
        The metadata; everything in it can be believed as far as sizes go.

    Raises:
        CorruptCheckpointError: If it is not metadata, or is that of another array, or of one that cannot be read.
    """
    name = f"{array_dir}/{METADATA_NAME}"
    data = read_small_file(ckpt_dir, name, max_bytes=_MAX_METADATA_BYTES)
    try:
        return _parse_metadata(json.loads(data), entry=entry)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        detail = str(e) if isinstance(e, _BadMetadata) else f"({type(e).__name__}: {e})"
        raise CorruptCheckpointError(
            ckpt_dir=ckpt_dir,
            file=name,
            reason="bad-array",
            detail=f"is not the metadata of a {entry.dtype.name} array of shape {entry.shape}, as the index says "
            f"it is: {detail}.",
        ) from e


class _BadMetadata(ValueError):
    """What is wrong with metadata, in words."""


def _parse_metadata(content: Any, *, entry: ArrayEntry) -> Zarr2Metadata:
    if content["zarr_format"] != 2 or content.get("filters"):
        raise _BadMetadata("expected zarr_format 2 without filters")
    if content["shape"] != list(entry.shape):
        raise _BadMetadata(f"its shape is {content['shape']}")
    if not _is_dtype(content["dtype"], entry.dtype):
        raise _BadMetadata(f"its dtype is {content['dtype']!r}")
    compressor = None if content["compressor"] is None else content["compressor"]["id"]
    if compressor not in _COMPRESSORS:
        raise _BadMetadata(f"its compressor is {compressor!r}, not one of {_COMPRESSORS}")
    separator = content.get("dimension_separator", ".")
    if separator not in (".", "/"):
        raise _BadMetadata(f"its dimension_separator is {separator!r}")
    chunks = content["chunks"]
    if len(chunks) != len(entry.shape) or any(type(c) is not int or c < 1 for c in chunks):
        raise _BadMetadata(f"its chunks are {chunks}")
    num_bytes = math.prod(entry.shape) * entry.dtype.itemsize
    if math.prod(chunks) * entry.dtype.itemsize > max(num_bytes, _MAX_PADDED_CHUNK_BYTES):
        raise _BadMetadata(f"its chunks {chunks} are larger than the array")
    return Zarr2Metadata(chunk_shape=tuple(chunks), separator=separator, compressor=compressor)


def _is_dtype(encoded: Any, dtype: np.dtype) -> bool:
    """Whether a type in metadata is `dtype`, in any byte order. Types that numpy lacks go by their names."""
    if not isinstance(encoded, str):
        return False
    if _NUMPY_DTYPE_PATTERN.fullmatch(encoded):
        return np.dtype(encoded).newbyteorder("=") == dtype
    return encoded == dtype.name


def chunk_names(metadata: Zarr2Metadata, *, shape: tuple[int, ...]) -> Iterator[str]:
    """The names of the files of all chunks, one at a time: metadata may ask for more than anybody can list."""
    if not shape:
        yield "0"
        return
    counts = [-(-n // c) for n, c in zip(shape, metadata.chunk_shape, strict=True)]
    for cell in itertools.product(*map(range, counts)):
        yield metadata.separator.join(map(str, cell))


def check_chunk(ckpt_dir: pathlib.Path, name: str, *, metadata: Zarr2Metadata, dtype: np.dtype) -> None:
    """Checks that a chunk is there, and that the size which it claims to have decoded is that of a chunk.

    Args:
        ckpt_dir: The folder of the checkpoint.
        name: The path of the chunk in it.
        metadata: That of its array.
        dtype: The type of its array.

    Raises:
        CorruptCheckpointError: If not.
    """
    expected = math.prod(metadata.chunk_shape) * dtype.itemsize
    with open_regular(ckpt_dir, name) as f:
        size = os.fstat(f.fileno()).st_size
        header = f.read(_NUM_HEADER_BYTES)
    claimed = size if metadata.compressor is None else _claimed_size(header, compressor=metadata.compressor)
    if not size or (claimed is not None and claimed != expected):
        raise CorruptCheckpointError(
            ckpt_dir=ckpt_dir,
            file=name,
            reason="size-mismatch",
            detail=f"has {size} bytes and holds {claimed or 0}. Expected a chunk of {expected} bytes.",
        )


def _claimed_size(header: bytes, *, compressor: str) -> Optional[int]:
    """The size of a chunk that its first bytes claim; None where they claim none."""
    if compressor == "blosc":
        return int.from_bytes(header[4:8], "little")
    if compressor != "zstd" or len(header) < 6 or not header.startswith(_ZSTD_MAGIC):
        return None
    descriptor = header[4]
    is_single_segment = bool(descriptor & 0x20)
    start = 5 + (not is_single_segment) + (0, 1, 2, 4)[descriptor & 3]
    num_bytes = (1 if is_single_segment else 0, 2, 4, 8)[descriptor >> 6]
    if not num_bytes or len(header) < start + num_bytes:
        return None
    # RFC 8878, section 3.1.1.1.4: sizes of two bytes are counted from 256.
    return int.from_bytes(header[start : start + num_bytes], "little") + (256 if num_bytes == 2 else 0)


def encode_array(
    entry: ArrayEntry,
    *,
    chunk_shape: tuple[int, ...],
    parts: Iterable[tuple[tuple[slice, ...], np.ndarray]],
) -> Iterator[tuple[str, bytes]]:
    """The files of an array as AXLearn writes it: zstd at level 1, and no chunk left out.

    Args:
        entry: Shape and type.
        chunk_shape: Divides the shape.
        parts: The chunks, each with where it is.

    Yields:
        The name of a file in the array's folder, and its contents, one at a time.
    """
    metadata = {
        "zarr_format": 2,
        "shape": list(entry.shape),
        "chunks": list(chunk_shape),
        "compressor": _WRITTEN_COMPRESSOR,
        "dtype": _encoded_dtype(entry.dtype),
        "order": "C",
        "filters": None,
        "fill_value": None,
        "dimension_separator": ".",
    }
    store = memory_store(DRIVER, metadata=metadata)
    yield METADATA_NAME, store.kvstore.read(METADATA_NAME).result().value
    for index, value in parts:
        store[index].write(value).result()
        starts = (part.start // c for part, c in zip(index, chunk_shape, strict=True))
        key = ".".join(map(str, starts)) or "0"
        yield key, store.kvstore.read(key).result().value
        store.kvstore.write(key, None).result()


def _encoded_dtype(dtype: np.dtype) -> str:
    """How zarr 2 writes a type: numpy's own as numpy does, little-endian, and the others by their names."""
    is_numpys = dtype.isbuiltin == 1
    return dtype.newbyteorder("<").str if is_numpys else dtype.name
