"""Starts the launcher for tests: many command lines in one process, or one of them for real."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]

# For XLA_FLAGS. Code generation is most of what a sharded step takes to compile, and what the tests compare is decided
# before it: compiling for tests/common/attention/layer_conformance_test.py takes 41 s as XLA would by itself, 16 s
# without LLVM's passes, and 8 s with the older, plainer emitters as well (two cores, jax 0.10.2, December 2026).
# `make test-scale` compiles as users do.
QUICK_COMPILES = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"

# Runs the command once per case, and prints status and standard error of each.
_DRIVER = """
import contextlib, io, json, logging, sys
from axlearn.common import launch_trainer_main
from axlearn.experiments import registry
registry.RECIPE_MODULES = ("tests.common.trainer.tiny_recipe",)
results = {}
for name, arguments in json.loads(sys.argv[1]).items():
    for flag in launch_trainer_main.FLAGS:
        launch_trainer_main.FLAGS[flag].unparse()
    launch_trainer_main.FLAGS.unparse_flags()
    logging.root.handlers.clear()
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        status = launch_trainer_main.main(["launch_trainer_main", *arguments])
    results[name] = [status, errors.getvalue()]
print(json.dumps(results))
"""


def environment(*, num_devices: int = 1, paths: tuple[pathlib.Path, ...] = (), **more: str) -> dict[str, str]:
    """Returns the environment of a launcher: this one's, but for the number of devices and what is importable."""
    flags = f"--xla_force_host_platform_device_count={num_devices} {QUICK_COMPILES}"
    env = {**os.environ, "XLA_FLAGS": flags, **more}
    # Of this test process, for its own number of devices; the launcher sets its own.
    env.pop("NPROC", None)
    return {**env, "PYTHONPATH": os.pathsep.join(map(str, [ROOT, *paths]))}


def command(*arguments: str) -> list[str]:
    """Returns the command with these arguments."""
    return [sys.executable, "-m", "axlearn.common.launch_trainer_main", *arguments]


def run_cases(
    cases: dict[str, list[str]], *, cwd: pathlib.Path, env: dict[str, str]
) -> dict[str, tuple[int, str]]:
    """Runs the command with the arguments of each case, and returns (status, standard error) by case."""
    done = subprocess.run(
        [sys.executable, "-c", _DRIVER, json.dumps(cases)],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {name: (status, text) for name, (status, text) in json.loads(done.stdout).items()}


def as_text(results: dict[str, tuple[int, str]], *, replaced: dict[pathlib.Path, str]) -> str:
    """Returns what `run_cases` returns as the text of a golden file, with some paths replaced by names."""
    text = "\n".join(
        f"--- {name}: status {status}\n{errors.strip()}" for name, (status, errors) in results.items()
    )
    for path, name in replaced.items():
        text = text.replace(str(path), name)
    return text + "\n"
