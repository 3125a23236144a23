"""What the stages of a pipeline leave behind for each micro-batch, put together for the batch."""

import functools
from typing import Any, Optional

import jax
import jax.numpy as jnp

from axlearn.common.module import OutputCollection, current_context
from axlearn.common.summary import Summary, is_summary
from axlearn.common.utils import Tensor, prune_empty


def add_outputs(outputs: OutputCollection, *, name: str, num_stages: int, num_microbatches: int) -> None:
    """Adds what stages left behind to the outputs of the current context.

    Summaries of stage `i` appear below `<name><i>`: those that know how are accumulated over micro-batches, plain
    numbers are averaged. State updates appear below `<name>`, stacked over stages: floats are averaged over
    micro-batches, of others the last micro-batch's count. Module outputs appear below `<name>` as they are.

    Args:
        outputs: Trees of arrays [num_stages, num_microbatches, ...].
        name: The name of the stage's layer.
        num_stages: The number of stages.
        num_microbatches: The number of micro-batches.
    """
    context = current_context()
    assert context is not None, "A pipeline runs in a context."
    collection = context.output_collection
    collection.add_child(name)
    collection.state_updates[name] = jax.tree.map(_last_state, outputs.state_updates)
    collection.module_outputs[name] = outputs.module_outputs
    del collection.summaries[name]
    summaries = prune_empty(outputs.summaries)
    for i in range(num_stages if summaries else 0):
        of_stage = jax.tree.map(lambda x, i=i: x[i], summaries)
        combined = jax.tree.map(
            functools.partial(_combine, num_microbatches=num_microbatches), of_stage, is_leaf=is_summary
        )
        context.add_summary(f"{name}{i}", combined)


def _combine(stacked: Any, *, num_microbatches: int) -> Any:
    """One summary out of those of all micro-batches, stacked."""
    if not is_summary(stacked):
        return _mean(stacked, axis=0)
    first, others = (jax.tree.map(lambda x, cut=cut: x[cut], stacked) for cut in (0, slice(1, None)))
    if num_microbatches == 1:
        return first

    def add(so_far: Summary, new: Summary) -> tuple[Summary, None]:
        total = so_far.accumulate(new)
        return jax.tree.map(lambda x, old: x.astype(old.dtype), total, so_far), None

    return jax.lax.scan(add, first, others)[0]


def _last_state(stacked: Tensor) -> Tensor:
    """The new state of each stage out of those after each micro-batch, [num_stages, num_microbatches, ...]."""
    if jnp.issubdtype(stacked.dtype, jnp.floating):
        return _mean(stacked, axis=1).astype(stacked.dtype)
    return stacked[:, -1]


def _mean(x: Tensor, *, axis: int) -> Tensor:
    dtype: Optional[Any] = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.mean(x.astype(dtype), axis=axis)
