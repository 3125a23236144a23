"""`axlearn config list`, `show` and `diff`, as people and programs use them."""

import json
import pathlib
import subprocess
import sys
import time

import pytest

from axlearn.cli import config, main
from axlearn.common.config import config_to_json
from axlearn.common.trainer import find_mesh_rule
from axlearn.experiments.registry import find_trainer_config
from tests.cli.config_recipe import trainer_config
from tests.conftest import REPO_ROOT

MODULE = "--module=tests.cli.config_recipe"
_C4_GOLDENS = REPO_ROOT / "tests" / "golden" / "axlearn.experiments.text.gpt.c4_trainer"


@pytest.fixture
def run(capsys):
    """Runs `axlearn config ...` and returns its status, output and errors."""

    def call(*args: str) -> tuple[int, str, str]:
        status = main.main(["config", *args])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def _write_run(folder: pathlib.Path, cfg) -> pathlib.Path:
    folder.mkdir()
    (folder / "trainer_config.json").write_text(config_to_json(cfg))
    (folder / "trainer_config").write_text(cfg.debug_string())
    return folder


def test_the_help_of_every_command_is_a_golden_file(golden, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    texts = []
    for args in ([], ["list"], ["show"], ["diff"], ["explain"], ["check"]):
        with pytest.raises(SystemExit) as e:
            config.main([*args, "--help"])
        assert e.value.code == 0
        texts.append(f"$ axlearn config {' '.join([*args, '--help'])}\n{capsys.readouterr().out}")
    golden("cli/config_help.txt", "\n".join(texts))


def test_help_loads_no_jax():
    code = (
        "import sys; from axlearn.cli import config\n"
        "try: config.main(['check', '--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'jax', 'numpy', 'rich'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, cwd=REPO_ROOT)


@pytest.mark.parametrize("name", ["fuji-test-v1", "fuji-70B-v2-flash", "gspmd-16B-2x16x8"])
def test_show_prints_the_golden_file_byte_for_byte(run, name):
    expected = (_C4_GOLDENS / f"{name}.txt").read_text(encoding="utf-8")
    assert run("show", name) == (0, expected, "")


def test_an_alias_is_its_recipe(run):
    assert run("show", "fuji-70B")[1] == run("show", "fuji-70B-v2-flash")[1]


def test_a_part_of_a_config_has_its_lines_of_the_dump(run):
    dump = run("show", "fuji-test-v1")[1].splitlines()
    _, out, _ = run("show", "fuji-test-v1", "--path=model.decoder.emb")
    assert out.splitlines() == [line for line in dump if line.startswith("model.decoder.emb.")]
    assert run("show", "fuji-test-v1", "--path", "max_step")[1] == "max_step: 3000\n"
    # What a dump leaves out because it says nothing.
    assert run("show", "fuji-test-v1", "--path", "vlog")[1] == "vlog: None\n"
    assert run("show", "fuji-test-v1", "--path", "learner.optimizer.args.1.b1")[1] == (
        "learner.optimizer.args[1].b1: 0.9\n"
    )


def test_rule_and_overrides_show_in_what_is_shown(run):
    args = ("show", "bigrams@tpu-v5litepod-4", MODULE, "--path=mesh_shape")
    assert run(*args)[1] == "mesh_shape[0]: -1\nmesh_shape[1]: 4\n"
    assert run(*args, "--set", "mesh_shape=(1,4)")[1] == "mesh_shape[0]: 1\nmesh_shape[1]: 4\n"
    same = run("show", "bigrams", MODULE, "--path=mesh_shape", "--mesh_selector=tpu-v5litepod-4")
    assert same == run(*args)


def test_what_an_override_does_at_many_places_is_said_beside_the_config(run):
    status, out, err = run("show", "bigrams", MODULE, "--set", "**.max_step=9", "--path", "max_step")
    assert (status, out) == (0, "max_step: 9\n")
    assert "override '**.max_step=9' sets 3 values:" in err


def test_json_has_values_where_json_has_them(run):
    _, out, _ = run("show", "bigrams", MODULE, "--json", "--path", "learner", "--set", "max_step=9")
    content = json.loads(out)
    assert content["config"] == "bigrams"
    assert content["path"] == "learner"
    assert content["overrides"] == ["max_step=9"]
    assert content["values"]["learner.optimizer.b2"] == 0.95
    assert content["values"]["learner.klass"] == "axlearn.common.learner.Learner"
    assert content["values"]["learner.enable_per_variable_summaries"] is False
    everything = json.loads(run("show", "bigrams", MODULE, "--json")[1])["values"]
    assert list(everything) == [
        line.split(": ")[0] for line in run("show", "bigrams", MODULE)[1].splitlines()
    ]


def test_runs_their_files_and_dumps_are_shown_like_recipes(run, tmp_path):
    cfg = trainer_config().set(dir=str(tmp_path / "run"), max_step=7)
    folder = _write_run(tmp_path / "run", cfg)
    for source in (folder, folder / "trainer_config.json", folder / "trainer_config"):
        assert run("show", str(source), MODULE) == (0, cfg.debug_string(), "")
    # `tests.` is no package that a file may name by itself.
    status, _, err = run("show", str(folder))
    assert status == 2
    assert "Expected a name below axlearn." in err


def test_a_recipe_goes_before_a_folder_of_its_name(run, tmp_path, monkeypatch):
    _write_run(tmp_path / "fuji-tiny", find_trainer_config("fuji-tiny")().set(max_step=7, dir="x"))
    _write_run(tmp_path / "mine", find_trainer_config("fuji-tiny")().set(max_step=8, dir="x"))
    monkeypatch.chdir(tmp_path)
    assert run("show", "fuji-tiny", "--path=max_step")[1] == "max_step: 500\n"
    assert run("show", "./fuji-tiny", "--path=max_step")[1] == "max_step: 7\n"
    assert run("show", "mine", "--path=max_step")[1] == "max_step: 8\n"


def test_a_config_is_compared_with_what_the_options_make_of_it(run, golden):
    status, out, _ = run(
        "diff", "bigrams", MODULE, "--mesh_selector=tpu-v5litepod-4", "--set", "learner.optimizer.b2=0.99"
    )
    assert status == 1
    golden("cli/config_diff.txt", out)


def test_equal_configs_have_no_differences_and_status_0(run):
    assert run("diff", "bigrams", "pairs", MODULE) == (0, "", "")
    assert run("diff", "bigrams@tpu-v5litepod-4", "bigrams@tpu-v5litepod-8", MODULE) == (0, "", "")


def test_options_apply_to_both_recipes(run):
    assert run("diff", "bigrams", "pairs", MODULE, "--set=max_step=9", "--mesh_selector=tpu-v4-8") == (
        0,
        "",
        "",
    )
    _, out, _ = run("diff", "bigrams@tpu-v5litepod-4", "bigrams", MODULE, "--mesh_selector=gpu-p5.48xlarge-8")
    assert "~ mesh_shape[1]: 4 -> 2\n" in out


def test_a_recipe_is_compared_with_a_run_as_that_was_written(run, tmp_path):
    folder = _write_run(tmp_path / "run", trainer_config().set(dir="run", mesh_shape=(2, 4), max_step=5))
    status, out, _ = run("diff", "bigrams", str(folder), MODULE, "--mesh_selector=gpu-p5.48xlarge-8")
    assert status == 1
    assert (
        out == f"+ dir: '{folder}'\n~ max_step: 40 -> 5\n~ mesh_shape[0]: -1 -> 2\n~ mesh_shape[1]: 2 -> 4\n"
    )


def test_the_rule_that_a_run_went_through_is_not_applied_again(run, tmp_path):
    cfg = trainer_config().set(dir="run", mesh_shape=(2, 4))
    folder = _write_run(tmp_path / "run", cfg)
    rule = str(find_mesh_rule(cfg, mesh_selector="tpu-v5litepod-8"))
    (folder / "overrides.json").write_text(json.dumps([{"mesh_rule": rule, "overrides": []}]))
    for source in (folder, folder / "trainer_config.json"):
        args = (str(source), MODULE, "--mesh_selector=tpu-v5litepod-8")
        assert run("show", *args, "--path=mesh_shape")[1] == "mesh_shape[0]: 2\nmesh_shape[1]: 4\n"
        assert "mesh rule" not in run("explain", *args, "mesh_shape")[1]
        assert run("diff", *args)[:2] == (0, "")
        status, _, err = run("show", str(source), MODULE, "--mesh_selector=tpu-v4-8")
        assert status == 2
        assert f"this run has been changed by {rule}" in err


def test_dumps_are_compared_though_their_classes_are_gone(run, tmp_path):
    old, new = tmp_path / "old.txt", tmp_path / "new.txt"
    old.write_text("klass: 'gone.Trainer'\nmax_step: 1\nname: 'a'")
    new.write_text("klass: 'gone.Trainer'\nmax_step: 2\nvlog: 3")
    status, out, _ = run("diff", str(old), str(new))
    assert status == 1
    assert out == "~ max_step: 1 -> 2\n- name: 'a'\n+ vlog: 3\n"
    _, out, _ = run("diff", str(old), str(new), "--json")
    assert json.loads(out) == {
        "old": str(old),
        "new": str(new),
        "changes": [
            {"change": "changed", "path": "max_step", "old": 1, "new": 2},
            {"change": "removed", "path": "name", "old": "a"},
            {"change": "added", "path": "vlog", "new": 3},
        ],
    }


def test_list_has_a_line_for_each_recipe(run, golden):
    status, out, _ = run("list", MODULE, "--rules")
    assert status == 0
    golden("cli/config_list.txt", out)
    _, out, _ = run("list", MODULE, "--json")
    first = json.loads(out)["configs"][0]
    assert (first["name"], first["aliases"], first["steps"]) == ("bigrams", ["pairs"], 40)
    assert first["mesh_rules"][0] == {
        "pattern": "gpu-(a3-highgpu-8g|p5.48xlarge)-(8|16)",
        "does": "mesh_shape=(-1, 2)",
    }


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("fuji-70B-v?", ["fuji-70B-v1", "fuji-70B-v2", "fuji-70B-v3"]),
        ("^fuji-(1B|3B)-v3$", ["fuji-1B-v3", "fuji-3B-v3"]),
        ("tiny", ["fuji-tiny"]),
        # By its alias.
        ("fuji-70B", None),
        ("*-stream", ["gspmd-16B-2x16x8-stream"]),
    ],
)
def test_names_match_globs_parts_and_regular_expressions(run, pattern, names):
    found = [row["name"] for row in json.loads(run("list", "--json", "--match", pattern)[1])["configs"]]
    assert sorted(found) == names if names is not None else "fuji-70B-v2-flash" in found


