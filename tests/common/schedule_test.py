"""Schedules against Python floats, against optax, and at the values that the reference gives."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axlearn.common import schedule
from axlearn.common.config import config_for_function

STEPS = np.arange(0, 140)

# One example of every public function that makes a schedule. A new one must be added here: see the first
# test.
EXAMPLES = {
    "as_schedule_fn": lambda: schedule.as_schedule_fn(0.25),
    "polynomial": lambda: schedule.polynomial(
        begin_step=10, begin_value=2.0, end_step=90, end_value=0.5, power=2.0
    ),
    "exponential": lambda: schedule.exponential(begin_step=10, begin_value=1.0, end_step=90, end_value=1e-3),
    "cosine_with_linear_warmup": lambda: schedule.cosine_with_linear_warmup(
        3.0, max_step=100, warmup_steps=20, alpha=0.1, begin_value=0.5, decay_begin_step=40
    ),
    "constant_with_linear_warmup": lambda: schedule.constant_with_linear_warmup(3.0, warmup_steps=20),
    "linear_schedule_with_warmup": lambda: schedule.linear_schedule_with_warmup(
        3.0, max_step=100, warmup_steps=20, end_value=0.3
    ),
    "warmup_stable_decay": lambda: schedule.warmup_stable_decay(
        3.0, max_step=100, decay_begin_step=80, warmup_steps=20, alpha=0.1, decay_power=0.5
    ),
    "inverse_sqrt": lambda: schedule.inverse_sqrt(3.0, warmup_steps=20),
    "adafactor": lambda: schedule.adafactor(0.1, warmup_steps=20),
    "adafactor_decay_rate": lambda: schedule.adafactor_decay_rate(0.8),
    "decay_bias_correction": lambda: schedule.decay_bias_correction(0.95),
    "ema_schedule": lambda: schedule.ema_schedule(0.95, warmup_steps=7),
    "stepwise": lambda: schedule.stepwise([1.0, lambda step: step, 5.0], start_step=[10, 30]),
    "segment_wise": lambda: schedule.segment_wise([1.0, lambda step: step, 5.0], segment_steps=[10, 20, 30]),
}


def _by_name(name: str) -> np.ndarray:
    return np.asarray(jax.jit(EXAMPLES[name]())(jnp.asarray(STEPS)))


def _reference(name: str, t: float) -> float:
    """The examples, written down once more: step by step, in Python's floats."""
    if name == "as_schedule_fn":
        return 0.25
    if name == "polynomial":
        return 2.0 - 1.5 * (min(max(t - 10, 0), 80) / 80) ** 2
    if name == "exponential":
        return 10.0 ** (-3.0 * min(max(t - 10, 0), 80) / 80)
    if name == "decay_bias_correction":
        return 0.95 * (1 - 0.95 ** (t - 1)) / (1 - 0.95**t)
    if name == "ema_schedule":
        return 0.0 if t <= 7 else 0.95
    if name == "stepwise":
        return 1.0 if t < 10 else (t - 10 if t < 30 else 5.0)
    if name == "segment_wise":
        return 0.0 if t < 1 or t > 60 else (1.0 if t <= 10 else (t - 10 if t <= 30 else 5.0))
    if name == "adafactor":
        return 0.1 / math.sqrt(max(t, 20))
    if name == "adafactor_decay_rate":
        return 1 - max(t, 1) ** -0.8
    if t < 20:
        begin = 0.5 if name == "cosine_with_linear_warmup" else 0.0
        return begin + (3.0 - begin) * t / 20
    return {
        "cosine_with_linear_warmup": 3.0
        * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(max(t - 40, 0), 60) / 60))),
        "constant_with_linear_warmup": 3.0,
        "linear_schedule_with_warmup": 3.0 - 2.7 * min(t - 20, 80) / 80,
        "warmup_stable_decay": 3.0 - 2.7 * math.sqrt(min(max(t - 80, 0), 20) / 20),
        "inverse_sqrt": 3.0 * math.sqrt(20 / t),
    }[name]


def test_every_public_schedule_has_an_example():
    makes_schedules = {
        name
        for name, fn in inspect.getmembers(schedule, inspect.isfunction)
        if not name.startswith("_") and inspect.signature(fn).return_annotation is schedule.ScheduleFn
    }
    assert makes_schedules == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_schedule_equals_its_reference_at_every_step(name):
    # Steps count from 1; some formulas have no value at 0.
    expected = [_reference(name, float(t)) for t in STEPS[1:]]
    np.testing.assert_allclose(_by_name(name)[1:], expected, rtol=3e-6, atol=1e-7)


@pytest.mark.parametrize("name", EXAMPLES)
def test_schedule_is_float32_and_the_same_for_one_step_and_for_many(name):
    fn = EXAMPLES[name]()
    many = _by_name(name)
    assert many.dtype == np.float32
    for t in (1, 20, 25, 100):
        one = fn(jnp.asarray(t, jnp.int32))
        assert one.shape == ()
        assert one.dtype == jnp.float32
        np.testing.assert_allclose(one, many[t], rtol=1e-6)


@pytest.mark.parametrize("name", [n for n in EXAMPLES if n != "decay_bias_correction"])
def test_schedule_is_finite_at_step_zero_and_far_beyond_its_end(name):
    fn = EXAMPLES[name]()
    assert np.isfinite(fn(jnp.asarray([0, 2**31 - 1]))).all()


def test_cosine_has_the_values_of_the_reference_run():
    # reference.md 14.3: the schedule of fuji-test-v2, settled on its parameters.
    fn = schedule.cosine_with_linear_warmup(1.0, max_step=10, warmup_steps=2, begin_value=0.0, alpha=0.1)
    np.testing.assert_allclose(fn(jnp.arange(1, 4)), [0.5, 1.0, 0.9657457896], rtol=1e-7)
    np.testing.assert_allclose(fn(jnp.asarray([10, 11, 999])), 0.1, rtol=1e-6)


