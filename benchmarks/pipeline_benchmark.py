"""What the bubble of a pipeline costs, and what streaming saves, on four devices that are parts of one CPU.

The reference, in the same run, is the same model on a mesh of `data=4`, whose devices do no work twice. The devices
share the cores, so a step takes as long as all of them work together, and what a pipeline of N stages spends on its
bubble shows in full: with M micro-batches, a step should take (M + N - 1) / M times the reference. Cases take turns, so
that a disturbance of the machine hits them alike; the median counts. Memory is the compiler's own sum of temporary
memory on each device: activations, and micro-batches that wait.

    python benchmarks/pipeline_benchmark.py [--steps 10]

Results are kept in `pipeline_benchmark.md`.
"""

import argparse
import datetime
import os
import platform
import statistics
import time
from typing import Any, Optional

_NUM_STAGES = 4
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={_NUM_STAGES} " + os.environ.get(
    "XLA_FLAGS", ""
)
# See axlearn.common.launch: with few threads, collectives of devices that share a CPU can wait for each other.
os.environ.setdefault("NPROC", "64")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from axlearn.common.attention import RepeatedTransformerLayer, build_remat_spec  # noqa: E402
from axlearn.common.input_fake import FakeLmInput  # noqa: E402
from axlearn.common.pipeline import BaseSchedule, GPipeSchedule, StreamSchedule  # noqa: E402
from axlearn.common.trainer import SpmdTrainer  # noqa: E402
from axlearn.common.utils import host_to_global_array  # noqa: E402
from axlearn.experiments.text.gpt import common, gspmd  # noqa: E402

_MIB = 2**20
_BATCH_SIZE, _SEQ_LEN, _DIM, _NUM_LAYERS, _VOCAB_SIZE = 64, 64, 128, 8, 256
_NUM_MICROBATCHES = (4, 8, 16)


def _trainer(schedule: Optional[type[BaseSchedule]], num_microbatches: int) -> SpmdTrainer:
    cfg = gspmd.trainer_config()
    cfg.model = gspmd.model_config(
        schedule=(schedule or GPipeSchedule).default_config(),
        dim=_DIM,
        num_heads=4,
        num_kv_heads=4,
        num_layers=_NUM_LAYERS,
        num_stages=_NUM_STAGES,
        num_microbatches=num_microbatches,
        vocab_size=_VOCAB_SIZE,
    )
    axes = {"pipeline": _NUM_STAGES}
    if schedule is None:
        axes = {"data": _NUM_STAGES}
        stack = RepeatedTransformerLayer.default_config()
        layer = cfg.model.decoder.transformer.layer.clone(remat_spec=build_remat_spec(stack))
        cfg.model.decoder.transformer = stack.set(num_layers=_NUM_LAYERS, layer=layer)
    cfg.input = FakeLmInput.default_config().set(
        global_batch_size=_BATCH_SIZE, source_length=_SEQ_LEN, vocab_size=_VOCAB_SIZE
    )
    cfg.set(dir="unused", evalers={}, mesh_shape=common.mesh_shape_from_axes(**axes), train_dtype=jnp.float32)
    return cfg.instantiate(parent=None)


class _Case:
    """One schedule and number of micro-batches, compiled, and the seconds of its steps."""

    def __init__(self, schedule: Optional[type[BaseSchedule]], num_microbatches: int):
        self.name = "data=4, no pipeline" if schedule is None else schedule.__name__
        self.num_microbatches = num_microbatches
        self.expected = 1.0 if schedule is None else (num_microbatches + _NUM_STAGES - 1) / num_microbatches
        self._trainer = _trainer(schedule, num_microbatches)
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
        """Temporary memory of a step on one device."""
        return self._step_fn.memory_analysis().temp_size_in_bytes / _MIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10, help="steps to measure, of each")
    num_steps = parser.parse_args().steps
    schedules = [(schedule, num) for schedule in (GPipeSchedule, StreamSchedule) for num in _NUM_MICROBATCHES]
    cases = [_Case(*args) for args in [(None, 1), *schedules]]
    for i in range(num_steps + 2):
        for case in cases:
            case.step()
            if i < 2:
                case.seconds.clear()
    waiting = _BATCH_SIZE * _SEQ_LEN * _DIM * 4 / _MIB
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(
        f"jax {jax.__version__}, {jax.device_count()} x {jax.devices()[0].device_kind}, {datetime.date.today()}, "
        f"{num_steps} steps of {_BATCH_SIZE} rows of {_SEQ_LEN} tokens, {_NUM_LAYERS} layers of {_DIM} in "
        f"{_NUM_STAGES} stages; hidden states of the batch {waiting:.1f} MiB"
    )
    print(
        f"{'schedule':>20}{'micro-batches':>15}{'step':>10}{'ratio':>8}{'by formula':>12}"
        f"{'temporary memory':>18}{'compiled in':>13}"
    )
    reference = statistics.median(cases[0].seconds)
    for case in cases:
        median = statistics.median(case.seconds)
        print(
            f"{case.name:>20}{case.num_microbatches:>15}{1e3 * median:>7.0f} ms{median / reference:>8.2f}"
            f"{case.expected:>12.2f}{case.temp_mib():>14.1f} MiB{case.compile_seconds:>11.1f} s"
        )


if __name__ == "__main__":
    main()
