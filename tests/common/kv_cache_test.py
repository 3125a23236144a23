"""Tests of axlearn.common.kv_cache."""

import jax
import jax.numpy as jnp
import numpy as np

from axlearn.common.kv_cache.base_kv_cache import KVCacheShape
from axlearn.common.kv_cache.kv_cache import KVCache
from axlearn.common.module import functional

_BATCH, _LEN, _HEADS, _DIM = 2, 6, 3, 4


def _cache(**kwargs) -> KVCache:
    return KVCache.default_config().set(name="cache", **kwargs).instantiate(parent=None)


def _shape() -> KVCacheShape:
    return KVCacheShape(batch_size=_BATCH, kv_len=_LEN, num_kv_heads=_HEADS, per_head_dim=_DIM)


def test_the_cache_holds_exactly_what_was_live():
    """Against a list of rows that grows as tokens come in."""
    cache = _cache()
    states = cache.init_states(_shape())
    rng = np.random.default_rng(0)
    rows: list[list[np.ndarray]] = [[], []]
    step = jax.jit(
        lambda s, x: functional(
            cache, None, {}, {"cached_states": s, **x}, method="extend_step", is_training=False
        )[0]
    )
    # The last step's garbage would lie beyond the end of the cache.
    for live in ([3, 1], [0, 3], [2, 1], [1, 1]):
        time = np.array([len(row) for row in rows])
        k = rng.normal(size=[_BATCH, 3, _HEADS, _DIM]).astype(np.float32)
        states, kv = step(
            states,
            {
                "k_proj": k,
                "v_proj": -k,
                "key_positions": time[:, None] + np.arange(3),
                "live_step_len": np.array(live),
            },
        )
        for b in range(_BATCH):
            rows[b].extend(k[b, : live[b]])
    assert kv.k_proj.shape == (_BATCH, _LEN, _HEADS, _DIM)
    for b in range(_BATCH):
        expected = np.zeros([_LEN, _HEADS, _DIM])
        expected[: len(rows[b])] = rows[b]
        np.testing.assert_array_equal(kv.k_proj[b], expected)
        np.testing.assert_array_equal(kv.v_proj[b], -expected)
    np.testing.assert_array_equal(kv.key_positions, np.arange(_LEN)[None])


def test_the_cache_has_its_own_dtype_and_returns_that_of_the_inputs():
    cache = _cache(cache_dtype=jnp.bfloat16)
    states = cache.init_states(_shape())
    assert {x.dtype for x in jax.tree.leaves(states)} == {jnp.dtype(jnp.bfloat16)}
    k = jnp.full([_BATCH, 1, _HEADS, _DIM], 1 / 3)
    states, kv = functional(
        cache,
        None,
        {},
        {
            "cached_states": states,
            "k_proj": k,
            "v_proj": k,
            "key_positions": jnp.zeros([_BATCH, 1], jnp.int32),
        },
        method="extend_step",
        is_training=False,
    )[0]
    assert kv.k_proj.dtype == jnp.float32
    np.testing.assert_array_equal(kv.k_proj[:, 0], k[:, 0].astype(jnp.bfloat16).astype(jnp.float32))
    assert {x.dtype for x in jax.tree.leaves(_cache().init_states(_shape()))} == {jnp.dtype(jnp.float32)}
    half = _cache(dtype=jnp.bfloat16).init_states(_shape())
    assert {x.dtype for x in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}
