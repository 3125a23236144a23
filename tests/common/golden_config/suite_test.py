"""`golden_tests` in somebody else's project: nothing of our conftest is there."""

import os
import pathlib
import subprocess
import sys

import pytest

from axlearn.common.golden_config import golden_tests
from axlearn.common.golden_config._tests import _is_update_asked_for

ROOT = pathlib.Path(__file__).resolve().parents[3]

RECIPES = """\
from axlearn.common.config import with_overrides
from axlearn.experiments.text.gpt import fuji_tiny

def named_trainer_configs():
    return {"tiny": fuji_tiny.trainer_config, "tiny-7": with_overrides(fuji_tiny.trainer_config, max_step=7)}
"""
TESTS = """\
from axlearn.common.golden_config import golden_tests

test_goldens = golden_tests("my_project.recipes", golden_dir="tests/golden")
test_sums = golden_tests(
    "my_project.recipes", golden_dir="tests/sums", kinds=("config", "init"), texts="tiny", match="tiny.*"
)
"""


@pytest.fixture
def project(tmp_path):
    (tmp_path / "my_project").mkdir()
    (tmp_path / "my_project" / "__init__.py").write_text("")
    (tmp_path / "my_project" / "recipes.py").write_text(RECIPES)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "golden_test.py").write_text(TESTS)
    return tmp_path


def _pytest(project: pathlib.Path, *, update: bool = False) -> str:
    """Runs the project's tests as a user does; returns what pytest prints."""
    env = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{project}",
        "UPDATE_GOLDEN": "1" if update else "0",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={project}"]
    done = subprocess.run(command, cwd=project, env=env, capture_output=True, text=True, check=False)
    return done.stdout


def _edit(path: pathlib.Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_golden_files_are_written_compared_and_swept(project):
    goldens = project / "tests" / "golden" / "my_project.recipes"
    sums = project / "tests" / "sums" / "my_project.recipes"

    assert "12 passed" in _pytest(project, update=True)
    assert {path.name for path in goldens.iterdir()} == {
        f"{name}{kind}.txt" for name in ("tiny", "tiny-7") for kind in ("", "_init", "_regularizer")
    }
    assert {path.name for path in sums.iterdir()} == {"SHA256SUMS", "tiny.txt", "tiny_init.txt"}
    lines = (sums / "SHA256SUMS").read_text().splitlines()
    assert [line.split()[1] for line in lines] == [
        "tiny-7.txt",
        "tiny-7_init.txt",
        "tiny.txt",
        "tiny_init.txt",
    ]

    # A changed recipe, a file too many, two that are lost, one of another time; and a newline that an editor put
    # at an end, which does not matter.
    _edit(project / "my_project" / "recipes.py", "max_step=7", "max_step=9, log_every_n_steps=3")
    (goldens / "tinny_init.txt").write_text("")
    (goldens / "tiny-7_init.txt").unlink()
    _edit(sums / "SHA256SUMS", lines[1] + "\n", "")
    _edit(goldens / "tiny.txt", "max_step: 500\n", "max_step: 600\nmax_steps: 1\n")
    (goldens / "tiny_init.txt").write_text((goldens / "tiny_init.txt").read_text() + "\n")
    out = _pytest(project)
    assert "6 failed, 6 passed" in out
    for text in (
        "tests/golden/my_project.recipes: golden files of configs that my_project.recipes does not have: "
        "tinny_init.txt.",
        "tiny-7 (init): there is nothing about it in tests/golden/my_project.recipes/tiny-7_init.txt.",
        "tiny-7 (init): there is nothing about it in tests/sums/my_project.recipes/SHA256SUMS.",
        "UPDATE_GOLDEN=1 pytest writes it",
        "~ max_step: 600 -> 500\n- max_steps: 1\n",
        "~ log_every_n_steps: 10 -> 3\n~ max_step: 7 -> 9\n",
        "tiny-7: has another sum than in tests/sums/my_project.recipes/SHA256SUMS.",
        "Its text at any commit: axlearn config show tiny-7 --module=my_project.recipes",
    ):
        assert text in out, out

    # What differs is written, what belongs to nothing is removed.
    assert "12 passed" in _pytest(project, update=True)
    assert not (goldens / "tinny_init.txt").exists()
    assert "max_step: 9" in (goldens / "tiny-7.txt").read_text()
    assert (sums / "SHA256SUMS").read_text().splitlines()[1:] == lines[1:]


def _recipes(monkeypatch, configs):
    module = type(sys)("some_recipes")
    module.named_trainer_configs = lambda: configs
    monkeypatch.setitem(sys.modules, "some_recipes", module)


@pytest.mark.parametrize(
    ("configs", "options", "message"),
    [
        ({"a": None}, {"match": "b"}, r"match: no config of some_recipes matches 'b'.*\n.*such as 'a'"),
        ({"a": None}, {"kinds": ["inits"]}, r"kinds: unknown kind 'inits'.*\n.*Did you mean 'init'"),
        ({}, {}, r"some_recipes has no named_trainer_configs\(\)"),
        ({"a/b": None}, {}, r"the name 'a/b' cannot be that of a file"),
        (lambda name: None, {}, r"some_recipes.named_trainer_configs\(\): a function.*\n.*a dict from names"),
    ],
)
def test_what_would_test_nothing_is_refused_when_tests_are_collected(monkeypatch, configs, options, message):
    _recipes(monkeypatch, configs)
    with pytest.raises(ValueError, match=message):
        golden_tests("some_recipes", golden_dir="golden", **options)


def test_a_module_that_pytest_does_not_find_is_answered_with_what_to_write():
    with pytest.raises(ModuleNotFoundError, match=r"no module 'no_such_project'\.\n  .*pythonpath"):
        golden_tests("no_such_project.recipes", golden_dir="golden")


@pytest.mark.parametrize(
    ("value", "is_asked_for"), [("1", True), ("true", True), ("0", False), ("False", False)]
)
def test_only_a_yes_writes_golden_files(monkeypatch, value, is_asked_for):
    monkeypatch.setenv("UPDATE_GOLDEN", value)
    assert _is_update_asked_for() is is_asked_for
