"""`axlearn config explain`: lines of a recipe of this test, so that golden files stay when the library changes."""

import json
import pathlib

import pytest

from axlearn.cli import main
from axlearn.common.config import config_to_json
from tests.cli import config_recipe

MODULE = "--module=tests.cli.config_recipe"
_SOURCE = pathlib.Path(config_recipe.__file__)


def _line(text: str) -> int:
    """The first line of the recipe's module with a text in it."""
    lines = _SOURCE.read_text().splitlines()
    return 1 + next(i for i, line in enumerate(lines) if text in line)


@pytest.fixture
def explain(capsys):
    def call(*args: str) -> str:
        assert main.main(["config", "explain", *args, MODULE]) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        return captured.out

    return call


@pytest.fixture
def events(explain):
    def call(*args: str) -> list[dict]:
        return json.loads(explain(*args, "--json"))["events"]

    return call


def test_a_value_is_followed_from_its_default_to_the_last_override(explain, golden):
    out = explain(
        "bigrams", "mesh_shape", "--mesh_selector=tpu-v5litepod-4", "--set=mesh_shape=(2,2)", "--set=mesh_shape.0=1",
    )  # fmt: skip
    golden("cli/config_explain.txt", out)


def test_programs_get_the_same_with_stable_keys(explain):
    content = json.loads(explain("bigrams@tpu-v5litepod-4", "mesh_shape", "--set=mesh_shape=(2,2)", "--json"))
    assert list(content) == ["config", "path", "declared_by", "value", "events", "leaves"]
    assert content["config"] == "bigrams@tpu-v5litepod-4"
    assert content["declared_by"] == "axlearn.common.trainer.SpmdTrainer.Config"
    assert content["value"] == "(2, 2)"
    assert [(event["kind"], event["value"]) for event in content["events"]] == [
        ("default", "REQUIRED"),
        ("recipe", "(-1, 1)"),
        ("mesh_rule", "(-1, 2)"),
        ("mesh_rule", "(-1, 4)"),
        ("override", "(2, 2)"),
    ]
    assert content["events"][3]["by"] == (
        "mesh_rules[1] ('tpu-v5litepod-.*'), config_modifiers[2] MeshShapeModifier"
    )
    assert content["events"][4]["by"] == "--set mesh_shape=(2,2)"


def test_lines_are_those_of_the_recipe_the_innermost_first(events):
    recipe = events("bigrams", "learner.optimizer.b1")[1]
    set_at, called_at = _line("learner.optimizer = config_for"), _line("cfg.learner = _learner")
    assert recipe["written_at"] == [f"tests/cli/config_recipe.py:{line}" for line in (set_at, called_at)]


def test_a_modifier_is_named_with_the_lines_that_wrote_it(events):
    rule = events("bigrams@tpu-v5litepod-4", "learner.forward_fn_transformation.steps")[0]
    assert rule["kind"] == "mesh_rule"
    assert rule["value"] == 2
    lines = _line("set(grad_acc_steps=2)"), _line("config_modifiers=modifiers"), _line("cfg.mesh_rules = [")
    assert rule["written_at"] == [f"tests/cli/config_recipe.py:{line}" for line in lines]


def test_a_plain_mesh_shape_is_a_rule_too(events):
    rule = events("bigrams@gpu-p5.48xlarge-8", "mesh_shape")[-1]
    assert rule["by"] == "mesh_rules[0] ('gpu-(a3-highgpu-8g|p5.48xlarge)-(8|16)')"
    assert rule["value"] == "(-1, 2)"


def test_what_nobody_set_is_a_default_and_what_its_parent_s_class_set_the_library_s(events):
    (event,) = events("bigrams", "vlog")
    assert event["kind"] == "default"
    assert event["by"] == "the default of axlearn.common.trainer.SpmdTrainer.Config"
    assert (event["value"], event["is_there"], event["written_at"]) == (None, True, [])
    (event,) = events("bigrams", "learner.ema.fn")
    assert event["kind"] == "library"


def test_a_value_that_is_set_to_what_it_was_is_an_event(events):
    kinds = [event["kind"] for event in events("bigrams", "max_step", "--set=max_step=40")]
    assert kinds == ["default", "recipe", "override"]


def test_a_pattern_s_override_explains_each_of_its_places(events):
    last = events("bigrams", "checkpointer.save_policy.max_step", "--set=**.max_step=9")[-1]
    assert (last["kind"], last["by"], last["value"]) == ("override", "--set **.max_step=9", 9)


def test_a_part_is_explained_leaf_by_leaf(explain):
    out = explain("bigrams@tpu-v4-8", "learner.optimizer", "--set=learner.optimizer.b2=0.99").splitlines()
    assert out[0] == "learner.optimizer: a config of axlearn.common.optimizers.adamw_optimizer"
    line = _line("learner.optimizer = config_for")
    assert f"learner.optimizer.b1: 0.9  # tests/cli/config_recipe.py:{line}" in out
    assert "learner.optimizer.b2: 0.99  # --set learner.optimizer.b2=0.99; was 0.95" in out
    assert "learner.optimizer.weight_decay: 0.0  # default" in out
    content = json.loads(explain("bigrams@tpu-v4-8", "model", "--json"))
    by_path = {leaf["path"]: leaf for leaf in content["leaves"]}
    remat = by_path["model.remat_spec['prevent_cse']"]
    assert remat["value"] is False
    assert [event["kind"] for event in remat["events"]] == ["mesh_rule"]


def test_a_large_value_is_shown_by_its_parts(explain):
    out = explain("bigrams@tpu-v4-8", "model.remat_spec").splitlines()
    assert out[0] == "model.remat_spec: a RematSpec of 1 line"
    by = "mesh_rules[2] ('tpu-v4-8'), config_modifiers[3] RematSpecModifier"
    assert f"model.remat_spec['prevent_cse']: False  # {by}" in out


def test_a_run_is_explained_by_its_record(explain, tmp_path):
    cfg = config_recipe.trainer_config().set(dir="run", max_step=5)
    (tmp_path / "trainer_config.json").write_text(config_to_json(cfg))
    override = {"path": "max_step", "old": 40, "new": 5, "text": "max_step=5", "dropped": []}
    start = {"time": "2026-11-21T05:00:00+00:00", "config": "bigrams", "overrides": [override]}
    (tmp_path / "overrides.json").write_text(json.dumps([start]))
    out = explain(str(tmp_path), "max_step", "--set=max_step=6")
    assert out.splitlines() == [
        "max_step: 6",
        "  default   inf  (the default of axlearn.common.trainer.SpmdTrainer.Config)",
        "  override  5  (--set max_step=5, at the start at 2026-11-21T05:00:00+00:00)",
        f"  file      5  ({tmp_path})",
        "  override  6  (--set max_step=6)",
    ]


def test_every_leaf_of_a_real_recipe_can_be_explained(capsys):
    from axlearn.cli._config_explain import events
    from axlearn.cli._config_history import stages
    from axlearn.cli._config_source import Options, parse_source
    from axlearn.common.config import dump_lines

    options = Options(mesh_selector="tpu-v6e-256-4")
    way = stages(parse_source("fuji-70B", options), options)
    for path, text in dump_lines(way[-1].cfg).items():
        last = events(way, path)[-1]
        assert last.value == text or path.startswith("mesh_rules"), path
        assert last.kind in ("default", "library", "recipe", "mesh_rule")
        assert last.written_at or last.kind == "default"
