"""Tokens per second and model FLOPs utilisation, from the batches that were really trained on."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Optional

import jax
import jax.numpy as jnp

from axlearn.common.flops import FlopsPerToken, peak_flops
from axlearn.common.utils import build_mesh, use_mesh

# Side of the square matrices of the measured peak: large enough for the matmul to dominate its launch (2.1
# GFLOP), small enough to take some 40 ms on two CPU cores.
_PEAK_MATMUL_SIZE = 1024
_PEAK_REPEATS = 3


class Peak(NamedTuple):
    """What utilisation is measured against.

    Attributes:
        flops_per_second: Of all devices together.
        source: Where the number is from: the device's data sheet or a measurement.
    """

    flops_per_second: float
    source: str


class Reading(NamedTuple):
    """The pace since the previous reading.

    Attributes:
        steps_per_second: Steps, without pauses for evaluation and saving.
        tokens_per_second: Tokens that are not padding.
        mfu_full: Model FLOPs utilisation with full attention; None where the model does not tell its FLOPs.
        mfu_causal: The same with the attention that a causal mask leaves.
        peak: What the utilisation is measured against; None with it.
    """

    steps_per_second: float
    tokens_per_second: float
    mfu_full: Optional[float]
    mfu_causal: Optional[float]
    peak: Optional[Peak]


def device_peak(devices: Sequence[jax.Device], *, dtype: Any) -> Peak:
    """Returns the peak of `devices` for matmuls in `dtype`.

    A kind of device that the table does not know (every CPU) is measured: a square matmul on one device. The
    devices of one host's CPU share its cores, so there the one measurement is the peak of all.

    Args:
        devices: The devices of the mesh, all of one kind.
        dtype: The type in which the step computes.
    """
    device = devices[0]
    known = peak_flops(device.device_kind, jnp.dtype(dtype).name)
    if known is not None:
        return Peak(known * len(devices), f"{device.device_kind} data sheet")
    num_alone = len({d.process_index for d in devices}) if device.platform == "cpu" else len(devices)
    return Peak(_measured_matmul_flops(device, dtype=dtype) * num_alone, "measured matmul peak")


def _measured_matmul_flops(device: jax.Device, *, dtype: Any) -> float:
    matmul = jax.jit(jnp.matmul)
    seconds = []
    # A mesh of its own: computations of one device do not fit the mesh of the trainer.
    with use_mesh(build_mesh(mesh_shape=(1,), mesh_axis_names=("device",), devices=[device])):
        x = jnp.ones((_PEAK_MATMUL_SIZE, _PEAK_MATMUL_SIZE), dtype)
        jax.block_until_ready(matmul(x, x))
        for _ in range(_PEAK_REPEATS):
            start = time.perf_counter()
            jax.block_until_ready(matmul(x, x))
            seconds.append(time.perf_counter() - start)
    return 2 * _PEAK_MATMUL_SIZE**3 / min(seconds)


class Throughput:
    """Counts what was trained on between two readings.

    Read it right after the host waited for the device: then the steps that were counted are also done.

    Args:
        devices: The devices of the mesh.
        dtype: The type in which the step computes, for the peak.
        flops_per_token: The model's FLOPs per token of training; None if it does not tell them.
    """

    def __init__(
        self, *, devices: Sequence[jax.Device], dtype: Any, flops_per_token: Optional[FlopsPerToken]
    ):
        self._devices = devices
        self._dtype = dtype
        self._flops_per_token = flops_per_token
        self._peak: Optional[Peak] = None
        self.restart()

    def count(self, *, num_tokens: int) -> None:
        """Counts one dispatched step."""
        self._num_steps += 1
        self._num_tokens += num_tokens

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """A context whose time is not training: an evaluation, a save."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._start += time.perf_counter() - start

    def read(self) -> Reading:
        """Returns the pace since the last reading, and starts the next one."""
        seconds = max(time.perf_counter() - self._start, 1e-9)
        steps_per_second, tokens_per_second = self._num_steps / seconds, self._num_tokens / seconds
        if self._flops_per_token is None:
            reading = Reading(steps_per_second, tokens_per_second, None, None, None)
        else:
            if self._peak is None:
                self._peak = device_peak(self._devices, dtype=self._dtype)
            reading = Reading(
                steps_per_second,
                tokens_per_second,
                self._flops_per_token.full * tokens_per_second / self._peak.flops_per_second,
                self._flops_per_token.causal * tokens_per_second / self._peak.flops_per_second,
                self._peak,
            )
        self.restart()
        return reading

    def restart(self) -> None:
        """Forgets what was counted, and starts a reading now."""
        self._start = time.perf_counter()
        self._num_steps = 0
        self._num_tokens = 0
