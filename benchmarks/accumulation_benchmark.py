"""What gradient accumulation costs in time and saves in memory, at the same global batch.

The reference, in the same run, is the step without accumulation. Steps of 1, 2 and 4 micro-batches take turns, so
that a disturbance of the machine hits them alike; the median counts. Memory is the compiler's own sum: temporary
memory is where activations and the sums of gradients are.

    python benchmarks/accumulation_benchmark.py [--steps 12]

Results are kept in `accumulation_benchmark.md`.
"""

import argparse
import datetime
import os
import platform
import statistics
import time
from typing import Any

import jax
import numpy as np

from axlearn.common.input_fake import FakeLmInput
from axlearn.common.trainer import SpmdTrainer
from axlearn.common.trainer_config_modifier import GradientAccumulationModifier
from axlearn.common.utils import host_to_global_array
from axlearn.experiments.text.gpt import fuji_tiny

_MIB = 2**20
_GRAD_ACC_STEPS = (1, 2, 4)


def _trainer(grad_acc_steps: int) -> SpmdTrainer:
    cfg = fuji_tiny.trainer_config()
    cfg.set(dir="unused", evalers={})
    cfg.input = FakeLmInput.default_config().set(
        global_batch_size=fuji_tiny.BATCH_SIZE,
        source_length=fuji_tiny.SEQ_LEN,
        vocab_size=fuji_tiny.VOCAB_SIZE,
    )
    GradientAccumulationModifier.default_config().set(grad_acc_steps=grad_acc_steps).instantiate()(cfg)
    return cfg.instantiate(parent=None)


class _Case:
    """One number of micro-batches, compiled, and the seconds of its steps."""

    def __init__(self, grad_acc_steps: int):
        self._trainer = _trainer(grad_acc_steps)
        self._trainer.init(jax.random.PRNGKey(0))
        self._state: Any = self._trainer.trainer_state
        with self._trainer.mesh():
            start = time.perf_counter()
            self._step_fn = self._trainer.compile_train_step()
            self.compile_seconds = time.perf_counter() - start
            batch = next(self._trainer.input.batches())
            self._batch = host_to_global_array(batch, partition=self._trainer.input.partition_spec)
        self.seconds: list[float] = []

    def step(self) -> None:
        """Does one step and waits for it."""
        start = time.perf_counter()
        self._state, outputs = self._step_fn(self._state, self._batch)
        jax.block_until_ready((self._state, outputs))
        self.seconds.append(time.perf_counter() - start)

    def temp_mib(self) -> float:
        """Temporary memory of a step."""
        return self._step_fn.memory_analysis().temp_size_in_bytes / _MIB

    def gradient_mib(self) -> float:
        """What one copy of the gradients takes."""
        return sum(x.nbytes for x in jax.tree.leaves(self._state.model)) / _MIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12, help="steps to measure, of each")
    num_steps = parser.parse_args().steps
    cases = {steps: _Case(steps) for steps in _GRAD_ACC_STEPS}
    for i in range(num_steps + 2):
        for case in cases.values():
            case.step()
            if i < 2:
                case.seconds.clear()
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(
        f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {datetime.date.today()}, {num_steps} steps of "
        f"{fuji_tiny.BATCH_SIZE} rows of {fuji_tiny.SEQ_LEN} tokens; gradients {cases[1].gradient_mib():.1f} MiB"
    )
    print(
        f"{'micro-batches':>15}{'step':>12}{'ratio':>8}{'temporary memory':>20}{'ratio':>8}{'compiled in':>14}"
    )
    reference = cases[1]
    for steps, case in cases.items():
        median, memory = statistics.median(case.seconds), case.temp_mib()
        print(
            f"{steps:>15}{1e3 * median:>9.0f} ms{median / statistics.median(reference.seconds):>8.2f}"
            f"{memory:>16.1f} MiB{memory / reference.temp_mib():>8.2f}{case.compile_seconds:>12.1f} s"
        )
    assert np.isfinite([second for case in cases.values() for second in case.seconds]).all()


if __name__ == "__main__":
    main()
