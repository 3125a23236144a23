"""The older flash attention for TPU: it takes biases as an array, which splash attention does not."""

import contextlib
import functools
from typing import Any, Optional

import jax
import jax.numpy as jnp

from axlearn.common.attention_bias import BaseAttentionBias
from axlearn.common.attention_kernels._refusals import (
    first_of,
    largest_block,
    no_block,
    no_empty_rows,
    no_fused_kernel,
    no_logit_cap,
    no_sink,
)
from axlearn.common.attention_kernels._repeat import repeat_kv_heads
from axlearn.common.attention_kernels._residuals import with_named_residuals
from axlearn.common.attention_kernels._task import AttentionArrays, AttentionTask

# The width of a TPU's vector registers, which blocks are a multiple of; and heads, where they are larger.
_LANES = 128


def _library() -> Any:
    """The kernel; it takes a second to load, which only a TPU needs (two cores)."""
    from jax.experimental.pallas.ops.tpu import flash_attention

    return flash_attention


def _interpreter(task: AttentionTask) -> contextlib.AbstractContextManager[Any]:
    """What makes the kernel run without a TPU: it has no argument for that."""
    if not task.interpret:
        return contextlib.nullcontext()
    from jax.experimental.pallas import tpu as pltpu

    # Plain interpretation, and not by InterpretParams: those simulate the memory of the chip through callbacks.
    return pltpu.force_tpu_interpret_mode(True)  # type: ignore[arg-type]


def refusal(task: AttentionTask) -> Optional[str]:
    """Why this kernel cannot compute an attention. None: it can."""
    return first_of(
        no_fused_kernel(task),
        no_logit_cap(task),
        no_sink(task),
        no_block(task, limit=task.tpu_block_size, unit=_LANES),
        _no_head(task),
        # As an array, masks mean what they mean in the layer's own maths, also where a query sees nothing.
        None if _needs_array(task) else no_empty_rows(task),
    )


def _no_head(task: AttentionTask) -> Optional[str]:
    if task.per_head_dim > _LANES and task.per_head_dim % _LANES:
        return f"needs heads of a multiple of {_LANES} where they are larger, not of {task.per_head_dim}"
    return None


def _needs_array(task: AttentionTask) -> bool:
    """Whether the mask is more than segments and the kernel's own causal mask, which counts what lies on the device."""
    is_in_order = task.num_target_shards == 1 and task.num_chunks == 1
    is_own_mask = task.window.is_full or (task.window.is_causal and is_in_order)
    return bool(task.explicit) or bool(task.mask_fns) or not is_own_mask


def attend(task: AttentionTask, arrays: AttentionArrays) -> jax.Array:
    """Attends.

    Args:
        task: What is known; `refusal(task)` is None.
        arrays: The arrays.

    Returns:
        The context `[batch, target, heads, per_head_dim]`.
    """
    kernel_lib = _library()
    query, key, value = (
        x.swapaxes(1, 2) for x in (arrays.query, *repeat_kv_heads(arrays.key, arrays.value, task=task))
    )
    bias, segment_ids = None, None
    if _needs_array(task):
        shape = (*query.shape[:3], task.source_len)
        bias = jnp.broadcast_to(_array_of(arrays.bias), shape)
    elif arrays.target_segment_ids is not None:
        segment_ids = kernel_lib.SegmentIds(q=arrays.target_segment_ids, kv=arrays.source_segment_ids)

    def run(query: jax.Array, key: jax.Array, value: jax.Array, bias: Any, segment_ids: Any) -> jax.Array:
        return kernel_lib.flash_attention(
            query,
            key,
            value,
            bias,
            segment_ids,
            causal=bias is None and task.window.is_causal,
            block_sizes=_block_sizes(task),
        )

    named = with_named_residuals(run, name=task.residual_name, context=functools.partial(_interpreter, task))
    return named(query, key, value, bias, segment_ids).swapaxes(1, 2)


def _array_of(bias: BaseAttentionBias) -> jax.Array:
    value = bias.astype(jnp.float32).value()
    assert value is not None, "A task has masks, and its arrays have none."
    return value


def _block_sizes(task: AttentionTask) -> Any:
    block_q = largest_block(task.target_len, limit=task.tpu_block_size, unit=_LANES)
    block_k = largest_block(task.source_len, limit=task.tpu_block_size, unit=_LANES)
    return _library().BlockSizes(
        block_q=block_q,
        block_k_major=block_k,
        block_k=block_k,
        block_b=1,
        block_q_major_dkv=block_q,
        block_k_major_dkv=block_k,
        block_k_dkv=block_k,
        block_q_dkv=block_q,
        block_k_major_dq=block_k,
        block_k_dq=block_k,
        block_q_dq=block_q,
    )
