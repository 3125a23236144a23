"""Attention that looks back over a window, and keeps no more than that for decoding."""

from typing import Any, TypeVar

from axlearn.common.attention._multihead import MultiheadAttention
from axlearn.common.attention._recursive import for_each_self_attention
from axlearn.common.attention_bias import SlidingWindowAttentionBias
from axlearn.common.config import ConfigBase, error_message
from axlearn.common.kv_cache.kv_cache import KVCache
from axlearn.common.kv_cache.sliding_window_kv_cache import SlidingWindowKVCache

C = TypeVar("C", bound=ConfigBase)


def enable_sliding_window_attention(cfg: C, sliding_window_size: int) -> C:
    """Lets self-attention see a window of positions, and decode with a cache of that length.

    Sets `mask` to a `SlidingWindowAttentionBias`, in the place of `causal`, which it implies; and `kv_cache` to a
    `SlidingWindowKVCache` with the dtype and partition spec of the cache that was there.

    Args:
        cfg: The config of an attention layer, or any config with such layers below it, such as that of a stack;
            changed in place. Layers in `cross_attention` stay as they are.
        sliding_window_size: Number of positions that a query sees before its own, at least 1. The
            `sliding_window=W` of Hugging Face's configs counts the query too: it is a size of W - 1 here.

    Returns:
        `cfg`.

    Raises:
        ValueError: If the size is below 1, if there is no attention layer, or if one has a mask already, or a
            cache of another kind than `KVCache`.
    """
    if sliding_window_size < 1:
        raise ValueError(
            error_message(what=f"sliding_window_size={sliding_window_size}", expected="at least 1")
        )
    found: list[MultiheadAttention.Config] = []
    for_each_self_attention(cfg, found.append)
    if not found:
        raise ValueError(
            error_message(
                what=f"no attention layer in a {type(cfg).__name__}",
                expected="a MultiheadAttention.Config, or a config with one below it",
            )
        )
    # All are checked before the first is changed.
    caches = [_windowed_cache(attention, sliding_window_size) for attention in found]
    for attention, kv_cache in zip(found, caches, strict=True):
        attention.causal = None
        attention.mask = SlidingWindowAttentionBias.default_config(sliding_window_size=sliding_window_size)
        attention.kv_cache = kv_cache
    return cfg


def _windowed_cache(
    attention: MultiheadAttention.Config, sliding_window_size: int
) -> SlidingWindowKVCache.Config:
    """The cache to use in the place of the one there is."""
    if attention.mask is not None:
        raise ValueError(
            error_message(
                what=f"a sliding window for an attention layer with mask {attention.mask}",
                expected="a layer without a mask",
                advice="clear it first, or join masks with attention_bias.and_masks",
            )
        )
    kv_cache: Any = SlidingWindowKVCache.default_config().set(cached_kv_length=sliding_window_size)
    old: Any = attention.kv_cache
    if old is None:
        return kv_cache
    if old.klass is not KVCache:
        raise ValueError(
            error_message(
                what=f"a sliding window for an attention layer with a {old.klass.__qualname__}",
                expected="a KVCache, or None",
            )
        )
    # Whatever both have in common, such as the dtype.
    return kv_cache.set(**{name: value for name, value in old.items() if name != "klass"})
