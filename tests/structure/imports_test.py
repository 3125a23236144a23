"""What an import may load: the budget of the design, measured in fresh processes."""

import json
import os
import pathlib
import resource
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]

# Modules that load only when something that needs them is instantiated.
HEAVY = ("tensorflow", "orbax", "grain", "tensorflow_datasets", "tensorboardX", "transformers", "tensorstore")


def _loaded_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(chr(10).join(sorted({{m.split('.')[0] for m in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def _cpu_seconds(arguments: list[str]) -> float:
    """CPU seconds of one process: less disturbed by a busy neighbour than the clock on the wall."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _ratio_to_importing_jax(arguments: list[str]) -> float:
    ours, jax = [], []
    for _ in range(3):
        jax.append(_cpu_seconds(["-c", "import jax"]))
        ours.append(_cpu_seconds(arguments))
    return min(ours) / min(jax)


def test_the_config_core_loads_neither_jax_nor_numpy():
    assert not _loaded_after("import axlearn.common.config") & {"jax", "numpy", "absl", *HEAVY}


@pytest.mark.parametrize(
    "module",
    [
        "axlearn.common.trainer",
        "axlearn.experiments.text.gpt.fuji_tiny",
        "axlearn.experiments.text.gpt.c4_trainer",
    ],
)
def test_the_trainer_and_recipes_load_no_heavy_library(module):
    assert not _loaded_after(f"import {module}") & set(HEAVY)


@pytest.mark.parametrize(
    "arguments",
    [
        ["-m", "axlearn.common.launch_trainer_main", "--help"],
        ["-m", "axlearn.cli.main", "--help"],
        ["-c", "import axlearn.common.launch_trainer"],
    ],
    ids=["launch_trainer_main --help", "axlearn --help", "import launch_trainer"],
)
def test_start_costs_at_most_one_and_a_half_times_importing_jax(arguments):
    assert _ratio_to_importing_jax(arguments) <= 1.5


@pytest.mark.parametrize("package", ["experiments", "launch"])
def test_the_short_name_of_a_linked_package_is_refused(package):
    done = subprocess.run(
        [sys.executable, "-c", f"import {package}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == (
        f"ImportError: This package was imported as '{package}'; import it as 'axlearn.{package}', because under "
        "the short name every module in it would exist twice."
    )


@pytest.fixture(scope="module")
def installed_wheel(tmp_path_factory):
    """An environment that holds our wheel and nothing else: its interpreter."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    # Built from a copy, so that two test processes never share a build folder.
    source = folder / "source"
    subprocess.run(["git", "init", "-q", str(source)], check=True)
    for name in ("axlearn", "experiments", "launch", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        subprocess.run(["cp", "-a", str(ROOT / name), str(source)], check=True)
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(source)], check=True
    )
    (wheel,) = folder.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    python = folder / "venv" / "bin" / "python"
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), "-q", "install", "--no-deps", str(wheel)],
        check=True,
    )
    return python


def test_the_wheel_holds_the_linked_folders_as_real_packages(installed_wheel, tmp_path):
    code = (
        "import json, pathlib, axlearn.common.config, axlearn.experiments, axlearn.launch\n"
        "root = pathlib.Path(axlearn.experiments.__file__)\n"
        "print(json.dumps([str(root), root.parent.is_symlink(), "
        "sorted(p.name for p in root.parent.glob('text/gpt/*.py'))]))"
    )
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [str(installed_wheel), "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    path, is_link, recipes = json.loads(done.stdout)
    assert "site-packages" in path
    assert not is_link
    assert "fuji_tiny.py" in recipes
