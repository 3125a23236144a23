"""Which process writes which part of an array."""

import math
import zlib
from typing import Any

import jax


def is_everywhere(x: Any) -> bool:
    """Whether every process has all of an array for itself, so that process 0 writes it."""
    return not isinstance(x, jax.Array) or x.is_fully_addressable


def own_shards(path: str, x: jax.Array) -> list[Any]:
    """The shards of an array that this process writes; over all processes, one copy of each part.

    Where there are several copies, as in data parallelism, it depends on the path which of them is written, so that
    the processes that hold copies of one model share the work.

    Args:
        path: The path of the array, the same on all processes.
        x: The array.

    Returns:
        Some of `x.addressable_shards`, maybe none.
    """
    copy = 0
    if not is_everywhere(x):
        copy = zlib.crc32(path.encode("utf-8")) % _num_copies(x)
    elif jax.process_index() != 0:
        return []
    return [shard for shard in x.addressable_shards if shard.replica_id == copy]


def _num_copies(x: jax.Array) -> int:
    """How many devices hold each part of an array."""
    sizes = zip(x.shape, x.sharding.shard_shape(x.shape), strict=True)
    num_parts = math.prod(size // part if part else 1 for size, part in sizes)
    return len(x.sharding.device_set) // num_parts
