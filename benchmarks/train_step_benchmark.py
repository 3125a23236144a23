"""What a training step costs: ours, against a bare jitted step of the same maths, and against flax with optax.

The bare step starts from our parameters and must print our losses, else the comparison would be void. Steps are
timed in interleaved pairs, forwards and backwards in turn (ours, bare, flax, flax, bare, ours, ...), so that a busy
moment of the machine falls on all; a ratio is the median over the pairs. Compile time (trace, lowering and XLA, without
a cache) and the memory that the compiled program states are told apart.

    python benchmarks/train_step_benchmark.py [--pairs 5] [--steps 100] [--depth] [--check] [--platform cpu|gpu]

`--depth` instead compares the compile time of our step at depths 8 and 80. With `--check` the status is 1 where ours
takes more than 1.03 times as long as the bare step, or depth 80 compiles for more than 1.2 times as long as depth 8. On
a GPU the model is one that keeps it busy.

Results are kept in `train_step_benchmark.md`.
"""

import argparse
import dataclasses
import datetime
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import train_step_references as references
from train_step_references import Sizes

from axlearn.common.input_fake import FakeLmInput
from axlearn.common.trainer import SpmdTrainer
from axlearn.common.utils import host_to_global_array
from axlearn.experiments.text.gpt import common

# What `--check` holds us to.
_MAX_STEP_RATIO = 1.03
_MAX_DEPTH_RATIO = 1.2

_SIZES = Sizes(
    dim=512,
    num_layers=2,
    num_heads=8,
    num_kv_heads=8,
    ffn_dim=1408,
    vocab_size=2048,
    batch_size=2,
    seq_len=64,
)
_GPU_SIZES = Sizes(
    dim=2048,
    num_layers=8,
    num_heads=16,
    num_kv_heads=8,
    ffn_dim=5632,
    vocab_size=32768,
    batch_size=8,
    seq_len=1024,
)


class Program(NamedTuple):
    """A compiled step with its state, which it consumes and returns."""

    step: Callable[..., Any]
    state: Any
    compile_seconds: float
    peak_bytes: int


def our_trainer(sizes: Sizes, *, folder: str) -> SpmdTrainer:
    """Returns a trainer of a model of these sizes, in float32."""
    norm = common.rms_norm_config()
    layer = common.layer_config(
        attention=common.attention_config(
            num_heads=sizes.num_heads, num_kv_heads=sizes.num_kv_heads, rope_theta=1e4
        ),
        feed_forward_dim=sizes.ffn_dim,
        norm=norm,
    )
    cfg = common.trainer_config(
        model=common.model_config(
            vocab_size=sizes.vocab_size,
            dim=sizes.dim,
            num_layers=sizes.num_layers,
            layer=layer,
            norm=norm,
            remat=sizes.remat,
        ),
        learner=common.learner_config(
            peak_lr=sizes.peak_lr,
            max_step=sizes.max_step,
            warmup_steps=sizes.warmup_steps,
            weight_decay=sizes.weight_decay,
        ),
        max_step=sizes.max_step,
        save_every_n_steps=sizes.max_step,
        mesh_shape=common.mesh_shape_from_axes(data=-1),
        train_dtype=jnp.float32,
        keep_every_n_steps=None,
    )
    cfg.input = FakeLmInput.default_config().set(
        global_batch_size=sizes.batch_size, source_length=sizes.seq_len, vocab_size=sizes.vocab_size
    )
    cfg.dir = folder
    trainer: SpmdTrainer = cfg.instantiate(parent=None)
    return trainer


def _compiled(step: Callable[..., Any], state: Any, batch: Any) -> Program:
    jax.clear_caches()
    start = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
    seconds = time.perf_counter() - start
    return Program(compiled, state, seconds, _peak_bytes(compiled))


def _peak_bytes(compiled: Any) -> int:
    """The state, of which a donated one is the old and the new, and what the program needs besides."""
    memory = compiled.memory_analysis()
    return int(memory.argument_size_in_bytes + memory.temp_size_in_bytes)


def _our_program(trainer: SpmdTrainer) -> Program:
    jax.clear_caches()
    start = time.perf_counter()
    compiled = trainer.compile_train_step()
    return Program(compiled, trainer.trainer_state, time.perf_counter() - start, _peak_bytes(compiled))


def _time(program: Program, batch: Any, *, num_steps: int) -> tuple[Program, float]:
    state = program.state
    start = time.perf_counter()
    for _ in range(num_steps):
        state, _ = program.step(state, batch)
    jax.block_until_ready(state)
    return program._replace(state=state), (time.perf_counter() - start) / num_steps


