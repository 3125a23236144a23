"""Schedules: numbers that change with the training step, such as learning rates.

A schedule is a function from the step to a float32 value. Steps count from 1: the first update of a run is
step 1, and a schedule with a warm-up reaches its peak exactly at step `warmup_steps`. All functions here work
element by element on arrays of steps and inside of jit.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Optional, Union

import jax
import jax.numpy as jnp

from axlearn.common.config import InstantiableConfig, error_message

# Takes the step (1-based) and gives the value at it.
ScheduleFn = Callable[[jax.Array], jax.Array]
Schedule = Union[float, jax.Array, ScheduleFn, InstantiableConfig]


def as_schedule_fn(s: Schedule) -> ScheduleFn:
    """Makes a function of the step out of whatever stands for a schedule.

    Args:
        s: A number (a constant schedule), a function of the step, or the config of one of these.

    Returns:
        The function.

    Raises:
        TypeError: If `s` is none of these.
    """
    if isinstance(s, InstantiableConfig):
        return as_schedule_fn(s.instantiate())
    if callable(s):
        return s
    if isinstance(s, bool) or not isinstance(s, int | float | jax.Array):
        raise TypeError(
            error_message(
                what=f"{s!r} is not a schedule",
                expected="a number, a function of the step, or the config of such a function",
            )
        )
    return lambda step: jnp.broadcast_to(jnp.asarray(s, dtype=jnp.float32), jnp.shape(step))


def _as_float(step: jax.Array) -> jax.Array:
    return jnp.asarray(step, dtype=jnp.float32)


def _check_increasing(fn: str, **steps: float) -> None:
    """Raises ValueError unless the named steps are not negative and strictly increase in the order given."""
    values = list(steps.values())
    if values[0] < 0 or any(not a < b for a, b in itertools.pairwise(values)):
        raise ValueError(
            error_message(
                where=f"schedule.{fn}",
                what=", ".join(f"{name}={value}" for name, value in steps.items()) + " do not increase",
                expected="0 <= " + " < ".join(steps),
                advice="Change the number of steps; a schedule has its own and does not follow the trainer's",
            )
        )


def _fraction(step: jax.Array, *, begin_step: float, end_step: float) -> jax.Array:
    """How far `step` is on the way from `begin_step` to `end_step`, clipped to [0, 1]."""
    return jnp.clip((_as_float(step) - begin_step) / (end_step - begin_step), 0.0, 1.0)


def polynomial(
    *,
    begin_step: int = 0,
    begin_value: float = 0.0,
    end_step: int,
    end_value: float,
    power: float = 1.0,
) -> ScheduleFn:
    """From one value to another: `begin_value + (end_value - begin_value) * fraction ** power`.

    `fraction` is 0 until `begin_step`, 1 from `end_step` on, and linear between. (`optax.polynomial_schedule`
    raises `1 - fraction` to the power instead; the two agree at power 1.)

    Args:
        begin_step: The last step with `begin_value`.
        begin_value: The value before.
        end_step: The first step with `end_value`.
        end_value: The value after.
        power: 1 is linear; above 1 starts slowly.

    Returns:
        The schedule.

    Raises:
        ValueError: If the steps do not increase.
    """
    _check_increasing("polynomial", begin_step=begin_step, end_step=end_step)

    def schedule(step: jax.Array) -> jax.Array:
        fraction = _fraction(step, begin_step=begin_step, end_step=end_step)
        return begin_value + (end_value - begin_value) * fraction**power

    return schedule


def exponential(*, begin_step: int = 0, begin_value: float, end_step: int, end_value: float) -> ScheduleFn:
    """From one positive value to another, by the same factor at each step; constant before and after.

    Args:
        begin_step: The last step with `begin_value`.
        begin_value: The value before, above 0.
        end_step: The first step with `end_value`.
        end_value: The value after, above 0.

    Returns:
        The schedule.

    Raises:
        ValueError: If the steps do not increase, or a value is not above 0.
    """
    _check_increasing("exponential", begin_step=begin_step, end_step=end_step)
    if begin_value <= 0 or end_value <= 0:
        raise ValueError(
            error_message(
                where="schedule.exponential",
                what=f"begin_value={begin_value}, end_value={end_value}",
                expected="two numbers above 0, because no factor leads to or from 0",
            )
        )
    log_ratio = math.log(end_value / begin_value)

    def schedule(step: jax.Array) -> jax.Array:
        return begin_value * jnp.exp(log_ratio * _fraction(step, begin_step=begin_step, end_step=end_step))

    return schedule


def _linear_warmup(step: jax.Array, *, begin_value: float, peak_lr: float, warmup_steps: int) -> jax.Array:
    """On the line from `begin_value` at step 0 to `peak_lr` at `warmup_steps`, also beyond its ends."""
    return begin_value + (peak_lr - begin_value) * (_as_float(step) / max(warmup_steps, 1))


def _with_linear_warmup(
    after: ScheduleFn, *, begin_value: float, peak_lr: float, warmup_steps: int
) -> ScheduleFn:
    """The line to the peak before `warmup_steps`, and `after` (of the same step) from there on."""

    def schedule(step: jax.Array) -> jax.Array:
        warmup = _linear_warmup(step, begin_value=begin_value, peak_lr=peak_lr, warmup_steps=warmup_steps)
        return jnp.where(jnp.asarray(step) < warmup_steps, warmup, after(step))

    return schedule


def cosine_with_linear_warmup(
    peak_lr: float,
    *,
    max_step: int,
    warmup_steps: int = 500,
    begin_value: float = 0.0,
    alpha: float = 0.0,
    decay_begin_step: Optional[int] = None,
) -> ScheduleFn:
    """A line up to the peak, then half a cosine wave down to `alpha * peak_lr`, where it stays.

    Args:
        peak_lr: The value at step `warmup_steps`.
        max_step: The step at which the wave ends.
        warmup_steps: Length of the warm-up; 0 starts at the peak.
        begin_value: Where the warm-up starts, at step 0, which no update sees.
        alpha: The floor as a fraction of the peak; the wave is squeezed to end there, not cut off.
        decay_begin_step: Until when the peak holds; None: `warmup_steps`.

    Returns:
        The schedule.

    Raises:
        ValueError: If the steps do not increase.

    Reference:
        Loshchilov and Hutter, SGDR (https://arxiv.org/abs/1608.03983), equation 5 without restarts.
    """
    begin_name = "warmup_steps" if decay_begin_step is None else "decay_begin_step"
    decay_begin_step = warmup_steps if decay_begin_step is None else decay_begin_step
    _check_increasing("cosine_with_linear_warmup", **{begin_name: decay_begin_step, "max_step": max_step})
    if decay_begin_step < warmup_steps:
        raise ValueError(
            error_message(
                where="schedule.cosine_with_linear_warmup",
                what=f"decay_begin_step={decay_begin_step} lies before the end of the warm-up",
                expected=f"None, or at least warmup_steps={warmup_steps}",
            )
        )

    def decay(step: jax.Array) -> jax.Array:
        fraction = _fraction(step, begin_step=decay_begin_step, end_step=max_step)
        wave = 0.5 * (1.0 + jnp.cos(jnp.pi * fraction))
        return peak_lr * ((1.0 - alpha) * wave + alpha)

    return _with_linear_warmup(decay, begin_value=begin_value, peak_lr=peak_lr, warmup_steps=warmup_steps)


def constant_with_linear_warmup(
    peak_lr: float, *, warmup_steps: int = 500, begin_value: float = 0.0
) -> ScheduleFn:
    """A line up to the peak, then the peak for ever.

    Args:
        peak_lr: The value from step `warmup_steps` on.
        warmup_steps: Length of the warm-up; 0 starts at the peak.
        begin_value: Where the warm-up starts, at step 0.

    Returns:
        The schedule.
    """
    return _with_linear_warmup(
        as_schedule_fn(peak_lr), begin_value=begin_value, peak_lr=peak_lr, warmup_steps=warmup_steps
    )


def linear_schedule_with_warmup(
    peak_lr: float,
    *,
    max_step: int,
    warmup_steps: int = 500,
    begin_value: float = 0.0,
    end_value: float = 0.0,
) -> ScheduleFn:
    """A line up to the peak, then a line down to `end_value`, where it stays.

    Args:
        peak_lr: The value at step `warmup_steps`.
        max_step: The step at which `end_value` is reached.
        warmup_steps: Length of the warm-up; 0 starts at the peak.
        begin_value: Where the warm-up starts, at step 0.
        end_value: The value from `max_step` on.

    Returns:
        The schedule.

    Raises:
        ValueError: If the steps do not increase.
    """
    _check_increasing("linear_schedule_with_warmup", warmup_steps=warmup_steps, max_step=max_step)
    decay = polynomial(begin_step=warmup_steps, begin_value=peak_lr, end_step=max_step, end_value=end_value)
    return _with_linear_warmup(decay, begin_value=begin_value, peak_lr=peak_lr, warmup_steps=warmup_steps)


def warmup_stable_decay(
    peak_lr: float,
    *,
    max_step: int,
    decay_begin_step: int,
    warmup_steps: int = 500,
    begin_value: float = 0.0,
    alpha: float = 0.0,
    decay_power: float = 1.0,
) -> ScheduleFn:
    """A line up to the peak, the peak for most of the run, and a short decay at its end.

    Runs that share the warm-up and the peak can branch off from one another's checkpoints.

    Args:
        peak_lr: The value from `warmup_steps` to `decay_begin_step`.
        max_step: The step at which the decay ends.
        decay_begin_step: The last step at the peak.
        warmup_steps: Length of the warm-up; 0 starts at the peak.
        begin_value: Where the warm-up starts, at step 0.
        alpha: The value from `max_step` on, as a fraction of the peak.
        decay_power: Shape of the decay: the value falls by `fraction ** decay_power`; 1 is a line, 0.5 is
            "1-sqrt".

    Returns:
        The schedule.

    Raises:
        ValueError: If the steps do not increase.

    Reference:
        Hägele et al., Scaling laws and compute-optimal training beyond fixed training durations
        (https://arxiv.org/abs/2405.18392), section 3.
    """
    _check_increasing(
        "warmup_stable_decay", warmup_steps=warmup_steps, decay_begin_step=decay_begin_step, max_step=max_step
    )
    decay = polynomial(
        begin_step=decay_begin_step,
        begin_value=peak_lr,
        end_step=max_step,
        end_value=alpha * peak_lr,
        power=decay_power,
    )
    return _with_linear_warmup(decay, begin_value=begin_value, peak_lr=peak_lr, warmup_steps=warmup_steps)


def inverse_sqrt(peak_lr: float, *, warmup_steps: int = 10_000) -> ScheduleFn:
    """A line up to the peak, then `peak_lr * sqrt(warmup_steps / step)`.

    Args:
        peak_lr: The value at step `warmup_steps`.
        warmup_steps: Length of the warm-up, at least 1; the default is T5's.

    Returns:
        The schedule.

    Raises:
        ValueError: If `warmup_steps` is less than 1.

    Reference:
        Vaswani et al., Attention is all you need (https://arxiv.org/abs/1706.03762), equation 3.
    """
    _check_increasing("inverse_sqrt", zero=0, warmup_steps=warmup_steps)

    def decay(step: jax.Array) -> jax.Array:
        return peak_lr * jnp.sqrt(warmup_steps / jnp.maximum(_as_float(step), warmup_steps))

    return _with_linear_warmup(decay, begin_value=0.0, peak_lr=peak_lr, warmup_steps=warmup_steps)


def adafactor(
    scale: float, *, warmup_steps: int = 10_000, decay_power: float = -0.5, step_offset: int = 0
) -> ScheduleFn:
    """`scale * max(step - step_offset, warmup_steps) ** decay_power`: constant, then a power law.

    Args:
        scale: The factor.
        warmup_steps: How long the value stays constant.
        decay_power: The exponent, negative for a decay.
        step_offset: The step that counts as 0, for a run that continues another.

    Returns:
        The schedule.

    Reference:
        Raffel et al., T5 (https://arxiv.org/abs/1910.10683), section 3.1.2.
    """

    def schedule(step: jax.Array) -> jax.Array:
        return scale * jnp.maximum(_as_float(step) - step_offset, float(max(warmup_steps, 1))) ** decay_power

    return schedule


def adafactor_decay_rate(c: float = 0.8, *, step_offset: int = 0) -> ScheduleFn:
    """The decay of Adafactor's second moments, `1 - (step - step_offset) ** -c`: 0 at step 1, rising to 1.

    Args:
        c: The exponent, in (0, 1].
        step_offset: The step that counts as 0, for a run that continues another.

    Returns:
        The schedule.

    Reference:
        Shazeer and Stern, Adafactor (https://arxiv.org/abs/1804.04235), section 7.2.
    """
    return lambda step: 1.0 - jnp.maximum(_as_float(step) - step_offset, 1.0) ** (-c)


def decay_bias_correction(decay: float) -> ScheduleFn:
    """The decay that makes an exponential moving average, started at zero, equal to its bias-corrected form.

    `decay * (1 - decay ** (step - 1)) / (1 - decay ** step)`: 0 at step 1, where the average is the first
    value.

    Args:
        decay: The decay that is approached, in [0, 1).

    Returns:
        The schedule.

    Raises:
        ValueError: If `decay` is not in [0, 1).

    Reference:
        Shazeer and Stern, Adafactor (https://arxiv.org/abs/1804.04235), section 7.1.
    """
    if not 0 <= decay < 1:
        raise ValueError(
            error_message(
                where="schedule.decay_bias_correction", what=f"decay={decay}", expected="a number in [0, 1)"
            )
        )
    if decay == 0:
        return as_schedule_fn(0.0)
    log_decay = math.log(decay)

    def schedule(step: jax.Array) -> jax.Array:
        step = _as_float(step)
        # expm1, because 1 - decay ** step cancels where decay is close to 1 and step small.
        return decay * jnp.expm1(log_decay * (step - 1.0)) / jnp.expm1(log_decay * step)

    return schedule


def ema_schedule(decay: float = 0.9999, *, warmup_steps: int = 1) -> ScheduleFn:
    """A decay for averages of parameters: 0 up to step `warmup_steps`, then `decay`.

    While it is 0, the average is a copy of the parameters.

    Args:
        decay: The decay after the warm-up.
        warmup_steps: For how many steps it is 0; at least 1, since averages start at zero.

    Returns:
        The schedule.

    Raises:
        ValueError: If `warmup_steps` is less than 1.
    """
    _check_increasing("ema_schedule", zero=0, warmup_steps=warmup_steps)
    return lambda step: jnp.where(jnp.asarray(step) <= warmup_steps, 0.0, jnp.float32(decay))


def stepwise(sub: Sequence[Schedule], start_step: Sequence[int]) -> ScheduleFn:
    """One schedule after another, each counting from 0 where it starts.

    Args:
        sub: The schedules, in order.
        start_step: Where each but the first starts, increasing; one number fewer than schedules.

    Returns:
        The schedule: at `step`, the value of the last `sub[i]` that has started, at its own step
        `step - start_step[i - 1]` (the first: at `step`).

    Raises:
        ValueError: If the numbers of schedules and of starts do not fit, or the starts do not increase.
    """
    if len(start_step) != len(sub) - 1:
        raise ValueError(
            error_message(
                where="schedule.stepwise",
                what=f"{len(sub)} schedules and {len(start_step)} starts",
                expected="one start for each schedule but the first",
            )
        )
    _check_increasing("stepwise", **{f"start_step_{i}": start for i, start in enumerate((0, *start_step))})
    sub_fns = [as_schedule_fn(s) for s in sub]

    def schedule(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step)
        value = sub_fns[0](step)
        for sub_fn, start in zip(sub_fns[1:], start_step, strict=True):
            value = jnp.where(step < start, value, sub_fn(step - start))
        return value

    return schedule


def segment_wise(segments: Sequence[Schedule], segment_steps: Sequence[int]) -> ScheduleFn:
    """One schedule after another, each counting from 1 within its segment; 0 outside of all segments.

    Args:
        segments: The schedules, in order.
        segment_steps: The length of each.

    Returns:
        The schedule. Steps 1 to `segment_steps[0]` belong to the first segment, and so on.

    Raises:
        ValueError: If there is not one length per segment, or a length is not above 0.
    """
    if len(segments) != len(segment_steps):
        raise ValueError(
            error_message(
                where="schedule.segment_wise",
                what=f"{len(segments)} segments and {len(segment_steps)} lengths",
                expected="one length for each segment",
            )
        )
    ends = [sum(segment_steps[: i + 1]) for i in range(len(segment_steps))]
    _check_increasing("segment_wise", **{f"end_{i}": end for i, end in enumerate((0, *ends))})
    segment_fns = [as_schedule_fn(s) for s in segments]

    def schedule(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step)
        value = jnp.zeros_like(step, dtype=jnp.float32)
        for segment_fn, begin, end in zip(segment_fns, (0, *ends[:-1]), ends, strict=True):
            inside = jnp.logical_and(step > begin, step <= end)
            value = jnp.where(inside, segment_fn(step - begin), value)
        return value

    return schedule
