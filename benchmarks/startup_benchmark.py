"""How long a start takes, as multiples of `import jax`: --help, and fuji-tiny's first step from a warm cache.

    .venv/bin/python benchmarks/startup_benchmark.py

The run is the recipe as it is: the data of its evaluation is opened before the first step. Each figure is the
least of some fresh processes, interleaved with as many of `import jax`, in one run. Budgets of the project: 1.5
for --help, 5 for the first step.
"""

import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile
import time

NUM_REPEATS = 5
ROOT = pathlib.Path(__file__).resolve().parents[1]
LAUNCH = [sys.executable, "-m", "axlearn.common.launch_trainer_main"]


def seconds_until(arguments: list[str], *, line_with: str | None) -> float:
    """Seconds from the start of a process to its first line with a text, or to its end."""
    started = time.perf_counter()
    process = subprocess.Popen(
        arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
    )
    elapsed = None
    for line in process.stdout:
        if line_with is not None and line_with in line and elapsed is None:
            elapsed = time.perf_counter() - started
    process.wait()
    if line_with is None:
        return time.perf_counter() - started
    assert elapsed is not None, f"no line with {line_with!r} from {' '.join(arguments)}"
    return elapsed


def first_step(folder: pathlib.Path) -> float:
    """Seconds from the start of a run that begins from scratch to the log line of its first step."""
    shutil.rmtree(folder, ignore_errors=True)
    run = [*LAUNCH, "--config=fuji-tiny", f"--trainer_dir={folder}", "--set", "max_step=1"]
    return seconds_until(run, line_with="step 1/1")


def main() -> None:
    with tempfile.TemporaryDirectory() as tmp:
        folder = pathlib.Path(tmp) / "run"
        first_step(folder)  # Fills the caches: tokenizer, tokens, compiled programs.
        times: dict[str, list[float]] = {"import jax": [], "--help": [], "first step, warm cache": []}
        for _ in range(NUM_REPEATS):
            times["import jax"].append(seconds_until([sys.executable, "-c", "import jax"], line_with=None))
            times["--help"].append(seconds_until([*LAUNCH, "--help"], line_with=None))
            times["first step, warm cache"].append(first_step(folder))
    base = min(times["import jax"])
    print(f"Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}, least of {NUM_REPEATS}")
    print(f"{'':24} {'seconds':>8} {'x import jax':>13}")
    for name, values in times.items():
        print(f"{name:24} {min(values):8.2f} {min(values) / base:13.2f}")


if __name__ == "__main__":
    main()
