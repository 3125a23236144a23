"""Flash attention for GPU in Pallas: it knows segment ids, which cuDNN takes as a mask array only."""

import functools
import importlib.util
import math
from typing import Any, Optional

import jax

from axlearn.common.attention_kernels._refusals import (
    first_of,
    no_empty_rows,
    no_explicit_bias,
    no_float_dtype,
    no_fused_kernel,
    no_logit_cap,
    no_sink,
)
from axlearn.common.attention_kernels._repeat import repeat_kv_heads
from axlearn.common.attention_kernels._residuals import with_named_residuals
from axlearn.common.attention_kernels._task import AttentionArrays, AttentionTask

_MODULE = "jax.experimental.pallas.ops.gpu.attention"
# The smallest side of a matrix product in Triton.
_MIN_BLOCK = 16
# Blocks of the backward pass hold six matrices and not three: the kernel's own default is a quarter of its block.
_BACKWARD_FRACTION = 4
# Larger heads do not fit into a multiprocessor's registers (the kernel's own heuristics end there).
_MAX_PER_HEAD_DIM = 128


def _library() -> Any:
    """The kernel. Triton, which it is compiled by, loads with it."""
    return importlib.import_module(_MODULE)


@functools.cache
def _is_there() -> bool:
    """Whether this jax has the kernel: it says that it will be removed."""
    return importlib.util.find_spec(_MODULE) is not None


def refusal(task: AttentionTask) -> Optional[str]:
    """Why this kernel cannot compute an attention. None: it can."""
    return first_of(
        None if _is_there() else "is not part of this version of jax",
        # In float32 its products have the precision of TF32, whatever `jax_default_matmul_precision` says.
        None if task.interpret else no_float_dtype(task, dtypes=("bfloat16", "float16")),
        no_fused_kernel(task),
        no_logit_cap(task),
        no_sink(task),
        no_explicit_bias(task),
        _no_mask(task),
        no_empty_rows(task),
        _no_head(task),
        _no_block(task),
    )


def _no_mask(task: AttentionTask) -> Optional[str]:
    if task.mask_fns or not (task.window.is_full or task.window.is_causal):
        return "has no masks but the causal one and segment ids"
    if task.num_chunks > 1 and not task.window.is_full:
        return "needs positions in the order of the text where there is a mask"
    if task.num_target_shards > 1:
        return "needs all queries of a sequence on one device"
    if task.target_len != task.source_len and (task.has_segment_ids or task.window.is_causal):
        return "needs as many queries as keys where there is a mask"
    return None


def _no_head(task: AttentionTask) -> Optional[str]:
    if task.per_head_dim > _MAX_PER_HEAD_DIM:
        return f"needs heads of at most {_MAX_PER_HEAD_DIM}, not of {task.per_head_dim}"
    if task.per_head_dim < _MIN_BLOCK:
        return f"needs heads of at least {_MIN_BLOCK}, not of {task.per_head_dim}"
    return None


def _no_block(task: AttentionTask) -> Optional[str]:
    block = _block(task)
    if block < _MIN_BLOCK:
        lengths = f"{task.target_len} queries and {task.source_len} keys"
        return f"needs lengths that are multiples of {_MIN_BLOCK}, and there are {lengths}"
    return None


def _block(task: AttentionTask) -> int:
    """The largest power of 2 within the block size that divides both lengths."""
    common = math.gcd(task.target_len, task.source_len)
    return min(task.gpu_block_size, common & -common)


def attend(task: AttentionTask, arrays: AttentionArrays) -> jax.Array:
    """Attends.

    Args:
        task: What is known; `refusal(task)` is None.
        arrays: The arrays.

    Returns:
        The context `[batch, target, heads, per_head_dim]`.
    """
    kernel_lib = _library()
    block = _block(task)
    small = max(_MIN_BLOCK, block // _BACKWARD_FRACTION)
    block_sizes = kernel_lib.BlockSizes(
        block_q=block,
        block_k=block,
        block_q_dkv=small,
        block_kv_dkv=small,
        block_q_dq=small,
        block_kv_dq=small,
    )

    def run(
        query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: Optional[jax.Array]
    ) -> jax.Array:
        return kernel_lib.mha(
            query,
            key,
            value,
            segment_ids,
            1.0,
            task.window.is_causal,
            block_sizes,
            interpret=task.interpret,
        )

    key, value = repeat_kv_heads(arrays.key, arrays.value, task=task)
    named = with_named_residuals(run, name=task.residual_name)
    return named(arrays.query, key, value, arrays.target_segment_ids)
