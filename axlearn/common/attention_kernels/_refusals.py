"""Reasons for which several kernels refuse an attention. Each is None where there is nothing to refuse."""

import concurrent.futures
import functools
import itertools
from collections.abc import Callable
from typing import Optional, TypeVar

import jax.numpy as jnp
import numpy as np

from axlearn.common.attention_kernels._masks import allowed_pairs
from axlearn.common.attention_kernels._task import AttentionTask

T = TypeVar("T")

# How many pairs of a query and a key the host looks at, where a mask is no window, before it takes too long: some
# 4 s at 32768 squared (one core).
_MAX_HOST_PAIRS = 2**30
# Rows of such a mask that are looked at at a time.
_ROWS = 256


def first_of(*reasons: Optional[str]) -> Optional[str]:
    """The first reason that there is."""
    return next((reason for reason in reasons if reason is not None), None)


def no_plain_maths(task: AttentionTask) -> Optional[str]:
    """What only the layer's own maths does."""
    if task.dropout_rate > 0:
        return f"has no dropout, and the rate is {task.dropout_rate}"
    if task.need_probs:
        return "does not have the probabilities that are asked for"
    if not task.is_placed:
        return "needs mha_dim_to_partition_spec on a mesh of several devices"
    return None


def no_fused_kernel(task: AttentionTask) -> Optional[str]:
    """What no fused kernel of one device does."""
    is_split = task.num_source_shards > 1
    return first_of(no_plain_maths(task), "needs all keys of a sequence on each device" if is_split else None)


def no_logit_cap(task: AttentionTask) -> Optional[str]:
    """For kernels that cannot cap logits."""
    return f"has no soft cap, and atten_logit_cap is {task.logit_cap}" if task.logit_cap is not None else None


def no_sink(task: AttentionTask) -> Optional[str]:
    """For kernels that have no sinks."""
    return "has no sinks" if task.has_sink else None


def no_explicit_bias(task: AttentionTask) -> Optional[str]:
    """For kernels that take no array of biases."""
    return f"takes no array of biases, as needed for {', '.join(task.explicit)}" if task.explicit else None


def no_float_dtype(task: AttentionTask, *, dtypes: tuple[str, ...]) -> Optional[str]:
    """For kernels of certain dtypes."""
    name = np.dtype(task.dtype).name
    return None if name in dtypes else f"computes in {' or '.join(dtypes)}, not in {name}"


def no_empty_rows(task: AttentionTask) -> Optional[str]:
    """For kernels whose result means nothing for a query that sees no key.

    The layer's own maths averages all values then. A window of a query's own index cannot be empty, nor can a
    segment which has the query's own key in it; what else there is, is looked at.
    """
    is_self_attention = task.total_target_len == task.total_source_len
    if task.has_segment_ids and not (is_self_attention and task.is_self_segmented):
        return "needs segment ids that are the same for queries and keys, so that every query sees a key"
    if not task.mask_fns and (is_self_attention or task.window.is_full):
        return None
    if is_self_attention and on_host(_sees_own_key, task):
        return None
    if task.has_segment_ids:
        return "needs masks in which every query sees its own key"
    reason = no_large_mask(task)
    if reason is None and not on_host(_sees_any_key, task):
        return "needs masks in which every query sees any key"
    return reason


def no_large_mask(task: AttentionTask) -> Optional[str]:
    """For who has to look at every pair of a query and a key, on the host, where a mask is no window."""
    if task.mask_fns and task.total_target_len * task.total_source_len > _MAX_HOST_PAIRS:
        pairs = f"{task.total_target_len} x {task.total_source_len}"
        return f"needs a mask that is a window of indices where there are {pairs} pairs"
    return None


@functools.lru_cache(maxsize=64)
def _sees_any_key(task: AttentionTask) -> bool:
    sources = np.arange(task.total_source_len, dtype=np.int32)[None, :]
    for start in range(0, task.total_target_len, _ROWS):
        targets = np.arange(start, min(start + _ROWS, task.total_target_len), dtype=np.int32)[:, None]
        if not mask_of(task, targets, sources).any(axis=1).all():
            return False
    return True


@functools.lru_cache(maxsize=64)
def _sees_own_key(task: AttentionTask) -> bool:
    positions = np.arange(task.total_source_len, dtype=np.int32)
    return bool(mask_of(task, positions, positions).all())


def on_host(fn: Callable[[AttentionTask], T], task: AttentionTask) -> T:
    """Calls a function that computes with arrays, on this process's own devices and at once.

    Who asks is in the middle of a trace, within a mesh that may be of devices which are not there, and perhaps within
    `shard_map`. Another thread is not.
    """
    with concurrent.futures.ThreadPoolExecutor(max_workers=1) as executor:
        return executor.submit(fn, task).result()


def mask_of(task: AttentionTask, targets: np.ndarray, sources: np.ndarray) -> np.ndarray:
    """Which pairs of indices the masks of a task allow, segments aside; to be called `on_host`.

    Args:
        task: The task.
        targets: Indices of queries.
        sources: Indices of keys, which broadcast against them.

    Returns:
        True where all masks allow the pair.
    """
    return np.asarray(allowed_pairs(task, jnp.asarray(targets), jnp.asarray(sources)))


def largest_block(length: int, *, limit: int, unit: int) -> Optional[int]:
    """The largest multiple of `unit` within `limit` that divides `length`.

    Args:
        length: Length of a sequence.
        limit: Largest block.
        unit: What the block must be a multiple of.

    Returns:
        The block, or None if there is none.
    """
    candidates = itertools.takewhile(lambda block: block > 0, itertools.count(limit // unit * unit, -unit))
    return next((block for block in candidates if length % block == 0), None)


def no_block(task: AttentionTask, *, limit: int, unit: int) -> Optional[str]:
    """For kernels that work through sequences in equal blocks."""
    for what, length in (("queries", task.target_len), ("keys", task.source_len)):
        if largest_block(length, limit=limit, unit=unit) is None:
            return f"needs a multiple of {unit} {what}, and there are {length} on a device"
    return None
