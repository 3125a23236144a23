"""Clipping, leaving out steps, and moving averages."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from axlearn.common import optimizers, schedule
from axlearn.common.optimizer_base import make_opt_params
from axlearn.common.utils import VDict

# The norm of this is 13.
GRADS = {"a": jnp.asarray([3.0, 4.0]), "b": jnp.asarray([[12.0]])}


def _bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def _apply_once(transformation, updates):
    params = make_opt_params(updates)
    return transformation.update(updates, transformation.init(params), params)[0]


def _times(factor):
    return jax.tree.map(lambda g: factor * np.asarray(g), GRADS)


@pytest.mark.parametrize(("max_norm", "factor"), [(6.5, 0.5), (13.5, 1.0), (None, 1.0)])
def test_clip_by_global_norm_scales_everything_by_one_factor(max_norm, factor):
    clipped = _apply_once(optimizers.clip_by_global_norm(max_norm), GRADS)
    jax.tree.map(lambda g, want: np.testing.assert_allclose(g, want, rtol=1e-6), clipped, _times(factor))


@pytest.mark.parametrize(("drop_norm", "factor"), [(13.5, 1.0), (12.5, 0.0)])
def test_clip_by_global_norm_drops_from_a_norm_on(drop_norm, factor):
    clipped = _apply_once(optimizers.clip_by_global_norm(drop_norm=drop_norm), GRADS)
    jax.tree.map(lambda g, want: np.testing.assert_allclose(g, want), clipped, _times(factor))


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_dropped_gradients_are_zero_even_where_they_are_not_finite(bad):
    grads = {**GRADS, "c": bad + jnp.zeros(1)}
    clipped = _apply_once(optimizers.clip_by_global_norm(1.0, drop_norm=100.0), grads)
    assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(clipped))


def test_the_norm_of_bfloat16_gradients_is_computed_in_float32():
    # The square of this number is not one of bfloat16, which would round it by 6e-5.
    x = jnp.full(1000, 1.0078125, jnp.bfloat16)
    np.testing.assert_allclose(optimizers.global_norm({"x": x}), 1.0078125 * np.sqrt(1000), rtol=1e-6)


def test_clip_by_block_rms_clips_repeated_layers_one_by_one():
    layers = np.stack([np.full((4,), 0.5), np.full((4,), 8.0)]).astype(np.float32)
    clipped = _apply_once(
        optimizers.clip_by_block_rms(1.0), {"repeat": VDict(w=jnp.asarray(layers)), "w": jnp.asarray(layers)}
    )
    np.testing.assert_allclose(clipped["repeat"]["w"], [[0.5] * 4, [1.0] * 4], rtol=1e-6)
    np.testing.assert_allclose(clipped["w"], layers / np.sqrt((layers**2).mean()), rtol=1e-6)


class _Run:
    """Parameters under `skip_and_clip_by_global_norm`; one compilation for all steps."""

    def __init__(self, inner=None, **kwargs):
        inner = inner or optimizers.adamw_decoupled_optimizer(
            0.1, b1=0.9, b2=0.95, update_schedule=0.5, weight_decay=0.1
        )
        self.transformation = optimizers.skip_and_clip_by_global_norm(inner, **kwargs)
        # Minus zero is a bit pattern of its own, which adding plus zero would lose.
        self.params = {"a": jnp.asarray([1.0, -0.0]), "b": jnp.asarray([[-2.5]])}
        self.state = self.transformation.init(make_opt_params(self.params))
        self._step = jax.jit(self._step_fn)

    def _step_fn(self, grads, state, params):
        updates, state = self.transformation.update(grads, state, make_opt_params(params))
        return optax.apply_updates(params, updates), state

    def step(self, grads):
        self.params, self.state = self._step(grads, self.state, self.params)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30], ids=str)
def test_a_step_that_is_left_out_changes_no_bit_of_parameters_and_inner_state(bad):
    run = _Run(max_norm=1.0, drop_norm=100.0)
    run.step(GRADS)
    before = _bits(run.params), _bits(run.state.inner_state)
    run.step({"a": jnp.asarray([0.1, bad]), "b": jnp.asarray([[0.1]])})
    assert (_bits(run.params), _bits(run.state.inner_state)) == before
    assert (int(run.state.count), int(run.state.nonvalid_count)) == (1, 1)
    # As if the bad step had never been.
    run.step(GRADS)
    other = _Run(max_norm=1.0, drop_norm=100.0)
    other.step(GRADS)
    other.step(GRADS)
    assert _bits(run.params) == _bits(other.params)
    assert _bits(run.state.inner_state) == _bits(other.state.inner_state)


def test_minus_zero_survives_a_bad_first_step():
    run = _Run(drop_norm=1.0)
    before = _bits(run.params)
    run.step(GRADS)
    assert _bits(run.params) == before


def test_steps_that_are_kept_equal_clipping_before_the_inner_transformation():
    run = _Run(inner=optimizers.scale(-1.0), max_norm=6.5)
    expected = jax.tree.map(lambda p, g: p - 0.5 * g, run.params, GRADS)
    run.step(GRADS)
    jax.tree.map(lambda p, want: np.testing.assert_allclose(p, want, rtol=1e-6), run.params, expected)


@pytest.mark.parametrize(
    ("drop_norm", "threshold_of_last"),
    [
        (optimizers.drop_norm_by_grad_norm_ema((2, 5), min_count=2), lambda norms: 2 * norms.mean()),
        (
            optimizers.drop_norm_by_grad_norm_stddev((3, 50), min_count=2),
            lambda norms: norms.mean() + 3 * norms.std(),
        ),
    ],
    ids=["ema", "stddev"],
)
def test_thresholds_follow_the_norms_so_far(drop_norm, threshold_of_last):
    run = _Run(inner=optimizers.scale(0.0), drop_norm=drop_norm, grad_norm_ema_decay=0.999)
    norms = [1.0, 1.2, 0.9, 1.1]
    for norm in [1.0, 1.2, 1e9, 0.9, 1.1]:
        # Before two steps have counted, nothing is left out for its norm, whatever it is; after them 1e9 is.
        run.step({"a": jnp.asarray([norm, 0.0]), "b": jnp.zeros((1, 1))})
    assert (int(run.state.count), int(run.state.nonvalid_count)) == (4, 1)
    assert all(int(count) == 1 for count in run.state.drop_stats.values())
    # With so slow a decay the bias-corrected averages are plain ones.
    threshold = threshold_of_last(np.asarray(norms))
    for factor, num_skipped in ((1.02, 2), (0.98, 2)):
        run.step({"a": jnp.asarray([factor * threshold, 0.0]), "b": jnp.zeros((1, 1))})
        assert int(run.state.nonvalid_count) == num_skipped
    names = sorted(run.state.drop_stats, key=lambda name: float(name.split("x")[0]))
    assert [int(run.state.drop_stats[name]) for name in names] == [2, 1]


def test_a_threshold_function_needs_a_decay():
    with pytest.raises(ValueError) as e:
        optimizers.skip_and_clip_by_global_norm(
            optimizers.scale(1.0), drop_norm=optimizers.drop_norm_by_grad_norm_ema()
        )
    assert str(e.value) == (
        "skip_and_clip_by_global_norm: grad_norm_ema_decay is None, although drop_norm is a function of the "
        "average norm.\n  Expected a decay in (0, 1), such as 0.99."
    )
    with pytest.raises(ValueError, match="at least one number above 0"):
        optimizers.drop_norm_by_grad_norm_stddev(())


def test_ema_without_debias_is_the_plain_average():
    transformation = optimizers.ema(0.9, debias=False)
    state = transformation.init(make_opt_params(GRADS))
    expected = np.zeros(2)
    for factor in (1.0, -2.0, 0.5):
        grads = jax.tree.map(lambda g, f=factor: f * g, GRADS)
        updates, state = transformation.update(grads, state, make_opt_params(GRADS))
        expected = 0.9 * expected + 0.1 * factor * np.asarray([3.0, 4.0])
        np.testing.assert_allclose(updates["a"], expected, rtol=1e-6)


def test_param_ema_passes_updates_and_averages_floats_and_copies_the_rest():
    transformation = optimizers.param_ema(decay=schedule.decay_bias_correction(0.5))
    state = transformation.init(make_opt_params({"w": jnp.zeros(2), "num": jnp.zeros([], jnp.int32)}))
    values = [4.0, 2.0, 8.0]
    for i, value in enumerate(values):
        params = make_opt_params({"w": jnp.full(2, value), "num": jnp.asarray(i)})
        updates, state = transformation.update(GRADS, state, params)
        assert updates is GRADS
    # Weights 1, 2, 4, normalized: an average without the pull of the start at zero.
    np.testing.assert_allclose(state.ema["w"], (4.0 + 2 * 2.0 + 4 * 8.0) / 7, rtol=1e-6)
    assert int(state.ema["num"]) == 2
    assert int(state.count) == 3


def test_param_ema_without_decay_keeps_nothing():
    transformation = optimizers.param_ema()
    state = transformation.init(make_opt_params(GRADS))
    assert jax.tree.leaves(state) == jax.tree.leaves(transformation.partition({})) == []
    assert transformation.update(GRADS, state, {})[0] is GRADS
