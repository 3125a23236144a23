"""What a state consists of, and the copy of it that a save works from.

The copy is complete before `save` returns: the next step may then overwrite the arrays, whose buffers it was
given.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Optional, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from axlearn.common.checkpointer._layout import check_leaf_path
from axlearn.common.checkpointer._owners import is_everywhere, own_shards
from axlearn.common.utils import Nested, flatten_items

# What zarr 3 stores, through TensorStore 0.1.86, with as many bytes per element as numpy.
STORABLE_DTYPES = (
    *("bool", "int2", "int4", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float4_e2m1fn", "float8_e3m4", "float8_e4m3b11fnuz", "float8_e4m3fn", "float8_e4m3fnuz"),
    *("float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
    *("bfloat16", "float16", "float32", "float64", "complex64", "complex128"),
)
# A chunk is held in memory three times while it is written. 64 MiB take 0.1 s to encode and hash, against 0.3
# ms for a file and its fsync (two cores, ext4), so larger ones would save nothing.
_MAX_CHUNK_BYTES = 64 * 2**20


@runtime_checkable
class Stateful(Protocol):
    """A leaf that is not an array: it says itself what its state is."""

    def get_state(self) -> Any:
        """The state, as something that JSON can say; the same on every process."""
        ...

    def set_state(self, state: Any) -> None:
        """Continues from what `get_state` returned."""
        ...


class Shard(NamedTuple):
    """A part of an array, in the memory of the host.

    Attributes:
        start: Where it begins, one index per dimension.
        value: The part.
    """

    start: tuple[int, ...]
    value: np.ndarray


class ArraySnapshot(NamedTuple):
    """The parts of an array that this process writes; over all processes, every element is in one of them.

    Attributes:
        shape: The shape of the whole array.
        dtype: Its type.
        chunk_shape: The shape of the pieces in which it is stored; each one is inside a shard.
        shards: The parts.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    chunk_shape: tuple[int, ...]
    shards: Iterable[Shard]


class Snapshot(NamedTuple):
    """A state at one moment.

    Attributes:
        arrays: By path.
        documents: The states of stateful leaves, as JSON, by path.
        document_types: What the index says about these leaves, by path.
        common: Of several processes: hashes of what must be the same on all of them, by path. With one, nothing.
    """

    arrays: dict[str, ArraySnapshot]
    documents: dict[str, str]
    document_types: dict[str, str]
    common: dict[str, str]


class Leaves(NamedTuple):
    """The leaves of a state, in two kinds, by path.

    Attributes:
        arrays: Arrays, or what describes them: anything with a shape and a dtype.
        statefuls: The others.
    """

    arrays: dict[str, Any]
    statefuls: dict[str, Stateful]


def split_leaves(
    state: Nested[Any], *, where: str, keep_path: Optional[Callable[[str], bool]] = None
) -> Leaves:
    """Sorts the leaves of a state into arrays and others.

    Args:
        state: Any tree.
        where: Who asks, for messages.
        keep_path: Tells which paths count. None: all of them.

    Returns:
        The leaves.

    Raises:
        ValueError: If two leaves have one path, or a path cannot be one of a file.
        TypeError: If a leaf is neither an array nor stateful.
    """
    leaves = Leaves(arrays={}, statefuls={})
    for path, leaf in flatten_items(state):
        if keep_path is not None and not keep_path(path):
            continue
        check_leaf_path(path)
        if path in leaves.arrays or path in leaves.statefuls:
            raise ValueError(
                f"{where}: two leaves of the state have the path {path!r}. Expected different ones."
            )
        if isinstance(leaf, Stateful):
            leaves.statefuls[path] = leaf
        elif hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
            leaves.arrays[path] = leaf
        else:
            raise TypeError(
                f"{where}: the leaf {path} is a {type(leaf).__name__} ({leaf!r:.60}). Expected an array, "
                "or an object with get_state and set_state."
            )
    check_no_path_inside_another([*leaves.arrays, *leaves.statefuls], where=where)
    return leaves


def check_no_path_inside_another(paths: Iterable[str], *, where: str) -> None:
    """Refuses paths of leaves of which one would be a folder of another.

    Raises:
        ValueError: If there are such.
    """
    paths = set(paths)
    for path in paths:
        parts = path.split("/")
        for i in range(1, len(parts)):
            if "/".join(parts[:i]) in paths:
                raise ValueError(
                    f"{where}: the leaf {path} has a path below that of the leaf {'/'.join(parts[:i])}. "
                    "Expected keys without '/'."
                )


