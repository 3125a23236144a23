"""Safetensors, one tensor at a time: folders of them are read and written in memory of one tensor.

The `safetensors` package maps a whole file into memory, so that all of it can count as the process' own, has no numpy
arrays of eight-bit floats, and writes a file only from all of its tensors at once. The format is eight bytes of
length, that many bytes of JSON, and the tensors' bytes one after the other; nothing more is needed here.

Reference:
    The format's own description, https://github.com/huggingface/safetensors#format
"""

import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple, Union

import ml_dtypes
import numpy as np

from axlearn.common.config import error_message, nearest_names
from axlearn.common.file_system import fsync_dir, write_text_durably

PathLike = Union[str, os.PathLike]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# The largest header that the format allows, in bytes.
_MAX_HEADER_BYTES = 100_000_000
# Headers are filled up so that the tensors begin at a multiple of this.
_ALIGNMENT = 8

_DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class TensorInfo(NamedTuple):
    """What is known of a tensor without reading it."""

    # The type of its elements.
    dtype: np.dtype
    # Its shape.
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """The size of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize


class _Place(NamedTuple):
    info: TensorInfo
    path: pathlib.Path
    # From the beginning of the file, in bytes.
    offset: int


class SafetensorsReader:
    """The tensors of a model folder by name, whatever files they are spread over.

    Attributes:
        tensors: Type and shape of each tensor, by name.
        files: The files that hold them.
    """

    def __init__(self, folder: PathLike):
        """Reads the headers of the files, and nothing else of them.

        Args:
            folder: Holds `model.safetensors`, or `model.safetensors.index.json` and the files that it lists.

        Raises:
            ValueError: If there are no such files, or they are not what they should be; names the file.
        """
        folder = pathlib.Path(folder)
        self._places = _single_file(folder) if _is_single_file(folder) else _sharded(folder)
        self.tensors: dict[str, TensorInfo] = {name: place.info for name, place in self._places.items()}
        self.files = tuple(sorted({place.path for place in self._places.values()}))

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor.

        Raises:
            ValueError: If there is no such tensor, or its file has been cut off since it was opened.
        """
        if name not in self._places:
            raise ValueError(
                error_message(what=f"no tensor is called {name!r}", nearest=nearest_names(name, self.tensors))
            )
        place = self._places[name]
        data = np.fromfile(place.path, dtype=np.uint8, count=place.info.num_bytes, offset=place.offset)
        if data.size != place.info.num_bytes:
            raise _damaged(place.path, f"the file ends within {name}")
        return data.view(place.info.dtype).reshape(place.info.shape)


def _is_single_file(folder: pathlib.Path) -> bool:
    """Returns whether the tensors lie in one file, rather than in those that an index lists."""
    single, index = (folder / SINGLE_FILE).is_file(), (folder / INDEX_FILE).is_file()
    if single and index:
        raise ValueError(
            error_message(
                where=str(folder),
                what=f"there is both a {SINGLE_FILE} and a {INDEX_FILE}",
                expected="one of them",
                advice="Move the one that is out of date away.",
            )
        )
    if single or index:
        return single
    what, advice = f"there is no {SINGLE_FILE} and no {INDEX_FILE}", None
    if not folder.is_dir():
        what = "there is no such folder"
    elif pickles := sorted(path.name for path in folder.glob("*.bin")):
        # A pickle runs whatever code it holds.
        what = f"the weights are in {pickles[0]}, which can run code when it is opened"
        advice = (
            "Convert them where you trust them: "
            "`AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)` of transformers."
        )
    elif others := sorted(path.name for path in folder.glob("*.safetensors")):
        advice = f"There is {others[0]}: if it holds the whole model, name it {SINGLE_FILE}."
    raise ValueError(
        error_message(
            where=str(folder), what=what, expected="a model as Hugging Face saves it", advice=advice
        )
    )


