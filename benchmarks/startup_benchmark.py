"""How long starts take, as multiples of `import jax`: help, `config show`, a dry run, a refusal, a first step.

    .venv/bin/python benchmarks/startup_benchmark.py

The run is the recipe as it is: the data of its evaluation is opened before the first step. Each figure is the
least of some fresh processes, interleaved with as many of `import jax`, in one run. What is refused is the recipe
in the shape of a model of 70 billion parameters; its most memory at any time is printed too, beside that of
`import jax`. Budgets of the project: 1.5 for --help, 2.5 for `config show`, 5 for the first step
from a warm cache, 10 for the refusal.
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
IMPORT_JAX = [sys.executable, "-c", "import jax"]
_LAYER = "model.decoder.transformer.layer"
SEVENTY_BILLION = [
    "model.decoder.dim=8192",
    "model.decoder.vocab_size=128256",
    "model.decoder.transformer.num_layers=80",
    f"{_LAYER}.self_attention.attention.num_heads=64",
    f"{_LAYER}.self_attention.attention.input_linear.input_linear.num_kv_heads=8",
    f"{_LAYER}.feed_forward.hidden_dim=28672",
]


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


def peak_megabytes(arguments: list[str]) -> float:
    """The most memory that a process holds, in MB, measured by a fresh parent of its own."""
    code = (
        "import resource, subprocess, sys\n"
        "subprocess.run(sys.argv[1:], capture_output=True)\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return int(done.stdout) * 1024 / 1e6


def main() -> None:
    with tempfile.TemporaryDirectory() as tmp:
        folder = pathlib.Path(tmp) / "run"
        first_step(folder)  # Fills the caches: tokenizer, tokens, compiled programs.
        sets = [f"--set={override}" for override in SEVENTY_BILLION]
        refused = [*LAUNCH, "--config=fuji-tiny", f"--trainer_dir={tmp}/refused", *sets]
        commands = {
            "import jax": IMPORT_JAX,
            "--help": [*LAUNCH, "--help"],
            "config show fuji-70B": [sys.executable, "-m", "axlearn.cli.main", "config", "show", "fuji-70B"],
            "--dry_run": [*LAUNCH, "--config=fuji-tiny", "--dry_run"],
            "refusal of 70B": refused,
        }
        times: dict[str, list[float]] = {name: [] for name in [*commands, "first step, warm cache"]}
        for _ in range(NUM_REPEATS):
            for name, command in commands.items():
                times[name].append(seconds_until(command, line_with=None))
            times["first step, warm cache"].append(first_step(folder))
        memory = {name: peak_megabytes(commands[name]) for name in ("import jax", "refusal of 70B")}
    base = min(times["import jax"])
    print(f"Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}, least of {NUM_REPEATS}")
    print(f"{'':24} {'seconds':>8} {'x import jax':>13}")
    for name, values in times.items():
        print(f"{name:24} {min(values):8.2f} {min(values) / base:13.2f}")
    print("most memory: " + ", ".join(f"{name} {size:.0f} MB" for name, size in memory.items()))


if __name__ == "__main__":
    main()