def test_a_recipe_that_cannot_be_made_here_is_listed_with_its_reason(run, monkeypatch):
    from tests.cli import config_recipe

    monkeypatch.setattr(config_recipe, "named_trainer_configs", lambda: {"broken": config_recipe.broken})
    status, out, _ = run("list", MODULE)
    assert status == 0
    assert out.splitlines()[1:] == [
        "broken       -    -      -      -           0",
        "    broken: there is nothing here",
    ]


def test_a_recipe_with_a_slip_hides_no_other_recipe_and_is_no_difference(run, monkeypatch):
    from tests.cli import config_recipe

    recipes = {"slip": lambda: [][1], "bigrams": config_recipe.trainer_config}
    monkeypatch.setattr(config_recipe, "named_trainer_configs", lambda: recipes)
    rows = {row["name"]: row for row in json.loads(run("list", MODULE, "--json")[1])["configs"]}
    assert rows["slip"]["problem"].startswith("IndexError: list index out of range (")
    assert "config_test.py:" in rows["slip"]["problem"]
    assert rows["bigrams"]["problem"] is None
    assert list(rows["slip"]) == list(rows["bigrams"])
    status, out, err = run("diff", "bigrams", "slip", MODULE)
    assert (status, out) == (2, "")
    assert "IndexError: list index out of range" in err