def _single_file(folder: pathlib.Path) -> dict[str, _Place]:
    return _read_header(folder / SINGLE_FILE)


def _sharded(folder: pathlib.Path) -> dict[str, _Place]:
    weight_map = _read_weight_map(folder / INDEX_FILE)
    places: dict[str, _Place] = {}
    for file_name in sorted(set(weight_map.values())):
        path = folder / file_name
        if not path.is_file():
            first = next(name for name, file in weight_map.items() if file == file_name)
            raise ValueError(
                error_message(
                    where=str(path),
                    what=f"the file is missing; {INDEX_FILE} says that it holds {first}",
                    expected=f"all {len(set(weight_map.values()))} files of the model",
                )
            )
        for name, place in _read_header(path).items():
            if name in places:
                raise _damaged(path, f"the tensor {name} is also in {places[name].path.name}")
            if weight_map.get(name) != file_name:
                claimed = f"in {weight_map[name]}" if name in weight_map else "nowhere"
                raise _damaged(path, f"it holds the tensor {name}, which {INDEX_FILE} says is {claimed}")
            places[name] = place
    if missing := [name for name in weight_map if name not in places]:
        raise _damaged(folder / weight_map[missing[0]], f"the tensor {missing[0]} is missing")
    return {name: places[name] for name in weight_map}


def _read_weight_map(path: pathlib.Path) -> dict[str, str]:
    """Returns the name of the file of each tensor."""
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (KeyError, RecursionError, TypeError, ValueError) as e:
        raise _damaged(path, f"there is no weight_map to read ({type(e).__name__}: {e})") from e
    if not isinstance(weight_map, dict) or not weight_map:
        raise _damaged(path, "weight_map is not a map from tensors to files")
    for name, file_name in weight_map.items():
        # Nothing outside of the folder is opened, whatever an index says.
        if not isinstance(file_name, str) or pathlib.PurePath(file_name).name != file_name:
            raise _damaged(path, f"weight_map[{name!r}] is {file_name!r}, not the name of a file")
    return weight_map


def _read_header(path: pathlib.Path) -> dict[str, _Place]:
    """Returns the tensors of one file, after checking that they fill it exactly."""
    size = path.stat().st_size
    with open(path, "rb") as f:
        header_len = int.from_bytes(f.read(8), "little")
        if size < 8 or header_len > min(size - 8, _MAX_HEADER_BYTES):
            raise _damaged(path, f"a header of {header_len} bytes does not fit into {size} bytes")
        text = f.read(header_len)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates)
        if not isinstance(header, dict):
            raise ValueError("it is not a JSON object")
        header.pop("__metadata__", None)
        places = {name: _place(entry, path, 8 + header_len) for name, entry in header.items()}
    except (KeyError, RecursionError, TypeError, ValueError) as e:
        raise _damaged(path, f"the header cannot be read ({type(e).__name__}: {e})") from e
    end = 8 + header_len
    for name, place in sorted(places.items(), key=lambda item: (item[1].offset, item[1].info.num_bytes)):
        if place.offset != end:
            raise _damaged(path, f"{name} begins at byte {place.offset}, expected {end}")
        end += place.info.num_bytes
    if end != size:
        verb = "is cut off" if size < end else "is too long"
        raise _damaged(path, f"the file {verb}: it has {size} bytes, its header says {end}")
    return places


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands there twice")
    return found


def _place(entry: dict[str, Any], path: pathlib.Path, data_start: int) -> _Place:
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"unknown type {entry['dtype']!r}; known: {', '.join(_DTYPES)}")
    shape = tuple(entry["shape"])
    if not all(isinstance(size, int) and size >= 0 for size in shape):
        raise ValueError(f"{entry['shape']} is not a shape")
    info = TensorInfo(_DTYPES[entry["dtype"]], shape)
    start, end = entry["data_offsets"]
    if not isinstance(start, int) or not isinstance(end, int):
        raise ValueError(f"{entry['data_offsets']} are no offsets")
    if end - start != info.num_bytes:
        raise ValueError(
            f"{entry['dtype']} of shape {list(shape)} has {info.num_bytes} bytes, not {end - start}"
        )
    return _Place(info, path, data_start + start)


