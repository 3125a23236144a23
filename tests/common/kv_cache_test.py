"""Tests of axlearn.common.kv_cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh

from axlearn.common.kv_cache.base_kv_cache import UNWRITTEN_POSITION, KVCacheShape
from axlearn.common.kv_cache.kv_cache import KVCache
from axlearn.common.kv_cache.sliding_window_kv_cache import SlidingWindowKVCache
from axlearn.common.module import functional
from axlearn.common.utils import use_mesh

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


def _ring(**kwargs) -> SlidingWindowKVCache:
    return SlidingWindowKVCache.default_config().set(name="ring", **kwargs).instantiate(parent=None)


def _stepper(cache):
    call = jax.jit(
        lambda states, inputs: functional(
            cache,
            None,
            {},
            {"cached_states": states, **inputs},
            method="extend_step",
            is_training=False,
        )[0]
    )

    def step(states, time, k, live):
        inputs = {
            "k_proj": k,
            "v_proj": -k,
            "key_positions": np.asarray(time)[:, None] + np.arange(k.shape[1]),
        }
        return call(states, {**inputs, "live_step_len": np.asarray(live)})

    return step


_RINGS = {
    length: (_ring(cached_kv_length=length), _stepper(_ring(cached_kv_length=length))) for length in (2, 4)
}


def _visible(kv, row: int) -> dict[int, np.ndarray]:
    """The key of each time that a query in a row can see; no time may be there twice."""
    written = [i for i, time in enumerate(kv.key_positions[row]) if time != UNWRITTEN_POSITION]
    visible = {int(kv.key_positions[row, i]): np.asarray(kv.k_proj[row, i]) for i in written}
    assert len(visible) == len(written)
    for i in written:
        np.testing.assert_array_equal(kv.v_proj[row, i], -kv.k_proj[row, i])
    return visible


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 1000), length=st.sampled_from([2, 4]))
def test_a_ring_shows_its_last_tokens_and_the_step(seed, length):
    """Against a list of all tokens. A step of 3 is longer than the ring of 2, and shorter than that of 4."""
    cache, step = _RINGS[length]
    rng = np.random.default_rng(seed)
    states = cache.init_states(_shape()._replace(kv_len=20))
    assert states["key"].shape == (_BATCH, _HEADS, _DIM, length)
    rows: list[list[np.ndarray]] = [[], []]
    for _ in range(6):
        k = rng.normal(size=[_BATCH, 3, _HEADS, _DIM]).astype(np.float32)
        live = rng.integers(0, 4, size=_BATCH)
        for b in range(_BATCH):
            k[b, live[b] :] = np.nan
        states, kv = step(states, [len(row) for row in rows], k, live)
        for b in range(_BATCH):
            first_visible = max(0, len(rows[b]) - length)
            rows[b].extend(k[b, : live[b]])
            visible = _visible(kv, b)
            assert sorted(visible) == list(range(first_visible, len(rows[b])))
            for time, key in visible.items():
                np.testing.assert_array_equal(key, rows[b][time])
        # What is not live leaves no NaN behind, which a probability of 0 would not hide.
        assert jnp.isfinite(kv.k_proj).all()
        assert kv.k_proj.shape[1] == length + 3


def test_a_ring_is_no_longer_than_the_sequence_and_says_when_that_is_full():
    cache, step = _ring(cached_kv_length=10), _stepper(_ring(cached_kv_length=10))
    states = cache.init_states(_shape()._replace(kv_len=4))
    assert states["key"].shape[-1] == 4
    k = np.arange(_BATCH * 3 * _HEADS * _DIM, dtype=np.float32).reshape(_BATCH, 3, _HEADS, _DIM)
    states, _ = step(states, [0, 0], k, [3, 2])
    states, kv = step(states, [3, 2], k, [3, 2])
    assert sorted(_visible(kv, 0)) == [0, 1, 2, 3]
    assert sorted(_visible(kv, 1)) == [0, 1, 2, 3]
    np.testing.assert_array_equal(states["key_positions"], [[0, 1, 2, 3]] * 2)


def test_a_sharded_ring_equals_one_on_a_device():
    mesh = Mesh(np.asarray(jax.devices()).reshape(2, 2, 2), ("data", "seq", "model"))
    rng = np.random.default_rng(0)
    k = rng.normal(size=[3, _BATCH, 3, 2, _DIM]).astype(np.float32)
    shape = _shape()._replace(num_kv_heads=2, kv_len=20)

    def run(cache):
        states, step = cache.init_states(shape), _stepper(cache)
        for i in range(3):
            states, kv = step(states, [3 * i, 2 * i], k[i], [3, 2])
        return states, kv

    expected = run(_ring(cached_kv_length=4))
    with use_mesh(mesh):
        actual = run(_ring(cached_kv_length=4, kv_partition_spec=("data", "seq", "model", None)))
    assert actual[0]["key"].sharding.spec[:2] == ("data", "model")
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_a_ring_without_room_is_refused():
    with pytest.raises(ValueError, match=r"(?s)ring: cached_kv_length=0.*at least 1"):
        _ring(cached_kv_length=0)
