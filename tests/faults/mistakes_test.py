"""What users get wrong, on a real recipe: a short message, a status that is not 0, and nothing lost.

`tests/common/launch_trainer_test.py` has the mistakes of the command line itself.
"""

import pathlib
import shutil
import subprocess

import pytest

from tests.launcher import as_text, command, environment, run_cases

HERE = pathlib.Path(__file__).parent
RECIPE = ["--module=kill_recipe", "--config=kill-test"]
SAVES = ["--set=checkpointer.save_policy.n=2"]

# Recipes with a mistake in them, as a user would write them.
_BROKEN_RECIPES = """
import kill_recipe

from axlearn.common.config import REQUIRED
from axlearn.common.evaler import SpmdEvaler
from axlearn.common.input_grain_lm import PackedTextSource

def wrong_name(data_dir=None):
    cfg = kill_recipe.trainer_config()
    cfg.model.decoder.dropout = 0.1
    return cfg

def wrong_type(data_dir=None):
    cfg = kill_recipe.trainer_config()
    cfg.model.decoder.dim = "wide"
    return cfg

def missing_fields(data_dir=None):
    cfg = kill_recipe.trainer_config()
    cfg.learner = REQUIRED
    cfg.input = REQUIRED
    return cfg

def missing_field_below(data_dir=None):
    cfg = kill_recipe.trainer_config()
    cfg.input.source = PackedTextSource.default_config()
    cfg.learner.optimizer = REQUIRED
    return cfg

def missing_evaluation_data(data_dir=None):
    cfg = kill_recipe.trainer_config()
    evaler_input = cfg.input.clone(is_training=False)
    evaler_input.source.corpus.path = "no/such/folder"
    cfg.evalers = {"heldout": SpmdEvaler.default_config().set(input=evaler_input)}
    return cfg

def named_trainer_configs():
    recipes = (wrong_name, wrong_type, missing_fields, missing_field_below, missing_evaluation_data)
    return {f.__name__: f for f in recipes}
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with text and a run of four steps with two checkpoints."""
    work = tmp_path_factory.mktemp("mistakes")
    (work / "text").mkdir()
    for i in range(40):
        lines = [f"def f_{i}_{j}(self, value): return self.x_{j} + value" for j in range(12)]
        (work / "text" / f"doc_{i:02d}.txt").write_text("\n".join(lines), encoding="utf-8")
    (work / "a_file").write_text("", encoding="utf-8")
    (work / "broken_recipes.py").write_text(_BROKEN_RECIPES, encoding="utf-8")
    done = _start(work, work / "run", max_step=4)
    assert done.returncode == 0, done.stderr
    return work


def _environment(work: pathlib.Path) -> dict[str, str]:
    return environment(num_devices=2, paths=(HERE, work), KILL_TEST_TEXT=str(work / "text"))


def _start(work: pathlib.Path, run: pathlib.Path, *, max_step: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*RECIPE, *SAVES, f"--trainer_dir={run}", f"--set=max_step={max_step}"),
        cwd=work,
        env=_environment(work),
        capture_output=True,
        text=True,
        check=False,
    )


def _files(folder: pathlib.Path) -> dict[str, bytes]:
    """The content of all files by path, but for the lock, which names its last holder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".writer"
    }


def _flip_a_bit(checkpoint: pathlib.Path) -> None:
    path = max((checkpoint / "gda" / "model").rglob("c/**/*"), key=lambda p: p.stat().st_size * p.is_file())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_each_mistake_is_refused_and_the_run_stays_as_it_is(work, golden):
    run, fresh = f"--trainer_dir={work}/run", f"--trainer_dir={work}/fresh"
    before = _files(work / "run")
    cases = {
        "a wrong name": [*RECIPE, run, "--set=model.decoder.transformer.num_layer=2"],
        "a wrong name in a recipe": ["--module=broken_recipes", "--config=wrong_name", run],
        "a wrong type": [*RECIPE, run, "--set=model.decoder.dim=wide"],
        "a wrong type in a recipe": ["--module=broken_recipes", "--config=wrong_type", run],
        "missing fields": ["--module=broken_recipes", "--config=missing_fields", run],
        "missing fields further down": ["--module=broken_recipes", "--config=missing_field_below", run],
        "a mesh that does not divide": [*RECIPE, run, "--set=mesh_shape=(1, 3, 1, 1, 1, 1)"],
        "a batch that does not divide": [*RECIPE, run, "--set=input.global_batch_size=5"],
        "missing evaluation data": ["--module=broken_recipes", "--config=missing_evaluation_data", run],
        "a missing data file": [*RECIPE, run, f"--set=input.source.corpus.path={work}/nowhere"],
        "a directory that cannot be made": [*RECIPE, f"--trainer_dir={work}/a_file/run"],
        "the checkpoint of another model": [*RECIPE, run, "--set=model.decoder.vocab_size=384"],
        "the position in other data": [*RECIPE, run, "--set=input.source.max_sequence_length=16"],
        "a tokenizer larger than the vocabulary": [*RECIPE, fresh, "--set=model.decoder.vocab_size=260"],
    }
    results = run_cases(cases, cwd=work, env=_environment(work))
    assert {status for status, _ in results.values()} == {2}
    assert _files(work / "run") == before
    golden("errors/mistakes.txt", as_text(results, replaced={work: "TMP"}))


def test_a_corrupt_newest_checkpoint_is_set_aside_and_the_one_before_it_is_used(work, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(work / "run", run)
    _flip_a_bit(run / "checkpoints" / "step_00000004")
    corrupt, whole = (
        _files(run / "checkpoints" / "step_00000004"),
        _files(run / "checkpoints" / "step_00000002"),
    )
    done = _start(work, run, max_step=6)
    assert done.returncode == 0, done.stderr
    assert "Continuing from step 2." in done.stdout
    assert "step_00000004 is called step_00000004.corrupt-hash-mismatch now." in done.stderr
    assert _files(run / "checkpoints" / "step_00000004.corrupt-hash-mismatch") == corrupt
    assert _files(run / "checkpoints" / "step_00000002") == whole
    # What was lost is made again, bit for bit.
    assert _files(run / "checkpoints" / "step_00000004") == _files(
        work / "run" / "checkpoints" / "step_00000004"
    )


def test_a_run_whose_checkpoints_are_all_corrupt_is_refused_rather_than_begun_anew(work, tmp_path, golden):
    run = tmp_path / "run"
    shutil.copytree(work / "run", run)
    for step in ("step_00000002", "step_00000004"):
        _flip_a_bit(run / "checkpoints" / step)
    before = _files(run)
    results = run_cases(
        {"all checkpoints corrupt": [*RECIPE, f"--trainer_dir={run}", "--set=max_step=6"]},
        cwd=work,
        env=_environment(work),
    )
    assert results["all checkpoints corrupt"][0] == 1
    after = {path.replace(".corrupt-hash-mismatch", ""): content for path, content in _files(run).items()}
    assert after == before
