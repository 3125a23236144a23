"""What a checkpoint costs: how long the step waits, how long until it is durable and verified, how long a
restore takes.

The reference, in the same run, is Orbax's StandardCheckpointer with its defaults: asynchronous too, without
hashes, and with an fsync of its array files only. Each number is the median of several rounds after a warm-up
round.

    python benchmarks/checkpoint_benchmark.py [--mb 64] [--num_arrays 40] [--rounds 5] [--dir /tmp]

Results are kept in `checkpoint_benchmark.md`.
"""

import argparse
import importlib.metadata
import pathlib
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from axlearn.common.checkpointer import Checkpointer
from axlearn.common.utils import TensorSpec, build_mesh, use_mesh


class Times(NamedTuple):
    """Seconds: until `save` returns, until the checkpoint is durable, and of a restore."""

    blocked: float
    saved: float
    restored: float


def _timed(fn: Callable[[], Any]) -> float:
    started_at = time.perf_counter()
    fn()
    return time.perf_counter() - started_at


def _measure(
    save: Callable[[int], None], wait: Callable[[], None], restore: Callable[[int], Any], *, rounds: int
) -> Times:
    times = []
    for step in range(1, rounds + 2):
        blocked = _timed(lambda step=step: save(step))
        saved = blocked + _timed(wait)
        restored = _timed(lambda step=step: jax.block_until_ready(restore(step)))
        times.append(Times(blocked, saved, restored))
    return Times(*(statistics.median(column) for column in zip(*times[1:], strict=True)))


def _ours(base_dir: pathlib.Path, state: Any, specs: Any, *, rounds: int) -> Times:
    cfg = Checkpointer.default_config().set(name="checkpointer", dir=str(base_dir))
    checkpointer = cfg.instantiate(parent=None)
    try:
        return _measure(
            lambda step: checkpointer.save(step=step, state=state),
            checkpointer.wait_until_finished,
            lambda step: checkpointer.restore(step=step, state=specs).state,
            rounds=rounds,
        )
    finally:
        checkpointer.stop()


def _orbax(base_dir: pathlib.Path, state: Any, *, rounds: int) -> Times:
    import orbax.checkpoint as ocp

    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    with ocp.StandardCheckpointer() as checkpointer:
        return _measure(
            lambda step: checkpointer.save(base_dir / str(step), state),
            checkpointer.wait_until_finished,
            lambda step: checkpointer.restore(base_dir / str(step), target),
            rounds=rounds,
        )


def _copy(state: Any) -> float:
    """The least that a save can block for: one copy of the state."""
    return statistics.median(
        _timed(lambda: jax.tree.map(lambda x: np.array(x, copy=True), state)) for _ in range(5)
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mb", type=float, default=64, help="size of the state, in 10^6 bytes")
    parser.add_argument("--num_arrays", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", default=None, help="where to write (default: the system's temporary folder)")
    args = parser.parse_args()

    size = max(1, int(args.mb * 1e6 / 4 / args.num_arrays))
    work = pathlib.Path(tempfile.mkdtemp(dir=args.dir))
    mesh = build_mesh(mesh_shape=(1,), mesh_axis_names=("data",), devices=jax.devices()[:1])
    with use_mesh(mesh):
        specs = {f"w{i}": TensorSpec((size,), jnp.float32) for i in range(args.num_arrays)}
        rng = np.random.default_rng(0)
        state = {
            name: jax.device_put(rng.standard_normal(size, dtype=np.float32), spec.sharding)
            for name, spec in specs.items()
        }
        try:
            rows = {
                "axlearn": _ours(work / "axlearn", state, specs, rounds=args.rounds),
                "orbax": _orbax(work / "orbax", state, rounds=args.rounds),
            }
            copy = _copy(state)
        finally:
            shutil.rmtree(work)

    names = ("jax", "tensorstore", "orbax-checkpoint")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    print(f"{args.mb:g} MB in {args.num_arrays} arrays; one copy of it on the host: {copy * 1e3:.1f} ms")
    device = jax.devices()[0].device_kind
    print(f"Python {platform.python_version()} on {device}, {versions}, {time.strftime('%F')}")
    print(f"{'':10}{'blocked ms':>12}{'saved ms':>12}{'MB/s':>8}{'restore ms':>12}{'MB/s':>8}")
    for name, times in rows.items():
        print(
            f"{name:10}{times.blocked * 1e3:12.1f}{times.saved * 1e3:12.1f}{args.mb / times.saved:8.0f}"
            f"{times.restored * 1e3:12.1f}{args.mb / times.restored:8.0f}"
        )


if __name__ == "__main__":
    main()
