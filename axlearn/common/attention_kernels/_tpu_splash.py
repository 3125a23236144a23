"""Splash attention: a Pallas kernel for TPU that skips what is masked."""

import dataclasses
import functools
from typing import Any, Optional

import jax
import numpy as np
from jax import lax

from axlearn.common.attention_kernels._refusals import (
    first_of,
    largest_block,
    mask_of,
    no_block,
    no_empty_rows,
    no_explicit_bias,
    no_fused_kernel,
    no_large_mask,
    on_host,
)
from axlearn.common.attention_kernels._residuals import with_named_residuals
from axlearn.common.attention_kernels._task import AttentionArrays, AttentionTask
from axlearn.common.sequence_order import head_tail_indices, to_text_order

# The width of a TPU's vector registers, which blocks are a multiple of.
LANES = 128

# The fields of splash attention's BlockSizes that `AttentionTask.splash_blocks` may set.
SPLASH_BLOCK_FIELDS = (
    "block_q",
    "block_kv",
    "block_kv_compute",
    "block_q_dkv",
    "block_kv_dkv",
    "block_kv_dkv_compute",
    "block_q_dq",
    "block_kv_dq",
    "use_fused_bwd_kernel",
)


def _library() -> tuple[Any, Any]:
    """Splash attention's kernel and masks; they take a second to load, which only a TPU needs (two cores)."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

    return splash_attention_kernel, splash_attention_mask


def refusal(task: AttentionTask) -> Optional[str]:
    """Why this kernel cannot compute an attention. None: it can."""
    return first_of(
        no_fused_kernel(task),
        no_explicit_bias(task),
        no_block(task, limit=task.tpu_block_size, unit=LANES),
        _no_override(task),
        no_empty_rows(task),
        no_large_mask(task),
    )


def _no_override(task: AttentionTask) -> Optional[str]:
    for name, size in task.splash_blocks:
        length = task.target_len if name.startswith("block_q") else task.source_len
        if name.startswith("block") and (size % LANES or length % size):
            return f"needs a {name} that is a multiple of {LANES} and divides {length}, not {size}"
    return None


def attend(task: AttentionTask, arrays: AttentionArrays) -> jax.Array:
    """Attends.

    Args:
        task: What is known; `refusal(task)` is None.
        arrays: The arrays.

    Returns:
        The context `[batch, target, heads, per_head_dim]`.
    """
    kernel_lib, _ = _library()
    kernel = _kernel_of_shard(on_host(_make_kernel, _kernel_key(task)), task, arrays.target_shard)
    arrays = _with_keys_in_order(arrays, num_chunks=task.num_chunks)
    segment_ids = None
    if arrays.target_segment_ids is not None:
        segment_ids = kernel_lib.SegmentIds(q=arrays.target_segment_ids, kv=arrays.source_segment_ids)

    def run(query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: Any, sink: Any) -> jax.Array:
        per_row = jax.vmap(
            lambda q, k, v, ids: kernel(q, k, v, segment_ids=ids, sinks=sink),
            in_axes=(0, 0, 0, None if segment_ids is None else 0),
        )
        return per_row(query, key, value, segment_ids)

    heads_first = [x.swapaxes(1, 2) for x in (arrays.query, arrays.key, arrays.value)]
    named = with_named_residuals(run, name=task.residual_name)
    return named(*heads_first, segment_ids, arrays.sink).swapaxes(1, 2).astype(arrays.value.dtype)


def _with_keys_in_order(arrays: AttentionArrays, *, num_chunks: int) -> AttentionArrays:
    """Puts keys in the order of the text, which the kernel counts in; queries say their positions."""
    key, value, segment_ids = (
        None if x is None else to_text_order(x, num_chunks=num_chunks)
        for x in (arrays.key, arrays.value, arrays.source_segment_ids)
    )
    return arrays._replace(key=key, value=value, source_segment_ids=segment_ids)  # type: ignore[arg-type]


def _kernel_key(task: AttentionTask) -> AttentionTask:
    """The task without what does not make a different kernel, for the cache."""
    return dataclasses.replace(
        task, dtype=None, has_segment_ids=False, has_sink=False, num_kv_heads=1, residual_name=""
    )


@functools.lru_cache(maxsize=64)
def _make_kernel(task: AttentionTask) -> Any:
    """The kernel for all shards of the queries, with arrays of the host: which blocks it works through."""
    kernel_lib, _ = _library()
    kernel = kernel_lib.make_splash_mha(
        _make_mask(task),
        block_sizes=kernel_lib.BlockSizes(**_block_sizes(task)),
        head_shards=1,
        q_seq_shards=task.num_target_shards,
        attn_logits_soft_cap=task.logit_cap,
        interpret=task.interpret,
    )
    return jax.tree.map(np.asarray, kernel)


def _block_sizes(task: AttentionTask) -> dict[str, Any]:
    block_q = largest_block(task.target_len, limit=task.tpu_block_size, unit=LANES)
    block_kv = largest_block(task.source_len, limit=task.tpu_block_size, unit=LANES)
    sizes: dict[str, Any] = {
        name: block_q if name.startswith("block_q") else block_kv for name in SPLASH_BLOCK_FIELDS[:-1]
    }
    sizes |= {"use_fused_bwd_kernel": False} | dict(task.splash_blocks)
    if sizes["use_fused_bwd_kernel"]:
        sizes |= {"block_q_dq": None, "block_kv_dq": None}
    return sizes


def _make_mask(task: AttentionTask) -> Any:
    """What every head sees, for the queries of all shards, as they lie; keys are in the order of the text."""
    _, mask_lib = _library()
    shape = (task.total_target_len, task.source_len)
    mask: Any
    if task.mask_fns:
        mask = _host_mask_class()(task)
    elif task.window.is_full:
        mask = mask_lib.FullMask(shape)
    elif task.window.is_causal:
        mask = mask_lib.CausalMask(shape)
    else:
        mask = mask_lib.LocalMask(shape, window_size=tuple(task.window), offset=0)
    if task.num_chunks > 1 and hasattr(mask, "q_sequence"):
        # What the kernel computes such a mask from, and what the host looks for masked blocks with.
        mask.q_sequence = head_tail_indices(task.total_target_len, num_chunks=task.num_chunks)
    return mask_lib.MultiHeadMask([mask] * task.num_heads)


@functools.cache
def _host_mask_class() -> type:
    """The class of masks of indices that the kernel cannot compute: it loads those blocks that are mixed."""
    _, mask_lib = _library()

    class HostMask(mask_lib.Mask):  # type: ignore[name-defined,misc]
        """Any mask functions, looked at block by block on the host."""

        def __init__(self, task: AttentionTask):
            self._task = task
            self._targets = head_tail_indices(task.total_target_len, num_chunks=task.num_chunks)

        @property
        def shape(self) -> tuple[int, int]:
            return self._task.total_target_len, self._task.source_len

        def __getitem__(self, idx: tuple[slice, slice]) -> np.ndarray:
            targets = self._targets[idx[0]]
            sources = np.arange(*idx[1].indices(self.shape[1]), dtype=np.int32)
            return mask_of(self._task, targets[:, None], sources[None, :])

    return HostMask


def _kernel_of_shard(kernel: Any, task: AttentionTask, shard: Any) -> Any:
    """The kernel for one part of the queries: its part of every array that has their blocks as a dim."""
    if task.num_target_shards == 1:
        return kernel

    def part_of(x: Optional[np.ndarray], *, axis: int) -> Any:
        if x is None:
            return None
        size = x.shape[axis] // task.num_target_shards
        return lax.dynamic_slice_in_dim(np.asarray(x), shard * size, size, axis=axis)

    def shard_of(info: Any) -> Any:
        if info is None:
            return None
        # [heads or 1, blocks of queries, blocks of keys], and the indices of queries.
        blocks = {
            name: part_of(getattr(info, name), axis=1) for name in ("data_next", "mask_next", "block_mask")
        }
        return info._replace(**blocks, q_sequence=part_of(info.q_sequence, axis=0))

    infos = (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info)
    return type(kernel)(*(shard_of(info) for info in infos), **kernel.kwargs)
