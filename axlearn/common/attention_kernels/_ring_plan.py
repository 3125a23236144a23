"""Where the positions of a sequence are on a ring of devices, in blocks, and which blocks have to do with which."""

import dataclasses
import functools
import math
import operator
from typing import Any, Optional

import jax
import jax.numpy as jnp
import numpy as np

from axlearn.common.attention_kernels._masks import allowed_pairs
from axlearn.common.attention_kernels._refusals import largest_block
from axlearn.common.attention_kernels._task import AttentionTask
from axlearn.common.sequence_order import head_tail_indices

# Blocks of a sequence that is longer than the largest block are a multiple of this, the width of a TPU's vector
# registers.
_UNIT = 128


def _block(task: AttentionTask, length: int) -> Optional[int]:
    """The largest block that cuts the positions on a device, and each of the chunks, into equal ones; None if none."""
    total = length * task.num_source_shards
    if total % task.num_chunks:
        return None
    length, limit = math.gcd(length, total // task.num_chunks), task.tpu_block_size
    return length if length <= limit else largest_block(length, limit=limit, unit=min(limit, _UNIT))


@dataclasses.dataclass(frozen=True)
class RingPlan:
    """A task's blocks. Every block lies in the order of the text; starts are indices in the text.

    Attributes:
        task: The task.
        target_block: Number of queries in a block.
        source_block: Number of keys in a block.
    """

    task: AttentionTask
    target_block: int
    source_block: int

    @property
    def num_devices(self) -> int:
        """Number of devices on the ring."""
        return self.task.num_source_shards

    @functools.cached_property
    def target_starts(self) -> np.ndarray:
        """The index of the first query of each block, `[devices, blocks]`."""
        return self._starts(self.task.total_target_len, block=self.target_block)

    @functools.cached_property
    def source_starts(self) -> np.ndarray:
        """The index of the first key of each block, `[devices, blocks]`."""
        return self._starts(self.task.total_source_len, block=self.source_block)

    def _starts(self, length: int, *, block: int) -> np.ndarray:
        indices = head_tail_indices(length, num_chunks=self.task.num_chunks)
        return indices[::block].reshape(self.num_devices, -1)

    @functools.cached_property
    def num_steps(self) -> int:
        """After how many steps every query has met every key that its window lets it see.

        In step i a device has the keys of the one that is i places before it.
        """
        if self.task.window.is_full:
            return self.num_devices
        targets, sources = self.target_starts, self.source_starts
        useful = [
            step
            for step in range(self.num_devices)
            if self.in_window(targets[:, :, None], np.roll(sources, step, axis=0)[:, None, :]).any()
        ]
        return 1 + max(useful, default=0)

    def in_window(self, target_start: Any, source_start: Any) -> Any:
        """Whether the window, which is not full, lets any query of a block see any key of another.

        Args:
            target_start: The index of the first query; an array of numpy's or jax's.
            source_start: The index of the first key, likewise.

        Returns:
            The answers, elementwise.
        """
        left, right = self.task.window
        answers = []
        if left is not None:
            answers.append(source_start + self.source_block - 1 >= target_start - left)
        if right is not None:
            answers.append(source_start <= target_start + self.target_block - 1 + right)
        return functools.reduce(operator.and_, answers)

    def mask(
        self,
        target_start: jax.Array,
        source_start: jax.Array,
        *,
        target_ids: Optional[jax.Array],
        source_ids: Optional[jax.Array],
    ) -> Optional[jax.Array]:
        """Which queries of a block see which keys of another.

        Args:
            target_start: The index of the first query.
            source_start: The index of the first key.
            target_ids: The segments of the queries `[batch, target]`. None: one segment.
            source_ids: The segments of the keys `[batch, source]`.

        Returns:
            The mask `[batch or 1, target, source]`. None: every query sees every key.
        """
        mask = None
        if not self.task.window.is_full or self.task.mask_fns:
            targets = target_start + jnp.arange(self.target_block, dtype=jnp.int32)
            sources = source_start + jnp.arange(self.source_block, dtype=jnp.int32)
            mask = allowed_pairs(self.task, targets[:, None], sources[None, :])[None]
        if target_ids is not None and source_ids is not None:
            same = target_ids[:, :, None] == source_ids[:, None, :]
            mask = same if mask is None else same & mask
        return mask


def make_plan(task: AttentionTask) -> Optional[RingPlan]:
    """The plan of a task; None where its sequences cannot be cut into equal blocks."""
    target_block, source_block = _block(task, task.target_len), _block(task, task.source_len)
    if target_block is None or source_block is None:
        return None
    return RingPlan(task, target_block=target_block, source_block=source_block)