def test_cosine_and_linear_agree_with_optax():
    steps = jnp.arange(0, 130)
    ours = schedule.cosine_with_linear_warmup(3.0, max_step=100, warmup_steps=20, alpha=0.1, begin_value=0.5)(
        steps
    )
    theirs = optax.warmup_cosine_decay_schedule(0.5, 3.0, warmup_steps=20, decay_steps=100, end_value=0.3)
    np.testing.assert_allclose(ours, jax.vmap(theirs)(steps), rtol=1e-5)
    ours = schedule.polynomial(begin_step=10, begin_value=2.0, end_step=60, end_value=0.5)(steps)
    theirs = optax.linear_schedule(2.0, 0.5, transition_steps=50, transition_begin=10)
    np.testing.assert_allclose(ours, jax.vmap(theirs)(steps), rtol=1e-5)


def test_no_warmup_starts_at_the_peak():
    assert schedule.cosine_with_linear_warmup(2.0, max_step=10, warmup_steps=0)(jnp.asarray(0)) == 2.0
    assert schedule.constant_with_linear_warmup(2.0, warmup_steps=0)(jnp.asarray(0)) == 2.0


@settings(max_examples=20, deadline=None)
@given(
    warmup=st.integers(0, 40),
    hold=st.integers(0, 40),
    decay=st.integers(1, 40),
    peak=st.floats(1e-6, 10.0),
    alpha=st.floats(0.0, 1.0),
)
def test_cosine_rises_to_its_peak_and_falls_to_its_floor(warmup, hold, decay, peak, alpha):
    max_step = warmup + hold + decay
    fn = schedule.cosine_with_linear_warmup(
        peak, max_step=max_step, warmup_steps=warmup, alpha=alpha, decay_begin_step=warmup + hold
    )
    # Always the same length, so that nothing compiles twice.
    values = np.asarray(fn(jnp.arange(200)), dtype=np.float64) / peak
    assert (np.diff(values[: warmup + 1]) >= -1e-6).all()
    assert (np.diff(values[warmup:]) <= 1e-6).all()
    np.testing.assert_allclose(values[warmup : warmup + hold + 1], 1.0, rtol=1e-6)
    np.testing.assert_allclose(values[max_step:], alpha, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(values=st.lists(st.floats(-10, 10), min_size=1, max_size=8), decay=st.floats(0.0, 0.999))
def test_decay_bias_correction_debiases_an_average_that_starts_at_zero(values, decay):
    rates = np.asarray(schedule.decay_bias_correction(decay)(jnp.arange(1, 9)), dtype=np.float64)
    average, weighted = 0.0, 0.0
    for i, value in enumerate(values):
        average = rates[i] * average + (1 - rates[i]) * value
        weighted = decay * weighted + (1 - decay) * value
    np.testing.assert_allclose(average, weighted / (1 - decay ** len(values)), rtol=1e-4, atol=1e-5)


def test_as_schedule_fn_takes_numbers_functions_and_configs():
    step = jnp.asarray(3)
    assert schedule.as_schedule_fn(2)(step) == 2.0
    assert schedule.as_schedule_fn(jnp.asarray(0.5))(step) == 0.5
    fn = lambda step: step * 2.0  # noqa: E731
    assert schedule.as_schedule_fn(fn) is fn
    cfg = config_for_function(schedule.constant_with_linear_warmup).set(peak_lr=1.0, warmup_steps=6)
    assert schedule.as_schedule_fn(cfg)(step) == 0.5
    assert schedule.stepwise([cfg, 7.0], start_step=[4])(jnp.asarray(4)) == 7.0


@pytest.mark.parametrize("value", ["0.1", None, True, [0.1]])
def test_as_schedule_fn_refuses_what_is_no_schedule(value):
    with pytest.raises(TypeError, match=r"is not a schedule.*\n.*Expected a number, a function of the step"):
        schedule.as_schedule_fn(value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: schedule.cosine_with_linear_warmup(1.0, max_step=100, warmup_steps=100),
            "schedule.cosine_with_linear_warmup: warmup_steps=100, max_step=100 do not increase.\n"
            "  Expected 0 <= warmup_steps < max_step.",
        ),
        (
            lambda: schedule.cosine_with_linear_warmup(
                1.0, max_step=100, warmup_steps=50, decay_begin_step=40
            ),
            "schedule.cosine_with_linear_warmup: decay_begin_step=40 lies before the end of the warm-up.\n"
            "  Expected None, or at least warmup_steps=50.",
        ),
        (
            lambda: schedule.exponential(begin_value=1.0, end_step=10, end_value=0.0),
            "schedule.exponential: begin_value=1.0, end_value=0.0.\n"
            "  Expected two numbers above 0, because no factor leads to or from 0.",
        ),
        (
            lambda: schedule.stepwise([1.0, 2.0], start_step=[1, 2]),
            "schedule.stepwise: 2 schedules and 2 starts.\n"
            "  Expected one start for each schedule but the first.",
        ),
        (
            lambda: schedule.segment_wise([1.0], segment_steps=[]),
            "schedule.segment_wise: 1 segments and 0 lengths.\n  Expected one length for each segment.",
        ),
        (
            lambda: schedule.decay_bias_correction(1.0),
            "schedule.decay_bias_correction: decay=1.0.\n  Expected a number in [0, 1).",
        ),
    ],
)
def test_schedules_that_make_no_sense_are_refused_when_they_are_made(make, message):
    with pytest.raises(ValueError) as e:
        make()
    assert str(e.value).startswith(message)
