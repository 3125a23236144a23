"""Profiles of chosen steps, written beside the run's summaries for xprof or perfetto."""

from collections.abc import Sequence
from typing import Literal, Optional, Union

import jax
from absl import logging

from axlearn.common.config import error_message

# Steps of a profile that nobody gave a length: enough to see a steady state, small enough to open.
_DEFAULT_NUM_STEPS = 3


class StepTracer:
    """Starts and stops the profiler around the steps it was given.

    Args:
        folder: Where profiles go.
        start_steps: The steps with which a profile begins.
        num_steps: Steps per profile; None for 3.
        process_indices: The processes that record, or "all".
        host_level, device_level, python_level: The profiler's levels of detail; None for its own defaults.
        tpu_mode: The TPU profiler's mode; None for its own default.
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
        """Starts a profile if one begins with `step`."""
        if self._last_step is None and step in self._start_steps:
            jax.profiler.start_trace(self._folder, profiler_options=self._options)
            self._last_step = step + self._num_steps - 1

    def after_step(self, step: int, outputs: object) -> None:
        """Ends the profile whose last step this is; for that it waits for the device."""
        if self._last_step is not None and step >= self._last_step:
            jax.block_until_ready(outputs)
            self.close()

    def close(self) -> None:
        """Ends a profile that is being recorded."""
        if self._last_step is not None:
            self._last_step = None
            jax.profiler.stop_trace()
            logging.info("Wrote a profile into %s.", self._folder)


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
