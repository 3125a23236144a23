"""Logit modifiers against numpy, and by their laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axlearn.common.config import config_for_function
from axlearn.common.logit_modifiers import (
    NEG_INF,
    chain,
    scale_by,
    soft_cap_logits,
    top_k_logits,
    top_p_logits,
)


def _logits(seed: int) -> jax.Array:
    return jnp.asarray(3 * np.random.default_rng(seed).normal(size=(4, 2, 9)), dtype=jnp.float32)


# One compilation for each setting, shared by the examples of a property.
_TOP_P = {p: jax.jit(top_p_logits(p)) for p in (0.05, 0.5, 0.9, 0.99)}
_TOP_K = {k: jax.jit(top_k_logits(k)) for k in (1, 3, 8)}


def _numpy_top_p(row: np.ndarray, p: float) -> np.ndarray:
    """Ids kept: the likeliest first, until they reach p."""
    probs = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
    order = np.argsort(-probs, kind="stable")
    kept = order[: np.searchsorted(np.cumsum(probs[order]), p) + 1]
    return np.sort(kept)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), p=st.sampled_from(sorted(_TOP_P)))
def test_top_p_keeps_what_the_numpy_reference_keeps(seed, p):
    logits = np.asarray(_logits(seed))
    modified = np.asarray(_TOP_P[p](logits))
    for before, after in zip(logits.reshape(-1, 9), modified.reshape(-1, 9), strict=True):
        kept = np.flatnonzero(after != NEG_INF)
        np.testing.assert_array_equal(kept, _numpy_top_p(before, p))
        np.testing.assert_array_equal(after[kept], before[kept])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), k=st.sampled_from(sorted(_TOP_K)))
def test_top_k_keeps_the_k_largest(seed, k):
    logits = np.asarray(_logits(seed))
    modified = np.asarray(_TOP_K[k](logits))
    expected = np.where(logits >= np.sort(logits, axis=-1)[..., [-k]], logits, np.float32(NEG_INF))
    np.testing.assert_array_equal(modified, expected)


@pytest.mark.parametrize("modifier", [top_p_logits(1.0), top_k_logits(9), top_k_logits(99), scale_by(1.0)])
def test_settings_that_rule_out_nothing_are_identities(modifier):
    np.testing.assert_array_equal(modifier(_logits(0)), _logits(0))


def test_top_p_of_zero_keeps_the_likeliest_id():
    modified = np.asarray(top_p_logits(0.0)(_logits(1)))
    np.testing.assert_array_equal((modified != NEG_INF).sum(-1), 1)
    np.testing.assert_array_equal(modified.argmax(-1), _logits(1).argmax(-1))


def test_equally_likely_ids_stay_together():
    logits = jnp.asarray([2.0, 1.0, 1.0, 0.0])
    assert (top_k_logits(2)(logits) != NEG_INF).tolist() == [True, True, True, False]
    # The first two would do: they have 0.84 of the mass.
    assert (top_p_logits(0.8)(logits) != NEG_INF).tolist() == [True, True, True, False]


def test_a_temperature_scales_and_zero_leaves_only_the_first_of_the_largest():
    logits = jnp.asarray([1.0, 4.0, 4.0, -2.0])
    np.testing.assert_array_equal(scale_by(2.0)(logits), logits / 2)
    assert (scale_by(0)(logits) > NEG_INF / 2).tolist() == [False, True, False, False]


def test_what_is_ruled_out_has_no_probability_in_bfloat16():
    logits = jnp.asarray([1.0, 2.0, 3.0], dtype=jnp.bfloat16)
    modified = chain(top_k_logits(1), scale_by(10.0))(logits)
    assert modified.dtype == jnp.bfloat16
    assert jax.nn.softmax(modified).tolist() == [0, 0, 1]


def test_a_chain_applies_configs_in_order():
    chained = config_for_function(chain).set(
        args=[config_for_function(scale_by).set(temperature=0.5), config_for_function(top_k_logits).set(k=3)]
    )
    logits = _logits(2)
    np.testing.assert_array_equal(chained.instantiate()(logits), top_k_logits(3)(logits * 2))
    np.testing.assert_array_equal(chain()(logits), logits)


@pytest.mark.parametrize("make", [lambda: scale_by(-1.0), lambda: scale_by(float("nan"))])
def test_what_is_no_temperature_is_refused(make):
    with pytest.raises(ValueError, match=r"(?s)temperature.*at least 0"):
        make()


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_what_is_no_probability_is_refused(p):
    with pytest.raises(ValueError, match=r"(?s)top_p.*in \[0, 1\]"):
        top_p_logits(p)


def test_keeping_nothing_is_refused():
    with pytest.raises(ValueError, match=r"(?s)top_k.*at least 1"):
        top_k_logits(0)


def test_a_soft_cap_bounds_logits_and_keeps_their_order():
    logits = np.asarray(_logits(0)) * 10
    capped = np.asarray(soft_cap_logits(5)(jnp.asarray(logits)))
    np.testing.assert_allclose(capped, 5 * np.tanh(logits / 5), rtol=1e-5, atol=1e-6)
    assert 4.5 < np.abs(capped).max() <= 5
    np.testing.assert_allclose(soft_cap_logits(1e4)(jnp.asarray(logits)), logits, rtol=1e-4)


@pytest.mark.parametrize("cap", [0, -1, float("inf"), float("nan")])
def test_what_is_no_cap_is_refused(cap):
    with pytest.raises(ValueError, match=r"(?s)cap: .* is no cap.*above 0"):
        soft_cap_logits(cap)
