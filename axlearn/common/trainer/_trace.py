"""Profiles of chosen steps, written beside the run's summaries for xprof."""

from collections.abc import Sequence
from typing import Any, Literal, Optional, Union

import jax

from axlearn.common.config import error_message
from axlearn.common.profiling import start_profile, stop_profile

# Steps of a profile that nobody gave a length: enough to see a steady state, small enough to open.
_DEFAULT_NUM_STEPS = 3


class StepTracer:
    """Starts and stops the profiler around windows of steps.

    Windows that touch the same steps become one profile. A window that begins before the first step of this
    process, because the run continues behind it, is not recorded again.

    Args:
        folder: Where profiles go; see `profiling.start_profile`.
        start_steps: The steps with which a window begins.
        num_steps: Steps per window; None for 3.
        process_indices: The processes that record, or "all".
        host_level, device_level, python_level: The profiler's levels of detail; None for its own defaults.
        tpu_mode: The TPU profiler's mode; None for its own default.

    Raises:
        ValueError: If a level is not known to this profiler.
    """

    def __init__(
        self,
        folder: str,
        *,
        start_steps: Sequence[int],
        num_steps: Optional[int],
        process_indices: Union[Sequence[int], Literal["all"]],
        host_level: Optional[int] = None,
        device_level: Optional[int] = None,
        python_level: Optional[int] = None,
        tpu_mode: Optional[str] = None,
    ):
        here = process_indices == "all" or jax.process_index() in process_indices
        self._folder = folder
        self._start_steps = frozenset(start_steps) if here else frozenset()
        self._num_steps = _DEFAULT_NUM_STEPS if num_steps is None else num_steps
        self._options = jax.profiler.ProfileOptions()
        if host_level is not None:
            self._options.host_tracer_level = host_level
        if python_level is not None:
            self._options.python_tracer_level = python_level
        if device_level is not None:
            _set_device_level(self._options, device_level)
        if tpu_mode is not None:
            self._options.advanced_configuration = {"tpu_trace_mode": tpu_mode}
        # The last step of the profile that is being recorded; None while none is.
        self._last_step: Optional[int] = None

    def before_step(self, step: int) -> None:
        """Starts a profile if a window begins with `step`, or lets the one that is running go on."""
        if step not in self._start_steps:
            return
        last_step = step + self._num_steps - 1
        if self._last_step is not None:
            self._last_step = max(self._last_step, last_step)
        elif start_profile(self._folder, session=f"step_{step:08d}", options=self._options):
            self._last_step = last_step

    def after_step(self, step: int, outputs: object, *, is_last: bool = False) -> None:
        """Ends the profile whose last step this is; for that it waits for the device.

        Args:
            step: The step that was dispatched.
            outputs: What it returned.
            is_last: Whether no step follows: what comes then is in no window.
        """
        if self._last_step is not None and (is_last or step >= self._last_step):
            jax.block_until_ready(outputs)
            self.close()

    def close(self) -> None:
        """Ends a profile that is being recorded."""
        if self._last_step is not None:
            self._last_step = None
            stop_profile()


def step_tracer(cfg: Any, *, folder: str) -> StepTracer:
    """Returns the tracer that a trainer config asks for.

    Args:
        cfg: A `SpmdTrainer.Config`.
        folder: Where profiles go.
    """
    return StepTracer(
        folder,
        start_steps=cfg.start_trace_steps,
        num_steps=cfg.n_steps_for_each_trace,
        process_indices=cfg.start_trace_process_indices,
        host_level=cfg.host_tracer_level,
        device_level=cfg.device_tracer_level,
        python_level=cfg.python_tracer_level,
        tpu_mode=cfg.tpu_trace_mode,
    )


def _set_device_level(options: jax.profiler.ProfileOptions, level: int) -> None:
    if not hasattr(options, "device_tracer_level"):
        raise ValueError(
            error_message(
                where="device_tracer_level",
                what=f"{level}, but the profiler of jax {jax.__version__} has no such level",
                expected="None",
            )
        )
    options.device_tracer_level = level
