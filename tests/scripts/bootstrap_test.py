"""The set-up step says in one sentence when a Python does not fit, and pins every package by hash and by no host."""

import importlib.util
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
_SPEC = importlib.util.spec_from_file_location("bootstrap", ROOT / "scripts" / "bootstrap.py")
bootstrap = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(bootstrap)


@pytest.mark.parametrize("version", [(3, 11), (3, 12), (3, 13)])
def test_supported_pythons_have_no_problem(version):
    assert bootstrap.version_problem(version) is None
    assert pathlib.Path(bootstrap.pins_file(str(ROOT), "core", version)).is_file()


@pytest.mark.parametrize(("version", "word"), [((2, 7), "old"), ((3, 10), "old"), ((3, 14), "new")])
def test_other_pythons_get_one_sentence(version, word):
    problem = bootstrap.version_problem(version)
    assert problem == (
        f"Python {version[0]}.{version[1]} is too {word}: this project runs on Python 3.11 to 3.13; "
        "name another one with `make PYTHON=python3.12 ...`."
    )


def test_the_bootstrap_compiles_for_a_python_that_is_too_old():
    source = (ROOT / "scripts" / "bootstrap.py").read_text(encoding="utf-8")
    assert "f'" not in source
    assert 'f"' not in source
    assert ":=" not in source


@pytest.mark.parametrize("version", [(3, 11), (3, 12), (3, 13)])
def test_libtpu_is_of_the_version_that_jax_asks_for(version):
    text = pathlib.Path(bootstrap.pins_file(str(ROOT), "tpu-aot", version)).read_text(encoding="utf-8")
    # What jax's extra `tpu` requires, by its own metadata (2026-12).
    libtpu_of = {"0.10.2": "0.0.42", "0.12.0.1": "0.0.50"}
    dev = pathlib.Path(bootstrap.pins_file(str(ROOT), "dev", version)).read_text(encoding="utf-8")
    jax_version = re.search(r"^jax==(\S+)", dev, re.MULTILINE)[1]
    assert re.search(r"^libtpu==(\d+\.\d+\.\d+)", text)[1] == libtpu_of[jax_version]


@pytest.mark.parametrize("path", sorted((ROOT / "requirements").glob("*.txt")), ids=lambda p: p.name)
def test_pins_are_exact_hashed_and_name_no_host(path):
    text = path.read_text(encoding="utf-8")
    assert "://" not in text
    requirements = re.split(r"\n(?=\S)", text.strip())
    # libtpu alone, on top of the others.
    assert len(requirements) == 1 if path.name.startswith("tpu-aot") else len(requirements) > 50
    for requirement in requirements:
        assert re.match(r"[a-z0-9._\[\],-]+==\S+", requirement), requirement
        assert "--hash=sha256:" in requirement, requirement


def test_a_wrong_word_is_refused():
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "bootstrap.py"), "everything"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.strip() == "usage: bootstrap.py core|dev|tpu-aot"
