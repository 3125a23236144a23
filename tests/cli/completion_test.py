"""What shells complete after `axlearn`."""

import json
import os
import subprocess
import sys

import pytest

from axlearn.cli import _completion_facts, completion, main
from axlearn.cli._completion_words import candidates, typed_path
from tests.conftest import REPO_ROOT

MODULE = "--module=tests.cli.config_recipe"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("AXLEARN_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "completion"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("axlearn comp", ["completion "]),
        ("axlearn config sh", ["show "]),
        ("axlearn config ", ["check ", "diff ", "explain ", "list ", "show "]),
        ("axlearn config nothing ", []),
        ("axlearn generate ", []),
        (f"axlearn config show {MODULE} bigrams-", ["bigrams-without-rules "]),
        (f"axlearn config diff {MODULE} bigrams p", ["pairs "]),
        (f"axlearn config show {MODULE} bigrams@tpu-v4", ["bigrams@tpu-v4-8 "]),
        (f"axlearn config check {MODULE} pairs --mesh_selector=tpu-v4", ["--mesh_selector=tpu-v4-8 "]),
        (f"axlearn config check {MODULE} pairs --mesh_selector gpu-p5.48xlarge-1", ["gpu-p5.48xlarge-16 "]),
        ("axlearn config check --all", ["--all_rules "]),
        ("axlearn config show --pa", ["--path="]),
        (f"axlearn config explain {MODULE} bigrams learner.optimizer.b", [
            "learner.optimizer.b1 ", "learner.optimizer.b2 ",
        ]),
        (f"axlearn config explain {MODULE} bigrams learner.opt", ["learner.optimizer."]),
        (f"axlearn config explain {MODULE} bigrams max_step extra", []),
        (f"axlearn config show {MODULE} bigrams --set learner.optimizer.learning_rate.p", [
            "learner.optimizer.learning_rate.peak_lr=",
        ]),
        (f"axlearn config show {MODULE} bigrams --set=max_s", ["--set=max_step="]),
        (f"axlearn config show {MODULE} bigrams --set max_step=", []),
        (f"axlearn config show {MODULE} bigrams --json --path=mesh_shape.", [
            "--path=mesh_shape.0 ", "--path=mesh_shape.1 ",
        ]),
        ("axlearn config show 'unfinished", []),
    ],
)  # fmt: skip
def test_words_that_can_stand_at_the_cursor(line, words):
    assert candidates(line) == words


def test_keys_and_indices_are_offered_without_quotes():
    assert typed_path("evalers['train'].input.args[0]") == "evalers.train.input.args.0"
    assert typed_path("rules['.*weight$'].fan") == "rules['.*weight$'].fan"


def test_recipes_are_loaded_once_and_again_when_a_file_changes(monkeypatch, tmp_path, cache):
    module = tmp_path / "completed_recipes.py"
    module.write_text("from tests.cli.config_recipe import *  # noqa")
    monkeypatch.chdir(tmp_path)
    line = "axlearn config show --module=completed_recipes bigrams-"
    assert candidates(line) == ["bigrams-without-rules "]
    (path,) = cache.glob("*.json")

    def fail():
        raise AssertionError("The answer is in the file.")

    monkeypatch.setattr(_completion_facts, "_library", fail)
    assert candidates(line) == ["bigrams-without-rules "]
    os.utime(module, ns=(1, 1))
    with pytest.raises(AssertionError, match="in the file"):
        candidates(line)
    monkeypatch.undo()
    monkeypatch.setenv("AXLEARN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    path.write_text("{damaged")
    assert candidates(line) == ["bigrams-without-rules "]
    assert json.loads(path.read_text())["paths"] == {}


def test_known_answers_need_no_jax(monkeypatch):
    # Somebody may be editing the package meanwhile.
    monkeypatch.setattr(_completion_facts, "_fingerprint", lambda module: "the same")
    line = f"axlearn config show {MODULE} bigrams --set max_s"
    assert candidates(line) == ["max_step="]
    code = (
        "import sys; from axlearn.cli import _completion_facts\n"
        "_completion_facts._fingerprint = lambda module: 'the same'\n"
        "from axlearn.cli._completion_words import candidates\n"
        f"assert candidates({line!r}) == ['max_step=']\n"
        "loaded = {'jax', 'numpy', 'rich'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPO_ROOT)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_a_shell_is_a_golden_file(shell, capsys, golden):
    assert completion.main([shell]) == 0
    golden(f"cli/completion.{shell}", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("line", "reply"),
    [
        ("axlearn config show bigrams-", ["bigrams-without-rules "]),
        # bash replaces what stands behind the last of its own word breaks.
        ("axlearn config show bigrams --set=max_s", ["max_step="]),
        ("axlearn config show bigrams@tpu-v4", ["tpu-v4-8 "]),
        ("axlearn config show bigrams --nothing", []),
    ],
)
def test_bash_completes_what_the_words_say(line, reply):
    answers = {each: candidates(each.replace("show", f"show {MODULE}")) for each in [line]}
    script = f"""
axlearn() {{ if [ "$1" = completion ]; then printf '%s\\n' {" ".join(map(repr, answers[line]))}; fi; }}
{completion.SCRIPTS["bash"]}
COMP_LINE='{line}'; COMP_POINT=${{#COMP_LINE}}
_axlearn
for word in "${{COMPREPLY[@]}}"; do printf '%s|' "$word"; done
"""
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout == "".join(f"{word}|" for word in reply)
    assert result.stderr == ""


def test_the_verb_answers_shells(capsys):
    assert main.main(["completion", "words", "axlearn config sh"]) == 0
    assert capsys.readouterr().out == "show \n"
