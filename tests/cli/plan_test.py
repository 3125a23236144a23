"""`axlearn plan`: rows for what can be planned and for what cannot, each in a process of its own."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from axlearn.cli import _plan_worker, plan
from axlearn.common import saved_program
from axlearn.common.aot_compilation import Plan, compile_traced_step
from axlearn.common.attention import TransformerFeedForwardLayer as FeedForwardLayer
from axlearn.common.trainer import MemoryNeeds
from tests.made_up_plan import GIB, PLAN

_REQUEST = {
    "name": "fuji-tiny",
    "mesh_selector": "tpu-v5p-8",
    "module": None,
    "data_dir": "FAKE",
    "overrides": ["max_step=7"],
}


def test_what_is_planned_for_is_the_recipe_with_its_rule_and_overrides():
    cfg = _plan_worker.trainer_config_of(_REQUEST)
    assert cfg.max_step == 7
    assert _plan_worker.key_of(cfg, _REQUEST) != _plan_worker.key_of(cfg.clone(max_step=8), _REQUEST)


@pytest.fixture
def on_this_machine(monkeypatch):
    """Plans for the devices here in the place of a machine's; the list of what was compiled."""
    compiled = []

    def compile_once(step):
        compiled.append(step.trainer.max_step)
        if step.trainer.max_step == 9:
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 78.81G of 15.75G hbm."
            )
        return compile_traced_step(step)

    monkeypatch.setattr(_plan_worker, "compile_traced_step", compile_once)
    monkeypatch.setattr(_plan_worker, "topology_devices", lambda machine: np.array(jax.devices()))
    return compiled


def test_a_plan_that_is_kept_is_not_made_again_until_its_config_changes(
    tmp_path, monkeypatch, on_this_machine
):
    path = tmp_path / "plan.json"
    first = _plan_worker.run(_REQUEST, path)
    assert Plan.from_json(first["plan"]).num_params > 10**6
    assert _plan_worker.run(_REQUEST, path) == first
    assert on_this_machine == [7]
    # A new version of what a plan says is made of the program that was kept.
    monkeypatch.setattr(_plan_worker, "_VERSION", 99)
    assert _plan_worker.run(_REQUEST, path) == {**first, "version": 99}
    assert on_this_machine == [7]
    _plan_worker.run({**_REQUEST, "overrides": ["max_step=9"]}, path)
    assert on_this_machine == [7, 9]


@pytest.mark.scale
def test_a_plan_is_made_again_when_the_code_makes_another_program(tmp_path, monkeypatch, on_this_machine):
    path = tmp_path / "plan.json"
    first = _plan_worker.run(_REQUEST, path)
    init = FeedForwardLayer.forward
    monkeypatch.setattr(FeedForwardLayer, "forward", lambda self, x: init(self, x) * 2)
    second = _plan_worker.run(_REQUEST, path)
    assert second["key"] != first["key"]
    assert on_this_machine == [7, 7]


def test_only_failures_of_the_program_itself_are_kept(tmp_path, monkeypatch, on_this_machine):
    path = tmp_path / "plan.json"
    too_large = {**_REQUEST, "overrides": ["max_step=9"]}
    assert _plan_worker.run(too_large, path) == _plan_worker.run(too_large, path)
    assert on_this_machine == [9]

    def fail(step):
        raise OSError("no space left")

    with monkeypatch.context() as context:
        context.setattr(_plan_worker, "compile_traced_step", fail)
        assert "no space left" in _plan_worker.run(_REQUEST, path)["error"]
    assert "plan" in _plan_worker.run(_REQUEST, path)


def test_a_folder_where_others_can_write_is_refused_before_anything_is_compiled(tmp_path, on_this_machine):
    (tmp_path / "step").mkdir()
    (tmp_path / "step").chmod(0o777)
    request = {**_REQUEST, "executable_dir": str(tmp_path / "step")}
    assert "others may write to it" in _plan_worker.run(request, tmp_path / "plan.json")["error"]
    assert on_this_machine == []


@pytest.mark.scale
def test_a_step_that_is_no_longer_where_it_was_saved_is_saved_again(tmp_path, monkeypatch, on_this_machine):
    monkeypatch.setattr(saved_program, "_check_was_compiled_here", lambda: None)
    folder = tmp_path / "step"
    request = {**_REQUEST, "executable_dir": str(folder)}
    # A plan that is kept already has saved nothing.
    _plan_worker.run(_REQUEST, tmp_path / "plan.json")
    for _ in range(2):
        assert "plan" in _plan_worker.run(request, tmp_path / "plan.json")
    assert on_this_machine == [7, 7]
    (folder / "program.bin").unlink()
    assert "plan" in _plan_worker.run(request, tmp_path / "plan.json")
    assert on_this_machine == [7, 7, 7]
    assert (folder / "program.bin").is_file()