def take_snapshot(state: Nested[Any]) -> Snapshot:
    """Copies a state to the host. When this returns, nothing refers to the buffers of `state` any more.

    Args:
        state: A tree of jax or numpy arrays and `Stateful` leaves.

    Returns:
        The copy.

    Raises:
        TypeError: If a leaf cannot be stored.
        ValueError: If the path of a leaf cannot be stored.
    """
    where = "checkpointer.save"
    leaves = split_leaves(state, where=where)
    for path, x in leaves.arrays.items():
        _check_storable(path, x, where=where)
    # All copies are asked for before the first is waited for.
    for path, x in leaves.arrays.items():
        if isinstance(x, jax.Array):
            for shard in own_shards(path, x):
                shard.data.copy_to_host_async()
    documents = {path: _as_json(path, leaf, where=where) for path, leaf in leaves.statefuls.items()}
    arrays = {path: _copy_array(path, x) for path, x in leaves.arrays.items()}
    return Snapshot(
        arrays=arrays,
        documents=documents,
        document_types={path: str(type(leaf)) for path, leaf in leaves.statefuls.items()},
        common=_hash_common(leaves.arrays, arrays, documents) if jax.process_count() > 1 else {},
    )


def _check_storable(path: str, x: Any, *, where: str) -> None:
    if not isinstance(x, jax.Array | np.ndarray | np.generic):
        raise TypeError(f"{where}: the leaf {path} is a {type(x).__name__}. Expected an array with values.")
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        raise TypeError(
            f"{where}: the leaf {path} is a PRNG key of type {x.dtype}. Expected its words: "
            "jax.random.key_data(key)."
        )
    if x.dtype.name not in STORABLE_DTYPES:
        raise TypeError(
            f"{where}: the leaf {path} has dtype {x.dtype.name}. Expected one of "
            f"{', '.join(STORABLE_DTYPES)}."
        )


def _as_json(path: str, leaf: Stateful, *, where: str) -> str:
    state = leaf.get_state()
    try:
        text = json.dumps(state, allow_nan=False)
    except (TypeError, ValueError) as e:
        raise TypeError(
            f"{where}: the state of {path} ({type(leaf).__name__}) cannot be written as JSON: {e}. Expected "
            "get_state() to return dicts, lists, strings, finite numbers, booleans and None."
        ) from e
    if json.loads(text) != state:
        raise TypeError(
            f"{where}: the state of {path} ({type(leaf).__name__}) does not read back from JSON as it was: "
            f"{text[:200]}. Expected keys that are strings, and lists rather than tuples."
        )
    return text


def _hash_common(
    leaves: Mapping[str, Any], arrays: Mapping[str, ArraySnapshot], documents: Mapping[str, str]
) -> dict[str, str]:
    """Hashes of what every process says or has for itself; of the other arrays, of their descriptions."""
    described = [(path, a.shape, a.dtype.name, a.chunk_shape) for path, a in sorted(arrays.items())]
    texts = {"the list of arrays": repr(described).encode("utf-8")}
    texts.update((path, text.encode("utf-8")) for path, text in documents.items())
    texts.update((path, np.asarray(x).tobytes()) for path, x in leaves.items() if is_everywhere(x))
    return {path: hashlib.sha256(text).hexdigest()[:16] for path, text in texts.items()}


def _copy_array(path: str, x: Any) -> ArraySnapshot:
    if not isinstance(x, jax.Array):
        value = np.array(x, copy=True, order="C")
        shards: tuple[Shard, ...] = (Shard(start=(0,) * value.ndim, value=value),)
        shards = shards if jax.process_index() == 0 else ()
        shard_shape: tuple[int, ...] = value.shape
    else:
        shards = tuple(
            Shard(start=tuple(s.start or 0 for s in shard.index), value=_to_host(shard.data))
            for shard in own_shards(path, x)
        )
        shard_shape = x.sharding.shard_shape(x.shape)
    dtype = np.dtype(x.dtype)
    return ArraySnapshot(
        shape=tuple(x.shape),
        dtype=dtype,
        chunk_shape=chunk_shape_for(shard_shape, itemsize=dtype.itemsize),
        shards=shards,
    )


def _to_host(x: jax.Array) -> np.ndarray:
    """The values of an array on one device, in memory that is not the device's."""
    (device,) = x.devices()
    is_in_host_memory = device.platform == "cpu" or "host" in (x.sharding.memory_kind or "")
    value = np.asarray(x)
    # What numpy shows of an array in host memory is the buffer itself, which the next step may overwrite.
    return np.array(value, copy=True, order="C") if is_in_host_memory else value


def chunk_shape_for(
    shard_shape: tuple[int, ...], *, itemsize: int, max_bytes: int = _MAX_CHUNK_BYTES
) -> tuple[int, ...]:
    """The shape of the pieces in which shards are stored.

    Args:
        shard_shape: The shape of a shard.
        itemsize: Bytes per element.
        max_bytes: What a piece should not exceed; it does where dimensions are large primes.

    Returns:
        The shard's own shape, or one that divides it; at least 1 everywhere.
    """
    shape = [max(1, size) for size in shard_shape]
    for dim in range(len(shape)):
        while shape[dim] > 1 and math.prod(shape) * itemsize > max_bytes:
            shape[dim] //= _smallest_factor(shape[dim])
    return tuple(shape)


def _smallest_factor(n: int) -> int:
    return next((i for i in range(2, math.isqrt(n) + 1) if n % i == 0), n)
