"""Loss terms of a sequence in chunks of positions, so that the logits of a whole batch never exist.

Three things make a loop over chunks cost no more between devices than one pass over all logits does:

- Each device goes through the positions that it has, a part of them at a time: no hidden state moves.
- The head's table is placed on the mesh before the loop, not in each turn of it.
- The table's gradient is summed up over chunks on each device, and over devices once, behind the loop. Left to XLA's
  partitioner, whose arrays cannot be partial sums, that is an all-reduce of a whole table in each turn.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Optional

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from axlearn.common.jax_compat import auto_axes_of
from axlearn.common.loss import TokenLosses
from axlearn.common.utils import Tensor, applicable_spec, current_mesh

# (table [vocab, dim], hidden states [batch, chunk_len, dim], labels [batch, chunk_len]) -> terms [batch, chunk_len].
LossesFn = Callable[[Tensor, Tensor, Tensor], TokenLosses]


def losses_in_chunks(
    losses_fn: LossesFn,
    *,
    table: Tensor,
    hidden_states: Tensor,
    target_labels: Tensor,
    chunk_len: int,
    partition_spec: Optional[Sequence[Any]],
) -> TokenLosses:
    """Computes the loss terms of all positions, a chunk at a time, and again in the backward pass.

    Args:
        losses_fn: The terms of a chunk. Inside of it, the axes of `partition_spec` are manual.
        table: [vocab, dim], as the products need it.
        hidden_states: [batch, seq_len, dim].
        target_labels: [batch, seq_len].
        chunk_len: Positions of a row that all devices together work on at a time; divides seq_len. Where the devices
            of a row do not divide it, fewer positions.
        partition_spec: How [batch, seq_len] lie on the mesh; None: as the compiler likes.

    Returns:
        The terms [batch, seq_len].
    """
    num_chunks = target_labels.shape[1] // chunk_len
    spec = applicable_spec(partition_spec, shape=target_labels.shape) or PartitionSpec()
    body = functools.partial(_losses_of_device, losses_fn, num_chunks=num_chunks)
    axes = _axes_of(spec)
    if axes:
        mesh = current_mesh()
        assert mesh is not None, "a spec that applies has a mesh"
        body = jax.shard_map(
            body,
            mesh=mesh,
            axis_names=axes,
            in_specs=(PartitionSpec(), spec, spec),
            out_specs=spec,
            check_vma=False,
        )
    return body(table, hidden_states, target_labels)


def _axes_of(spec: PartitionSpec) -> set[str]:
    """The axes of a spec; all of the mesh where the others have one device, which spares the partitioner work."""
    entries = [(entry,) if isinstance(entry, str) else entry or () for entry in spec]
    sizes = auto_axes_of(current_mesh())
    axes = {axis for entry in entries for axis in entry}
    if math.prod(sizes[axis] for axis in axes) == 1:
        return set()
    others = set(sizes) - axes
    return set(sizes) if math.prod(sizes[axis] for axis in others) == 1 else axes


def _losses_of_device(
    losses_fn: LossesFn, table: Tensor, hidden_states: Tensor, target_labels: Tensor, *, num_chunks: int
) -> TokenLosses:
    """Goes through the positions that a device has, in at least `num_chunks` chunks of equal length."""
    batch_size, seq_len = target_labels.shape
    num_chunks = next(n for n in range(min(num_chunks, seq_len), seq_len + 1) if seq_len % n == 0)
    table, sums = jax.lax.stop_gradient(table), _gradient_of(table)

    # In a loop nothing can undo the recomputation, which `prevent_cse` would only make dearer.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def chunk_losses(chunk: tuple[Tensor, Tensor]) -> TokenLosses:
        return losses_fn(_with_gradient_in(table, sums), *chunk)

    def split(x: Tensor) -> Tensor:
        return jnp.moveaxis(x.reshape(batch_size, num_chunks, -1, *x.shape[2:]), 1, 0)

    terms = jax.lax.map(chunk_losses, (split(hidden_states), split(target_labels)))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(batch_size, seq_len), terms)


# A loop sums gradients up in the type of the values. Many chunks of a table in bfloat16 would be summed up in that,
# where one product over all positions does so in float32. So the gradient goes its own way, by zeros that are never
# made.


@jax.custom_vjp
def _gradient_of(x: Tensor) -> Tensor:
    """Zeros in at least float32 whose gradient is that of `x`."""
    return jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32))


def _gradient_of_fwd(x: Tensor) -> tuple[Tensor, Tensor]:
    return _gradient_of(x), jnp.zeros([], x.dtype)


def _gradient_of_bwd(like: Tensor, gradient: Tensor) -> tuple[Tensor]:
    return (gradient.astype(like.dtype),)


_gradient_of.defvjp(_gradient_of_fwd, _gradient_of_bwd)


@jax.custom_vjp
def _with_gradient_in(x: Tensor, sums: Tensor) -> Tensor:
    """`x`, whose gradient goes to `sums` in the type of these."""
    del sums
    return x


def _with_gradient_in_fwd(x: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    return x, jnp.zeros([], sums.dtype)


def _with_gradient_in_bwd(like: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    return jnp.zeros_like(gradient), gradient.astype(like.dtype)


_with_gradient_in.defvjp(_with_gradient_in_fwd, _with_gradient_in_bwd)
