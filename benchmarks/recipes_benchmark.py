"""What all recipes on C4 cost, as multiples of `import jax`: building them, their shapes, printing them.

    .venv/bin/python benchmarks/recipes_benchmark.py

Each figure is the least of some fresh processes, interleaved with as many of `import jax`, in one run. Shapes are those
of the model's parameters and of the learner's state, on no device. The budget of the project for imports, building,
shapes and printing of all recipes together is 30.
"""

import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
import time

NUM_REPEATS = 5
ROOT = pathlib.Path(__file__).resolve().parents[1]
IMPORT_JAX = (
    "import time; t = time.perf_counter(); import jax; print([['import jax', time.perf_counter() - t]])"
)


def measure(*, goldens: bool) -> list[tuple[str, float]]:
    """Seconds of each phase in this process, in their order.

    Args:
        goldens: Whether to measure what golden files cost beyond, too.
    """
    times = []
    started = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal started
        now = time.perf_counter()
        times.append((name, now - started))
        started = time.perf_counter()

    from axlearn.common import golden_config
    from axlearn.experiments.text.gpt import c4_trainer

    lap("imports, jax among them")
    configs = [recipe() for recipe in c4_trainer.named_trainer_configs().values()]
    lap(f"building {len(configs)} configs")
    for cfg in configs:
        model = cfg.model.clone(name="model").instantiate(parent=None)
        learner = cfg.learner.clone(name="learner").instantiate(parent=None)
        learner.create_state_partition_specs(model.create_parameter_specs_recursively())
    lap("shapes")
    for cfg in configs:
        golden_config.config_text(cfg)
    lap("printing")
    if not goldens:
        return times
    for cfg in configs:
        golden_config.init_text(cfg)
    lap("beyond: initialisation as text")
    for cfg in configs:
        golden_config.regularizer_text(cfg)
    lap("beyond: decay as text, by tracing the learner")
    return times


def in_new_process(arguments: list[str]) -> list[tuple[str, float]]:
    """What a process prints as JSON."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.replace("'", '"'))


def main() -> None:
    base, times = [], []
    for _ in range(NUM_REPEATS):
        base.append(in_new_process(["-c", IMPORT_JAX])[0][1])
        times.append(in_new_process([__file__, "--measure", "--goldens"]))
    jax_seconds = min(base)
    phases = {name: min(dict(t)[name] for t in times) for name, _ in times[0]}
    total = sum(seconds for name, seconds in phases.items() if not name.startswith("beyond"))
    versions = f"Python {platform.python_version()}, jax {importlib.metadata.version('jax')}"
    print(f"{versions}, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}, least of {NUM_REPEATS}")
    print(f"{'':45}  seconds  x import jax")
    rows = [("import jax", jax_seconds), *phases.items(), ("imports, building, shapes and printing", total)]
    for name, seconds in rows:
        print(f"{name:45} {seconds:8.2f} {seconds / jax_seconds:13.2f}")


if __name__ == "__main__":
    if "--measure" in sys.argv:
        print(json.dumps(measure(goldens="--goldens" in sys.argv)))
    else:
        main()
