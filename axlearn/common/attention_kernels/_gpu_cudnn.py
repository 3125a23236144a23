"""cuDNN's flash attention, through `jax.nn.dot_product_attention`."""

import functools
import operator
from typing import Any, Literal, Optional

import jax
import jax.numpy as jnp

from axlearn.common.attention_bias import BoolAttentionBias
from axlearn.common.attention_kernels._refusals import (
    first_of,
    no_empty_rows,
    no_explicit_bias,
    no_float_dtype,
    no_fused_kernel,
    no_logit_cap,
    no_sink,
)
from axlearn.common.attention_kernels._residuals import with_named_residuals
from axlearn.common.attention_kernels._task import AttentionArrays, AttentionTask

# cuDNN's limits before Hopper, as jax checks them; Hopper takes heads of 256.
_MAX_PER_HEAD_DIM = 128
_HEAD_UNIT = 8


def refusal(task: AttentionTask) -> Optional[str]:
    """Why cuDNN without an array of biases cannot compute an attention. None: it can."""
    return first_of(
        _shared_refusal(task),
        no_explicit_bias(task),
        _no_mask(task),
        no_empty_rows(task),
    )


def bias_refusal(task: AttentionTask) -> Optional[str]:
    """Why cuDNN with an array of biases cannot compute an attention. None: it can."""
    has_mask = task.explicit or task.has_segment_ids or task.mask_fns or not task.window.is_full
    return first_of(_shared_refusal(task), None if has_mask else "has nothing to make an array from")


def _shared_refusal(task: AttentionTask) -> Optional[str]:
    return first_of(
        "is no kernel that can be interpreted" if task.interpret else None,
        no_fused_kernel(task),
        no_logit_cap(task),
        no_sink(task),
        no_float_dtype(task, dtypes=("bfloat16", "float16")),
        _no_shape(task),
    )


def _no_shape(task: AttentionTask) -> Optional[str]:
    if task.per_head_dim % _HEAD_UNIT or task.per_head_dim > _MAX_PER_HEAD_DIM:
        sizes = f"a multiple of {_HEAD_UNIT} up to {_MAX_PER_HEAD_DIM}"
        return f"needs heads of {sizes}, not of {task.per_head_dim}"
    if task.target_len % 2 or task.source_len % 2:
        lengths = f"{task.target_len} queries and {task.source_len} keys"
        return f"needs even numbers, and there are {lengths} on a device"
    return None


def _no_mask(task: AttentionTask) -> Optional[str]:
    if task.has_segment_ids:
        return "knows segments only as an array of biases"
    if task.mask_fns or not (task.window.is_full or task.window.right == 0):
        return "has no masks but the causal one and windows that end at the query"
    if not task.window.is_full and task.num_chunks > 1:
        return "counts positions in the order in which they lie, which is not that of the text"
    if not task.window.is_full and task.num_target_shards > 1:
        return (
            "counts positions from the first query on a device, which is another one where queries are split"
        )
    return None


def attend(task: AttentionTask, arrays: AttentionArrays) -> jax.Array:
    """Attends by cuDNN with the masks that it has itself.

    Args:
        task: What is known; `refusal(task)` is None.
        arrays: The arrays.

    Returns:
        The context `[batch, target, heads, per_head_dim]`.
    """
    return _attend(task, arrays, implementation="cudnn", **mask_arguments(task))


def attend_with_bias(task: AttentionTask, arrays: AttentionArrays) -> jax.Array:
    """Attends by cuDNN with everything that is added to the logits as arrays.

    See `attend`. cuDNN adds biases in the dtype of the queries: far-away keys of ALiBi get theirs with the few bits
    of bfloat16.
    """
    return _attend(task, arrays, implementation="cudnn", **bias_arguments(task, arrays))


def mask_arguments(task: AttentionTask) -> dict[str, Any]:
    """The arguments of `jax.nn.dot_product_attention` for the window of a task."""
    if task.window.is_full:
        return {}
    left = task.window.left
    return {"is_causal": True, "local_window_size": None if left is None else (left, 0)}


def bias_arguments(task: AttentionTask, arrays: AttentionArrays) -> dict[str, Any]:
    """The arguments of `jax.nn.dot_product_attention` for whatever is added to the logits."""

    def spread(x: jax.Array) -> jax.Array:
        """cuDNN wants the lengths as they are; batch and heads may be 1."""
        return jnp.broadcast_to(x, (*x.shape[:2], task.target_len, task.source_len))

    leaves = arrays.bias.leaves()
    masks = [leaf.bool_value() for leaf in leaves if isinstance(leaf, BoolAttentionBias)]
    biases = [leaf.astype(jnp.float32).value() for leaf in leaves if not isinstance(leaf, BoolAttentionBias)]
    arguments: dict[str, Any] = {}
    if masks:
        arguments["mask"] = spread(functools.reduce(operator.and_, masks))
    present = [bias for bias in biases if bias is not None]
    if present:
        arguments["bias"] = spread(functools.reduce(operator.add, present).astype(arrays.query.dtype))
    return arguments


def _attend(
    task: AttentionTask, arrays: AttentionArrays, *, implementation: Literal["xla", "cudnn"], **kwargs: Any
) -> jax.Array:
    def run(query: jax.Array, key: jax.Array, value: jax.Array, biases: dict[str, Any]) -> jax.Array:
        return jax.nn.dot_product_attention(
            query, key, value, scale=1.0, implementation=implementation, **static, **biases
        )

    biases = {name: x for name, x in kwargs.items() if isinstance(x, jax.Array)}
    static = {name: x for name, x in kwargs.items() if name not in biases}
    named = with_named_residuals(run, name=task.residual_name)
    return named(arrays.query, arrays.key, arrays.value, biases)
