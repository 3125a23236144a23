"""Key heads for kernels that want one for each query head."""

import jax
import jax.numpy as jnp

from axlearn.common.attention_kernels._task import AttentionTask


def repeat_kv_heads(key: jax.Array, value: jax.Array, *, task: AttentionTask) -> tuple[jax.Array, jax.Array]:
    """Repeats each head of keys and values for the query heads that share it.

    Args:
        key: `[batch, source, kv_heads, per_head_dim]`.
        value: Likewise.
        task: Says how many query heads there are.

    Returns:
        Keys and values with as many heads as the queries; as they are where there is nothing to repeat.
    """
    num_repeats = task.num_heads // task.num_kv_heads
    if num_repeats == 1:
        return key, value
    return jnp.repeat(key, num_repeats, axis=2), jnp.repeat(value, num_repeats, axis=2)
