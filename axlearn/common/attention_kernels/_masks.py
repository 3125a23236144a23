"""What the masks of a task allow."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from axlearn.common.attention_kernels._task import AttentionTask


def allowed_pairs(
    task: AttentionTask, targets: Int[Array, "..."], sources: Int[Array, "..."]
) -> Bool[Array, "..."]:
    """Which pairs of indices the masks of a task allow, segments aside.

    Args:
        task: The task.
        targets: Indices of queries.
        sources: Indices of keys, which broadcast against them.

    Returns:
        True where all masks allow the pair.
    """
    left, right = task.window
    allowed = jnp.ones(jnp.broadcast_shapes(targets.shape, sources.shape), dtype=bool)
    if left is not None:
        allowed &= targets - sources <= left
    if right is not None:
        allowed &= sources - targets <= right
    for mask_fn in task.mask_fns:
        allowed &= mask_fn(targets, sources)
    return allowed
