"""The cache for attention that looks back over a window."""

from typing import Any, Optional

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from axlearn.common.config import REQUIRED, Required, config_class, error_message
from axlearn.common.kv_cache.base_kv_cache import UNWRITTEN_POSITION, BaseKVCache, KVCacheShape, KVState
from axlearn.common.utils import maybe_shard


class SlidingWindowKVCache(BaseKVCache):
    """Keeps the last `cached_kv_length` keys and values of each sequence, whatever its length.

    They lie in a ring: the slot of a token is its time modulo the length of the ring, and each slot knows the
    time of what is in it. A step sees the ring as it was, followed by its own keys and values; then the last
    of these replace the oldest in the ring. So a step of any length is exact, also one longer than the ring,
    and what a step needs is memory for the ring and for itself.

    A window of n (see `SlidingWindowAttentionBias`) looks n positions back, and its query is part of the step:
    a ring of n suffices.
    """

    @config_class
    class Config(BaseKVCache.Config):
        """Configures `SlidingWindowKVCache`."""

        # Number of past positions that are kept, at least 1: the sliding_window_size of the attention or more.
        cached_kv_length: Required[int] = REQUIRED

    def __init__(self, cfg: Config, *, parent: Optional[Any]):
        super().__init__(cfg, parent=parent)
        if cfg.cached_kv_length < 1:
            raise ValueError(
                error_message(
                    where=self.path(), what=f"cached_kv_length={cfg.cached_kv_length}", expected="at least 1"
                )
            )

    @property
    def num_past_positions(self) -> int:
        """See `BaseKVCache.num_past_positions`."""
        cfg: SlidingWindowKVCache.Config = self.config
        return cfg.cached_kv_length

    def init_states(self, shape: KVCacheShape) -> dict[str, Any]:
        """See `BaseKVCache.init_states`; the ring is no longer than `shape.kv_len`, all that can be filled."""
        ring_len = min(self.num_past_positions, shape.kv_len)
        stored_shape = (shape.batch_size, shape.num_kv_heads, shape.per_head_dim, ring_len)
        states = {name: self._shard(jnp.zeros(stored_shape, self.cache_dtype())) for name in ("key", "value")}
        positions = jnp.full([shape.batch_size, ring_len], UNWRITTEN_POSITION, jnp.int32)
        return {**states, "key_positions": self._shard_positions(positions)}

    def extend_step(
        self,
        cached_states: dict[str, Any],
        *,
        k_proj: Float[Array, "batch step kv_heads per_head_dim"],
        v_proj: Float[Array, "batch step kv_heads per_head_dim"],
        key_positions: Int[Array, "batch step"],
        live_step_len: Optional[Int[Array, "batch"]] = None,
    ) -> tuple[dict[str, Any], KVState]:
        """See `BaseKVCache.extend_step`."""
        batch_size, step_len = key_positions.shape
        ring_len = cached_states["key_positions"].shape[1]
        if live_step_len is None:
            live_step_len = jnp.full([batch_size], step_len, jnp.int32)
        index = jnp.arange(step_len, dtype=jnp.int32)[None]
        is_live = index < live_step_len[:, None]  # [batch, step]
        if ring_len < self.num_past_positions:
            # The ring is as long as a sequence may be. What would replace a key still in the window is lost.
            is_live &= key_positions < ring_len
            is_kept = is_live
        else:
            # The last of the step, so that no two tokens that are kept have the same slot.
            is_kept = is_live & (index >= live_step_len[:, None] - ring_len)
        slots = jnp.where(is_kept, key_positions % ring_len, ring_len)  # One past the end: dropped.
        new = {
            "key": self._to_stored(k_proj, is_live=is_live),
            "value": self._to_stored(v_proj, is_live=is_live),
            "key_positions": jnp.where(is_live, key_positions, UNWRITTEN_POSITION).astype(jnp.int32),
        }
        new_states = {name: _write(cached_states[name], new[name], slots) for name in new}
        new_states = {
            "key": self._shard(new_states["key"]),
            "value": self._shard(new_states["value"]),
            "key_positions": self._shard_positions(new_states["key_positions"]),
        }
        visible = {name: jnp.concatenate([cached_states[name], new[name]], axis=-1) for name in new}
        return new_states, KVState(
            k_proj=jnp.moveaxis(visible["key"], -1, 1).astype(k_proj.dtype),
            v_proj=jnp.moveaxis(visible["value"], -1, 1).astype(v_proj.dtype),
            key_positions=visible["key_positions"],
        )

    def _to_stored(self, new: jax.Array, *, is_live: jax.Array) -> jax.Array:
        """From `[batch, step, heads, dim]` to order and dtype of the ring, `[batch, heads, dim, step]`.

        What is not live becomes 0: a probability of 0 does not hide a NaN.
        """
        new = jnp.where(is_live[:, :, None, None], new, 0)
        return jnp.moveaxis(new, 1, -1).astype(self.cache_dtype())

    def _shard(self, stored: jax.Array) -> jax.Array:
        spec = self.config.kv_partition_spec
        if spec is None:
            return stored
        batch, kv_len, heads, per_head_dim = spec
        return maybe_shard(stored, (batch, heads, per_head_dim, kv_len))

    def _shard_positions(self, positions: jax.Array) -> jax.Array:
        spec = self.config.kv_partition_spec
        return positions if spec is None else maybe_shard(positions, (spec[0], spec[1]))


def _write(stored: jax.Array, new: jax.Array, slots: jax.Array) -> jax.Array:
    """Puts `new` [batch, ..., step] at `slots` [batch, step] of [batch, ..., ring]."""

    def write_row(stored_row: jax.Array, new_row: jax.Array, row_slots: jax.Array) -> jax.Array:
        return stored_row.at[..., row_slots].set(new_row, mode="drop")

    return jax.vmap(write_row)(stored, new, slots)