def test_showing_the_largest_model_takes_little_more_than_importing_jax():
    """The budget is 2.5, and `benchmarks/startup_benchmark.md` has what it takes; others use the cores, too."""

    def seconds(*arguments: str) -> float:
        started = time.perf_counter()
        subprocess.run([sys.executable, *arguments], cwd=REPO_ROOT, check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - started

    show = ("-m", "axlearn.cli.main", "config", "show", "fuji-70B")
    assert min(seconds(*show) / seconds("-c", "import jax") for _ in range(3)) < 2.5


def test_error_texts_are_golden_files(run, golden, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "dump.txt").write_text("max_step")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    texts = []
    for args in (
        ["show", "bigram", MODULE],
        ["show", "runs/nowhere"],
        ["show", f"{tmp_path}/empty"],
        ["show", f"{tmp_path}/dump.txt"],
        ["show", f"{tmp_path}/bytes"],
        ["show", f"{tmp_path}/dump.txt", "--data_dir=FAKE"],
        ["show", "bigrams", MODULE, "--path=learner.optimiser.b1"],
        ["show", "bigrams", MODULE, "--path=learner..b1"],
        ["show", "bigrams", MODULE, "--set=max_steps=3"],
        ["show", "bigrams", MODULE, "--set=mesh_rules=None"],
        ["show", "bigrams@tpu-v7-8", MODULE],
        ["show", "bigrams@", MODULE],
        ["show", "bigrams@tpu-v4-8", MODULE, "--mesh_selector=my-cluster"],
        ["show", "bigrams", "--module=tests.no_such_module"],
        ["diff", "bigrams", MODULE],
        ["diff", f"{tmp_path}/dump.txt", f"{tmp_path}/dump.txt", "--set=max_step=1"],
        ["diff", "bigrams", "bigram", MODULE],
        ["diff", "bigrams@tpu-v4-8", "pairs@my-cluster", MODULE, "--mesh_selector=tpu-v4-8"],
        ["explain", "bigrams", "learner.optimizer.b3", MODULE],
        ["check", "bigrams-without-rules", MODULE, "--all_rules"],
        ["check", "bigrams@tpu-v4-8", MODULE, "--all_rules"],
        ["list", "--match=bigrms", MODULE],
        ["list", "--match=(", MODULE],
    ):
        status, out, err = run(*args)
        assert (status, out) == (2, "")
        command = " ".join(arg for arg in args if arg != MODULE)
        texts.append(f"$ axlearn config {command}\n{err}".replace(str(tmp_path), "TMP"))
    golden("cli/config_errors.txt", "\n".join(texts))


def test_a_reader_that_has_had_enough_is_no_error():
    process = subprocess.run(
        f"{sys.executable} -m axlearn.cli.main config show fuji-test-v1 | head -1; exit ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        cwd=REPO_ROOT,
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"},
        check=False,
    )
    assert process.stdout == "batch_axis_names[0]: 'data'\n"
    assert process.stderr == ""
    assert process.returncode in (0, 141)


def test_recipes_of_a_module_are_compared_with_those_of_this_package(run):
    status, out, _ = run("diff", "fuji-tiny", "fuji-tiny", MODULE, "--set", "max_step=7")
    assert (status, out) == (0, "")
    status, _, err = run("diff", "fuji-tiny", "no-such", MODULE)
    assert status == 2
    assert err.startswith("axlearn config: tests.cli.config_recipe: Unrecognized config 'no-such'")
