"""What an attention layer asks of a cache of keys and values."""

import abc
from typing import Any, NamedTuple, Optional

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from axlearn.common.base_layer import BaseLayer
from axlearn.common.config import config_class

# The time index of a slot that was never written: later than any query's, so that no causal mask lets it be seen.
UNWRITTEN_POSITION = int(np.iinfo(np.int32).max)


class KVState(NamedTuple):
    """Keys and values that queries can attend to.

    Attributes:
        k_proj: Keys `[batch, source, kv_heads, per_head_dim]`.
        v_proj: Values `[batch, source, kv_heads, per_head_dim]`.
        key_positions: The time index of each key `[batch or 1, source]`, int32. A slot of a cache that was
            never written has a time later than any query's (its own index, or `UNWRITTEN_POSITION`), so that
            no causal mask lets it be seen.
    """

    k_proj: Array
    v_proj: Array
    key_positions: Array


class KVCacheShape(NamedTuple):
    """How much a cache holds.

    Attributes:
        batch_size: Number of sequences.
        kv_len: Number of positions of a sequence.
        num_kv_heads: Number of key heads.
        per_head_dim: Size of a key, and of a value.
    """

    batch_size: int
    kv_len: int
    num_kv_heads: int
    per_head_dim: int


class BaseKVCache(BaseLayer):
    """Keeps keys and values over the steps of incremental decoding."""

    Shape = KVCacheShape
    Output = KVState

    @config_class
    class Config(BaseLayer.Config):
        """Configures `BaseKVCache`."""

        # Dtype in which keys and values are kept. None: that of the layer's parameters.
        cache_dtype: Optional[Any] = None
        # How the cache lies on the mesh: entries for batch, kv_len, num_kv_heads, per_head_dim. None: as the
        # compiler likes.
        kv_partition_spec: Optional[Any] = None

    @property
    def num_past_positions(self) -> Optional[int]:
        """How many positions before a query's own are certain to be kept; None: all."""
        return None

    def cache_dtype(self) -> Any:
        """The dtype in which keys and values are kept."""
        cfg: BaseKVCache.Config = self.config
        return jnp.dtype(self.dtype() if cfg.cache_dtype is None else cfg.cache_dtype)

    @abc.abstractmethod
    def init_states(self, shape: KVCacheShape) -> dict[str, Any]:
        """An empty cache."""

    @abc.abstractmethod
    def extend_step(
        self,
        cached_states: dict[str, Any],
        *,
        k_proj: Float[Array, "batch step kv_heads per_head_dim"],
        v_proj: Float[Array, "batch step kv_heads per_head_dim"],
        key_positions: Int[Array, "batch step"],
        live_step_len: Optional[Int[Array, "batch"]] = None,
    ) -> tuple[dict[str, Any], KVState]:
        """Takes new keys and values in.

        Args:
            cached_states: From `init_states` or an earlier call.
            k_proj: New keys.
            v_proj: New values.
            key_positions: The time index of each of them, counted from 0.
            live_step_len: How many of the `step` new ones are real; the others are not kept. None: all.

        Returns:
            The new cache, and what queries can attend to now, in the dtype of `k_proj`.
        """
