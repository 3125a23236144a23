"""The cache that holds every position of a sequence."""

from typing import Any, Optional

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from axlearn.common.kv_cache.base_kv_cache import BaseKVCache, KVCacheShape, KVState
from axlearn.common.utils import maybe_shard


class KVCache(BaseKVCache):
    """Keeps all keys and values, each at the index of its time.

    They are kept as `[batch, kv_heads, per_head_dim, kv_len]`: the long dim last is what accelerators tile
    best, and what the products of attention read in order. Writes outside of the cache, and of tokens that
    are not live, go nowhere: what is in the cache is exactly what was decoded.
    """

    def init_states(self, shape: KVCacheShape) -> dict[str, Any]:
        """See `BaseKVCache.init_states`."""
        stored_shape = (shape.batch_size, shape.num_kv_heads, shape.per_head_dim, shape.kv_len)
        return {name: self._shard(jnp.zeros(stored_shape, self.cache_dtype())) for name in ("key", "value")}

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
        kv_len = cached_states["key"].shape[-1]
        slots = key_positions
        if live_step_len is not None:
            is_live = jnp.arange(k_proj.shape[1])[None] < live_step_len[:, None]
            slots = jnp.where(is_live, key_positions, kv_len)  # One past the end: dropped.
        new_states = {
            "key": self._shard(_write(cached_states["key"], k_proj, slots)),
            "value": self._shard(_write(cached_states["value"], v_proj, slots)),
        }
        return new_states, KVState(
            k_proj=_read(new_states["key"], like=k_proj),
            v_proj=_read(new_states["value"], like=v_proj),
            key_positions=jnp.arange(kv_len, dtype=jnp.int32)[None],
        )

    def _shard(self, stored: jax.Array) -> jax.Array:
        spec = self.config.kv_partition_spec
        if spec is None:
            return stored
        batch, kv_len, heads, per_head_dim = spec
        return maybe_shard(stored, (batch, heads, per_head_dim, kv_len))


def _write(stored: jax.Array, new: jax.Array, slots: jax.Array) -> jax.Array:
    """Puts `new` [batch, step, heads, dim] at `slots` [batch, step] of [batch, heads, dim, kv_len]."""

    def write_row(stored_row: jax.Array, new_row: jax.Array, row_slots: jax.Array) -> jax.Array:
        return stored_row.at[:, :, row_slots].set(jnp.moveaxis(new_row, 0, -1), mode="drop")

    return jax.vmap(write_row)(stored, new.astype(stored.dtype), slots)


def _read(stored: jax.Array, *, like: jax.Array) -> jax.Array:
    return jnp.moveaxis(stored, -1, 1).astype(like.dtype)