def test_a_step_that_the_compiler_refuses_has_a_plan_with_all_that_is_known(tmp_path, on_this_machine):
    result = _plan_worker.run({**_REQUEST, "overrides": ["max_step=9"]}, tmp_path / "plan.json")
    plan = Plan.from_json(result["plan"])
    assert plan.failure == "it does not fit, says the compiler (78.81G in all, of 15.75G)"
    assert plan.peak_bytes == int(78.81 * GIB)
    assert plan.parts["parameters"] > 10**6
    assert not plan.fits
    assert plan.step_seconds() is None
    assert any("RematSpecModifier" in line for line in plan.advice)


@pytest.mark.parametrize(
    ("text", "failure", "temporary_gib"),
    [
        ("Used 30.00G of 15.75G hbm.", "(30.00G in all, of 15.75G)", 30 - 3),
        (
            "the total memory required for HLO temporaries (16.50G) exceeds available HBM (15.75G).",
            "(16.50G for temporaries alone, of 15.75G)",
            16.5,
        ),
        ("something else", "says the compiler", 0),
    ],
)
def test_what_the_compiler_asked_for_is_read_from_its_refusal(text, failure, temporary_gib):
    e = jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: Ran out of memory: {text}")
    assert _plan_worker._failure(e).endswith(failure)
    held = MemoryNeeds(state={"parameters": 2 * GIB}, gradients=5 * GIB, batch=GIB)
    assert _plan_worker._temporaries(e, held=held) == int(temporary_gib * GIB)


def test_a_failure_is_a_row_with_its_reason(tmp_path, capsys):
    """Of a machine that does not exist; the process of the plan is a real one."""
    argv = ["fuji-tiny", "--mesh_selector=tpu-v9-8", f"--output={tmp_path}", "--json"]
    assert plan.main(argv) == 1
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["name"], row["mesh_selector"]) == ("fuji-tiny", "tpu-v9-8")
    assert "there is no type 'v9'" in row["error"]


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"timeout_seconds": 0.2, "memory_bytes": 100 * GIB}, "given up after"),
        ({"timeout_seconds": 60, "memory_bytes": 1}, "given up at"),
    ],
)
def test_a_process_that_takes_too_much_is_ended(limits, reason):
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    assert reason in plan._watch(process, **limits)
    assert process.returncode is not None


def test_the_help_says_what_there_is(golden, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    with pytest.raises(SystemExit):
        plan.main(["--help"])
    golden("cli/plan_help.txt", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("path", "problem"), [("plan.png", "pictures are SVG"), ("nowhere/plan.svg", "there is no folder")]
)
def test_a_picture_that_cannot_be_written_is_refused_before_anything_is_compiled(path, problem, tmp_path):
    argv = ["fuji-tiny", "--mesh_selector=tpu-v5p-8", f"--output={tmp_path / 'plans'}"]
    with pytest.raises(ValueError, match=problem):
        plan.main([*argv, f"--picture={tmp_path / path}"])
    assert not (tmp_path / "plans").exists()


def test_a_plan_for_this_machine_saves_its_step_and_draws_itself(tmp_path, capsys, monkeypatch):
    """In a real process, on the one CPU device that it has."""
    monkeypatch.setenv("XLA_FLAGS", "")
    argv = ["tiny", "--module=tests.common.trainer.tiny_recipe", "--mesh_selector=here", "--json"]
    argv += [f"--picture={tmp_path / 'plan.svg'}", f"--save_executable={tmp_path / 'steps'}"]
    argv += [f"--output={tmp_path / 'plans'}"]
    assert plan.main(argv) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert Plan.from_json(row["plan"]).num_devices == 1
    assert "tiny on here" in (tmp_path / "plan.svg").read_text()
    (folder,) = (tmp_path / "steps").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["program.bin", "program.json"]
    assert folder.stat().st_mode & 0o777 == 0o700
    script = f"""
from axlearn.common.saved_program import SavedProgramError
from tests.common.trainer.tiny_recipe import trainer_config
for max_step in (1, 1):
    cfg = trainer_config(dir={str(tmp_path / "run")!r}).set(executable_dir={str(folder)!r})
    print(type(cfg.instantiate(parent=None)._compile()).__name__)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["Compiled"] * 2, done.stderr[-2000:]


def test_the_summary_is_a_table_with_a_row_for_each(golden):
    kept = {"name": "fuji-7B-v2-flash", "mesh_selector": "tpu-v5litepod-256-2", "plan": PLAN.to_json()}
    failed = {"name": "fuji-70B", "mesh_selector": "tpu-v5p-8", "error": "does not fit\nmore"}
    golden("cli/plan.txt", plan._result_text(kept) + plan.summary_table([kept, failed]) + "\n")