def _check_same_maths(ours: Program, bare: Program, batch: Any) -> tuple[Program, Program]:
    for _ in range(5):
        our_state, outputs = ours.step(ours.state, batch)
        bare_state, loss = bare.step(bare.state, batch)
        ours, bare = ours._replace(state=our_state), bare._replace(state=bare_state)
        difference = abs(float(outputs["loss"]) / float(loss) - 1)
        # On a GPU products of float32 are rounded to fewer bits.
        limit = 1e-5 if jax.default_backend() == "cpu" else 1e-3
        assert difference < limit, f"the bare step computes something else: losses differ by {difference}"
    return ours, bare


def compare_steps(sizes: Sizes, *, pairs: int, num_steps: int) -> float:
    """Prints compile time, memory and step time of the three; returns the ratio of our step to the bare one."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = our_trainer(sizes, folder=folder)
        trainer.init(jax.random.PRNGKey(0))
        with trainer.mesh():
            batch = host_to_global_array(
                next(trainer.input.batches()), partition=trainer.input.partition_spec
            )
            init_bare, bare_step = references.bare_step(sizes)
            init_flax, flax_step = references.flax_step(sizes)
            params = jax.tree.map(jnp.copy, jax.tree.map(lambda x: x, dict(trainer.trainer_state.model)))
            programs = {
                "ours": _our_program(trainer),
                "bare": _compiled(bare_step, init_bare(params), batch),
                "flax": _compiled(flax_step, init_flax(jax.random.PRNGKey(0), batch), batch),
            }
            programs["ours"], programs["bare"] = _check_same_maths(programs["ours"], programs["bare"], batch)
            seconds: dict[str, list[float]] = {name: [] for name in programs}
            for i in range(pairs):
                for name in list(programs)[:: 1 if i % 2 == 0 else -1]:
                    programs[name], per_step = _time(programs[name], batch, num_steps=num_steps)
                    seconds[name].append(per_step)
    print(f"{pairs} pairs of {num_steps} steps, {sizes}")
    print(f"  {'':6s} {'step':>12s} {'ratio':>8s} {'compile':>10s} {'state + temporaries':>22s}")
    ratios = {
        name: statistics.median(a / b for a, b in zip(seconds[name], seconds["bare"], strict=True))
        for name in programs
    }
    for name, program in programs.items():
        print(
            f"  {name:6s} {statistics.median(seconds[name]) * 1e3:9.2f} ms {ratios[name]:8.3f} "
            f"{program.compile_seconds:8.2f} s {program.peak_bytes / 2**20:18.1f} MiB"
        )
    return ratios["ours"]


def compare_depths(sizes: Sizes, *, depths: tuple[int, ...] = (8, 80), pairs: int = 3) -> float:
    """Prints how long our step compiles at several depths; returns the ratio of the last to the first."""
    seconds: dict[int, list[float]] = {depth: [] for depth in depths}
    for _ in range(pairs):
        for depth in depths:
            with tempfile.TemporaryDirectory() as folder:
                trainer = our_trainer(dataclasses.replace(sizes, num_layers=depth), folder=folder)
                jax.clear_caches()
                with trainer.mesh():
                    start = time.perf_counter()
                    trainer.compile_train_step()
                    seconds[depth].append(time.perf_counter() - start)
    for depth in depths:
        ratio = statistics.median(a / b for a, b in zip(seconds[depth], seconds[depths[0]], strict=True))
        print(
            f"  depth {depth:3d}: compiles in {statistics.median(seconds[depth]):6.2f} s, ratio {ratio:.3f}"
        )
    return ratio


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=5, help="interleaved pairs")
    parser.add_argument("--steps", type=int, default=100, help="steps of each in a pair")
    parser.add_argument("--depth", action="store_true", help="compare compile times at depths 8 and 80")
    parser.add_argument("--check", action="store_true", help="status 1 where a bound is broken")
    parser.add_argument("--platform", choices=("cpu", "gpu"), help="by default what jax finds")
    arguments = parser.parse_args()
    if arguments.pairs < 1 or arguments.steps < 1:
        parser.error("--pairs and --steps are at least 1")
    if arguments.platform is not None:
        jax.config.update("jax_platforms", "cuda" if arguments.platform == "gpu" else "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {datetime.date.today()}")
    sizes = _SIZES if jax.default_backend() == "cpu" else _GPU_SIZES
    if arguments.depth:
        ratio, limit = compare_depths(_SIZES, pairs=arguments.pairs), _MAX_DEPTH_RATIO
    else:
        ratio = compare_steps(sizes, pairs=arguments.pairs, num_steps=arguments.steps)
        limit = _MAX_STEP_RATIO
    if not arguments.check:
        return 0
    print(f"  {ratio:.3f}, and at most {limit} is allowed: {'kept' if ratio <= limit else 'broken'}")
    return 0 if ratio <= limit else 1


if __name__ == "__main__":
    sys.exit(main())
