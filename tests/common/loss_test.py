"""Cross entropy against numpy in float64, optax, and by its laws."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from axlearn.common.loss import cross_entropy, token_losses

VOCAB_SIZE = 11
_jit_cross_entropy = jax.jit(cross_entropy, static_argnames="z_loss_scale")


def _batch(seed: int, *, dtype=np.float32):
    rng = np.random.default_rng(seed)
    logits = (4 * rng.normal(size=(3, 5, VOCAB_SIZE))).astype(dtype)
    labels = rng.integers(-2, VOCAB_SIZE, size=(3, 5)).astype(np.int32)
    return logits, labels


def _reference(logits, labels, *, live=None, z_loss_scale=0.0):
    """Ten lines of float64."""
    x = np.asarray(logits, dtype=np.float64)
    live = (labels >= 0) if live is None else live
    lse = np.log(np.exp(x).sum(-1))
    ce = lse - np.take_along_axis(x, np.maximum(labels, 0)[..., None], -1)[..., 0]
    correct = x.argmax(-1) == labels
    mean = lambda v: (v * live).sum() / max(live.sum(), 1)  # noqa: E731
    return {
        "cross_entropy_loss": mean(ce),
        "z_loss": mean(lse**2),
        "total_loss": mean(ce + z_loss_scale * lse**2),
        "accuracy": mean(correct),
        "per_target_loss": (ce + z_loss_scale * lse**2) * live,
    }


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), z_loss_scale=st.sampled_from([0.0, 0.25]))
def test_every_term_equals_the_float64_reference(seed, z_loss_scale):
    logits, labels = _batch(seed)
    loss, terms = _jit_cross_entropy(logits, labels, z_loss_scale=z_loss_scale)
    expected = _reference(logits, labels, z_loss_scale=z_loss_scale)
    assert loss == terms["total_loss"]
    for name, value in expected.items():
        np.testing.assert_allclose(terms[name], value, rtol=2e-6, atol=1e-6, err_msg=name)


def test_loss_and_gradient_equal_those_of_optax():
    logits, labels = _batch(0)
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    live = labels >= 0

    def with_optax(x):
        ce = optax.softmax_cross_entropy_with_integer_labels(x, jnp.maximum(labels, 0))
        return jnp.sum(jnp.where(live, ce, 0.0)) / live.sum()

    ours = jax.jit(jax.value_and_grad(lambda x: cross_entropy(x, labels)[0]))(logits)
    theirs = jax.jit(jax.value_and_grad(with_optax))(logits)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-6)
    np.testing.assert_allclose(ours[1], theirs[1], atol=1e-7)


def test_the_gradient_of_the_z_loss_equals_that_of_its_formula():
    logits, labels = map(jnp.asarray, _batch(3))
    live = labels >= 0

    def formula(x):
        return jnp.sum(jnp.where(live, jax.nn.logsumexp(x, axis=-1) ** 2, 0.0)) / live.sum()

    def difference(x):
        return cross_entropy(x, labels, z_loss_scale=1.0)[0] - cross_entropy(x, labels)[0]

    ours = jax.jit(jax.grad(difference))(logits)
    np.testing.assert_allclose(ours, jax.jit(jax.grad(formula))(logits), atol=1e-5)


def test_explicit_live_targets_replace_the_signs_of_the_labels():
    logits, _ = _batch(1)
    labels = np.zeros((3, 5), dtype=np.int32)
    live = np.random.default_rng(2).integers(0, 2, size=(3, 5)).astype(bool)
    loss, _ = _jit_cross_entropy(logits, labels, live_targets=live)
    np.testing.assert_allclose(loss, _reference(logits, labels, live=live)["total_loss"], rtol=1e-6)


def test_token_and_label_zero_count_like_any_other():
    logits, _ = _batch(4)
    labels = np.zeros((3, 5), dtype=np.int32)
    loss, _ = _jit_cross_entropy(logits, labels)
    np.testing.assert_allclose(loss, _reference(logits, labels)["total_loss"], rtol=1e-6)


def test_no_live_target_gives_zero_and_no_gradient():
    logits, labels = map(jnp.asarray, _batch(5))
    loss, grad = jax.value_and_grad(lambda x: cross_entropy(x, jnp.full_like(labels, -1))[0])(logits)
    assert loss == 0
    assert not np.any(grad)


def test_a_label_outside_the_vocabulary_shows_as_nan():
    logits, labels = _batch(6)
    labels[1, 2] = VOCAB_SIZE
    loss, terms = _jit_cross_entropy(logits, labels)
    assert np.isnan(loss)
    assert np.isnan(terms["per_target_loss"][1, 2])
    assert np.isfinite(terms["per_target_loss"]).sum() == labels.size - 1


def test_a_nan_at_a_dead_position_does_not_reach_the_loss():
    logits, labels = _batch(7)
    labels[0, 0] = -1
    poisoned = logits.copy()
    poisoned[0, 0] = np.nan
    assert _jit_cross_entropy(poisoned, labels)[0] == _jit_cross_entropy(logits, labels)[0]


def test_the_first_of_equal_logits_is_the_prediction():
    logits = jnp.asarray([[0.0, 3.0, 3.0], [0.0, 0.0, 0.0]])
    assert token_losses(logits, jnp.asarray([1, 1])).is_correct.tolist() == [1, 0]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_logits_are_worked_with_in_float32(dtype):
    logits, labels = _batch(8)
    half = jnp.asarray(logits, dtype=dtype)
    loss, terms = _jit_cross_entropy(half, labels)
    assert {x.dtype for x in terms.values()} == {jnp.dtype("float32")}
    np.testing.assert_allclose(loss, _reference(half, labels)["total_loss"], rtol=1e-6)


def test_large_logits_do_not_overflow():
    logits = jnp.asarray([[1e4, -1e4, 0.0]])
    loss, terms = _jit_cross_entropy(logits, jnp.asarray([1]))
    assert loss == 2e4
    assert np.isfinite(terms["z_loss"])


def test_a_sharded_vocabulary_gives_the_same_loss_without_gathering_the_logits():
    rng = np.random.default_rng(9)
    logits = rng.normal(size=(4, 8, 64)).astype(np.float32)
    labels = rng.integers(0, 64, size=(4, 8)).astype(np.int32)
    mesh = Mesh(np.asarray(jax.devices()).reshape(2, 4), ("data", "model"))
    on_mesh = (
        jax.device_put(logits, NamedSharding(mesh, PartitionSpec("data", None, "model"))),
        jax.device_put(labels, NamedSharding(mesh, PartitionSpec("data", None))),
    )
    fn = jax.jit(jax.value_and_grad(lambda x, y: cross_entropy(x, y)[0]))
    compiled = fn.lower(*on_mesh).compile()
    loss, grad = compiled(*on_mesh)
    expected_loss, expected_grad = fn(logits, labels)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    np.testing.assert_allclose(grad, expected_grad, atol=1e-8)
    assert "all-gather" not in compiled.as_text()
