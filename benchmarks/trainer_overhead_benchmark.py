"""What the loop around a step costs: the host's time between two dispatches, as a share of the step.

The reference, in the same run, is the bare compiled step, dispatched again and again on one batch that
lies on the device. The trainer's loop in addition reads and checks batches, puts them on the mesh, follows
the position in the data, and asks the writer, the evalers and the checkpointer whether something is due; here
nothing is.

    python benchmarks/trainer_overhead_benchmark.py [--steps 24]

Results are kept in `trainer_overhead_benchmark.md`.
"""

import argparse
import datetime
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax

from axlearn.common.input_fake import FakeLmInput
from axlearn.common.trainer import SpmdTrainer
from axlearn.common.trainer._prefetch import BatchPrefetcher
from axlearn.common.utils import host_to_global_array
from axlearn.experiments.text.gpt import fuji_tiny

# Steps that are not measured: the first five are due to be logged.
_WARM_UP_STEPS = 6
_SEQ_LEN = 128
_BATCH_SIZE = 4


def _trainer(folder: str, *, num_steps: int) -> SpmdTrainer:
    cfg = fuji_tiny.trainer_config()
    cfg.set(dir=folder, max_step=_WARM_UP_STEPS + num_steps, evalers={}, log_every_n_steps=10**9)
    cfg.summary_writer.write_every_n_steps = 10**9
    cfg.input = FakeLmInput.default_config().set(
        global_batch_size=_BATCH_SIZE, source_length=_SEQ_LEN, vocab_size=fuji_tiny.VOCAB_SIZE
    )
    return cfg.instantiate(parent=None)


class _Stopwatch:
    """Notes when each call begins and ends."""

    def __init__(self, fn: Callable[..., Any]):
        self._fn = fn
        self.calls: list[tuple[float, float]] = []

    def __call__(self, *args: Any) -> Any:
        start = time.perf_counter()
        try:
            return self._fn(*args)
        finally:
            self.calls.append((start, time.perf_counter()))


def _seconds_per_bare_step(trainer: SpmdTrainer, *, num_steps: int) -> float:
    trainer.init(jax.random.PRNGKey(0))
    with trainer.mesh():
        step_fn, state = trainer.compile_train_step(), trainer.trainer_state
        batch = host_to_global_array(next(trainer.input.batches()), partition=trainer.input.partition_spec)
        for i in range(num_steps + 1):
            if i == 1:
                jax.block_until_ready(state)
                start = time.perf_counter()
            state, _ = step_fn(state, batch)
        jax.block_until_ready(state)
    return (time.perf_counter() - start) / num_steps


def _run_with_stopwatches(trainer: SpmdTrainer) -> tuple[_Stopwatch, _Stopwatch]:
    """Runs the trainer; returns what was noted of the dispatches and of the waits for a batch."""
    dispatches: list[_Stopwatch] = []
    gets: list[_Stopwatch] = []
    compile_step = trainer._compile
    enter = BatchPrefetcher.__enter__

    def compile_with_stopwatch() -> _Stopwatch:
        dispatches.append(_Stopwatch(compile_step()))
        return dispatches[0]

    def enter_with_stopwatch(prefetcher: BatchPrefetcher) -> BatchPrefetcher:
        gets.append(_Stopwatch(prefetcher.get))
        prefetcher.get = gets[0]
        return enter(prefetcher)

    trainer._compile = compile_with_stopwatch
    BatchPrefetcher.__enter__ = enter_with_stopwatch
    try:
        trainer.run(jax.random.PRNGKey(0))
    finally:
        BatchPrefetcher.__enter__ = enter
    return dispatches[0], gets[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=24, help="steps to measure")
    num_steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(folder, num_steps=num_steps)
        bare = _seconds_per_bare_step(trainer, num_steps=num_steps)
        dispatch, get = _run_with_stopwatches(trainer)
    steps = range(_WARM_UP_STEPS, _WARM_UP_STEPS + num_steps - 1)
    per_step = (dispatch.calls[steps[-1]][0] - dispatch.calls[steps[0]][0]) / (len(steps) - 1)
    between = [dispatch.calls[i][0] - dispatch.calls[i - 1][1] for i in steps]
    waiting = [get.calls[i][1] - get.calls[i][0] for i in steps]
    host = [b - w for b, w in zip(between, waiting, strict=True)]
    in_dispatch = [dispatch.calls[i][1] - dispatch.calls[i][0] for i in steps]
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(
        f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {datetime.date.today()}, {num_steps} steps"
    )
    rows = [
        ("bare step", bare),
        ("step in the loop", per_step),
        ("host between two dispatches, without waiting for a batch (median)", statistics.median(host)),
        ("the same, worst", max(host)),
        ("dispatch (median)", statistics.median(in_dispatch)),
        ("waiting for a batch: the device is busy (median)", statistics.median(waiting)),
    ]
    for name, seconds in rows:
        share = "" if math.isclose(seconds, bare) else f"{seconds / bare:8.2%} of the bare step"
        print(f"  {name:66s} {seconds * 1e3:10.3f} ms {share}")


if __name__ == "__main__":
    main()