def _damaged(path: pathlib.Path, what: str) -> ValueError:
    return ValueError(error_message(where=str(path), what=what, advice="Copy or download the file again."))


class SafetensorsWriter:
    """Writes a model folder whose tensors are handed over one by one, in any order.

    A context manager: leaving it without an exception makes the files durable and writes the index. The caller
    gives it a folder that nobody reads yet.
    """

    def __init__(self, folder: PathLike, *, tensors: Mapping[str, TensorInfo], max_shard_bytes: int):
        """Decides which tensor goes into which file, and begins the files.

        Args:
            folder: An existing folder without a model.
            tensors: Type and shape of all tensors, by name; they are laid out in this order.
            max_shard_bytes: The most bytes of tensors in one file; only a larger tensor, alone, exceeds it.
        """
        self._folder = pathlib.Path(folder)
        self._tensors = dict(tensors)
        shards = _shards(self._tensors, max_shard_bytes=max_shard_bytes)
        self._waiting: dict[str, tuple[pathlib.Path, int]] = {}
        self._weight_map: dict[str, str] = {}
        for i, names in enumerate(shards, start=1):
            single = len(shards) == 1
            file_name = SINGLE_FILE if single else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            self._begin_file(self._folder / file_name, names)

    def _begin_file(self, path: pathlib.Path, names: list[str]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offsets, end = {}, 0
        for name in names:
            info = self._tensors[name]
            offsets[name], end = end, end + info.num_bytes
            header[name] = {
                "dtype": _DTYPE_NAMES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": [offsets[name], end],
            }
        text = json.dumps(header, separators=(",", ":")).encode("utf-8")
        text += b" " * (-len(text) % _ALIGNMENT)
        with open(path, "xb") as f:
            f.write(len(text).to_bytes(8, "little") + text)
        self._waiting |= {name: (path, 8 + len(text) + offset) for name, offset in offsets.items()}
        self._weight_map |= dict.fromkeys(names, path.name)

    def write(self, name: str, array: np.ndarray) -> None:
        """Writes a tensor, once.

        Args:
            name: One of the names given at the start.
            array: Its elements, of the type and shape given at the start.
        """
        info = self._tensors[name]
        assert (array.dtype, array.shape) == (info.dtype, info.shape), (name, array.dtype, array.shape, info)
        path, offset = self._waiting.pop(name)
        # Opened for each tensor: a model may have more files than a process may hold open.
        with open(path, "r+b") as f:
            f.seek(offset)
            # As bytes, since the types of ml_dtypes do not offer their memory otherwise.
            f.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(self, exc_type: Any, *_: object) -> None:
        if exc_type is not None:
            return
        assert not self._waiting, f"never written: {sorted(self._waiting)}"
        file_names = sorted(set(self._weight_map.values()))
        for file_name in file_names:
            with open(self._folder / file_name, "rb") as f:
                os.fsync(f.fileno())
        if len(file_names) > 1:
            total = sum(info.num_bytes for info in self._tensors.values())
            index = {"metadata": {"total_size": total}, "weight_map": self._weight_map}
            write_text_durably(self._folder / INDEX_FILE, json.dumps(index, indent=2) + "\n")
        fsync_dir(self._folder)


def _shards(tensors: Mapping[str, TensorInfo], *, max_shard_bytes: int) -> list[list[str]]:
    """Fills one file after the other, keeping the order of the tensors."""
    shards: list[list[str]] = [[]]
    num_bytes = 0
    for name, info in tensors.items():
        if shards[-1] and num_bytes + info.num_bytes > max_shard_bytes:
            shards.append([])
            num_bytes = 0
        shards[-1].append(name)
        num_bytes += info.num_bytes
    return shards
