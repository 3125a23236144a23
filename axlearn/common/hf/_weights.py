"""The weights of a model from the one kind of file to the other, one tensor at a time."""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Optional, Protocol

import ml_dtypes
import numpy as np

from axlearn.common.config import error_message
from axlearn.common.hf._names import check_tensor_names
from axlearn.common.hf._safetensors import SafetensorsReader, SafetensorsWriter, TensorInfo
from axlearn.common.hf._tensors import TensorRule, parameter_shapes

# Types of weights that mean what they say; those of quantized models need scales beside them.
WEIGHT_DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

Index = tuple[slice, ...]


class ArraySink(Protocol):
    """Where parameters go: a checkpoint that is being written."""

    def add_array(self, path: str, *, shape: tuple[int, ...], dtype: Any, parts: Any) -> None:
        """Writes an array from pairs of an index and the part that belongs there."""


class ArraySource(Protocol):
    """Where parameters come from: a checkpoint that is being read."""

    def read(self, path: str, index: Optional[Index] = None) -> np.ndarray:
        """Returns an array, or a part of it."""


class Copied(NamedTuple):
    """What a conversion has written."""

    num_params: int
    num_bytes: int
    # Tensors of the source that the model does not need, each with the reason.
    ignored: Mapping[str, str]


def check_weights(reader: SafetensorsReader, *, rules: Sequence[TensorRule]) -> dict[str, str]:
    """Checks that files hold the tensors that rules want, of types that are weights; reads a tied head only.

    Args:
        reader: The files.
        rules: How their tensors translate.

    Returns:
        The tensors that may be left out, each with the reason.

    Raises:
        ValueError: If they do not; names the tensors.
    """
    ignored = check_tensor_names(rules, {name: info.shape for name, info in reader.tensors.items()})
    for name, info in reader.tensors.items():
        if name not in ignored and info.dtype not in WEIGHT_DTYPES.values():
            raise ValueError(
                error_message(
                    where=name,
                    what=f"{info.dtype} is no type for weights that can be read without more",
                    expected=", ".join(WEIGHT_DTYPES),
                    advice="Save the model in one of them.",
                )
            )
    if _HEAD in ignored and not _is_equal(reader, _HEAD, _EMBEDDING):
        raise ValueError(
            error_message(
                where=_HEAD,
                what="it differs from the token embedding, but config.json says that the two are one",
                advice="Set tie_word_embeddings in config.json to false, or remove the tensor.",
            )
        )
    return ignored


def _is_equal(reader: SafetensorsReader, name: str, other: str) -> bool:
    # Compared as bytes, because NaN differs from itself.
    return np.array_equal(reader.read(name).view(np.uint8), reader.read(other).view(np.uint8))


def import_weights(
    reader: SafetensorsReader,
    *,
    rules: Sequence[TensorRule],
    sink: ArraySink,
    prefix: str,
    dtype: np.dtype,
) -> Copied:
    """Writes the parameters of a model from its Hugging Face files, in memory of the tensors of one rule.

    Args:
        reader: The files; `check_weights` is done first.
        rules: From `tensor_rules`.
        sink: What they are written to.
        prefix: Put before the path of each parameter, such as "model/".
        dtype: The type to write them in.

    Returns:
        What was written.

    Raises:
        ValueError: If the files do not hold what the rules want; before anything is written.
    """
    ignored = check_weights(reader, rules=rules)
    by_path: dict[str, list[TensorRule]] = {}
    for rule in rules:
        by_path.setdefault(rule.path, []).append(rule)
    shapes = parameter_shapes(rules)
    for path, of_path in by_path.items():
        sink.add_array(
            prefix + path, shape=shapes[path], dtype=dtype, parts=_parts(reader, of_path, dtype=dtype)
        )
    num_params = sum(int(np.prod(shape, dtype=np.int64)) for shape in shapes.values())
    return Copied(num_params, num_params * dtype.itemsize, ignored)


def _parts(
    reader: SafetensorsReader, rules: Sequence[TensorRule], *, dtype: np.dtype
) -> Iterator[tuple[Index, np.ndarray]]:
    """Yields the parts of one parameter."""
    for rule in rules:
        part = rule.to_ours({name: reader.read(name) for name in rule.hf_shapes})
        assert part.shape == tuple(rule.shape), (rule.path, part.shape, rule.shape)
        part = part.astype(dtype, copy=False)
        yield _index(rule), part if rule.layer is None else part[None]


def _index(rule: TensorRule) -> Index:
    """Returns where the part of a rule stands in its parameter."""
    index = tuple(slice(0, size) for size in rule.shape)
    return index if rule.layer is None else (slice(rule.layer, rule.layer + 1), *index)


def export_weights(
    source: ArraySource,
    *,
    rules: Sequence[TensorRule],
    prefix: str,
    folder: str | os.PathLike[str],
    dtype: np.dtype,
    max_shard_bytes: int,
) -> Copied:
    """Writes the Hugging Face files of a model from its parameters, in memory of the tensors of one rule.

    Args:
        source: Where the parameters are read from.
        rules: From `tensor_rules`.
        prefix: Put before the path of each parameter, such as "model/".
        folder: An existing folder without a model.
        dtype: The type to write the tensors in.
        max_shard_bytes: The most bytes of tensors in one file, as far as one tensor does not exceed it.

    Returns:
        What was written.
    """
    tensors = {
        name: TensorInfo(dtype, tuple(shape)) for rule in rules for name, shape in rule.hf_shapes.items()
    }
    with SafetensorsWriter(folder, tensors=tensors, max_shard_bytes=max_shard_bytes) as writer:
        for rule in rules:
            part = source.read(prefix + rule.path, _index(rule))
            for name, tensor in rule.to_hf(part if rule.layer is None else part[0]).items():
                writer.write(name, tensor.astype(dtype, copy=False))
    num_bytes = sum(info.num_bytes for info in tensors.values())
    return Copied(num_bytes // dtype.itemsize, num_bytes, {})
