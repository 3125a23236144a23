"""The recipes on C4: their names, their golden files, and the reference's sums of the same files."""

import json
import pathlib
import subprocess
import sys

import pytest

from axlearn.common.data_dir import FAKE, get_data_dir
from axlearn.common.golden_config import TEXTS, diff_texts, golden_tests, with_golden_data_dir
from axlearn.common.promises import promises_of
from axlearn.experiments import registry
from axlearn.experiments.text.gpt import c4_trainer

MODULE = "axlearn.experiments.text.gpt.c4_trainer"
TESTS = pathlib.Path(__file__).resolve().parents[3]
# Every config, the initialisation and the regularisation of each; texts of a few: all sizes' mesh rules, fp8, both
# kinds of tokenizer, the pipeline.
TEXTS_OF = (
    r"fuji-(test-v1|test-v3-tiktoken|3B-v3|7B-v1-flash-fp8|8B-v3-tiktoken-flash-fp8|70B-v2-flash|405B-v3-flash)"
    r"|gspmd-16B-2x16x8"
)

test_goldens = golden_tests(MODULE, golden_dir="tests/golden", texts=TEXTS_OF)


def test_there_are_the_100_names_of_fuji_and_two_of_gspmd():
    names = c4_trainer.named_trainer_configs()
    assert sum(name.startswith("fuji-") for name in names) == 100
    assert sorted(name for name in names if not name.startswith("fuji-")) == [
        "gspmd-16B-2x16x8",
        "gspmd-16B-2x16x8-stream",
    ]


def _sums(path: pathlib.Path) -> dict[str, str]:
    return {file: digest for digest, file in (line.split() for line in path.read_text().splitlines())}


def test_our_sums_are_the_references():
    """`test_goldens` ties each text to our sums, this ties our sums to the reference's."""
    ours, theirs = (
        _sums(TESTS / "golden" / MODULE / "SHA256SUMS"),
        _sums(TESTS / "fixtures" / "reference-c4-sums.txt"),
    )
    assert len(theirs) == 207
    assert {file: ours.get(file) for file in theirs} == theirs
    assert len(ours) == 306


def test_every_text_of_the_reference_is_ours_line_by_line(shared_dir):
    """What a wrong sum would not show: which lines differ."""
    if shared_dir is None:
        pytest.skip("../shared is not here")
    configs = c4_trainer.named_trainer_configs()
    differences = {}
    for path in sorted((shared_dir / "golden" / MODULE).glob("*.txt")):
        name, _, kind = path.stem.partition("_")
        if name in configs:
            ours = TEXTS[kind or "config"](with_golden_data_dir(configs[name]))
            differences[path.name] = diff_texts(path.read_text(encoding="utf-8"), ours)
    assert len(differences) == 45
    assert {name: lines for name, lines in differences.items() if lines} == {}


def test_an_alias_is_found_by_its_name_and_listed_as_an_alias():
    by_alias = registry.find_trainer_config("fuji-70B")()
    assert by_alias == registry.find_trainer_config("fuji-70B-v2-flash")()
    assert by_alias == registry.find_trainer_config("fuji-70B", module="text.gpt.c4_trainer")()
    assert dict(registry.listed_aliases()) == {"fuji-70B": "fuji-70B-v2-flash"}
    assert "fuji-70B" not in dict(registry.listed_trainer_configs())


def test_names_with_fp8_promise_it():
    promising = {name for name, recipe in c4_trainer.named_trainer_configs().items() if promises_of(recipe)}
    assert promising == {name for name in c4_trainer.named_trainer_configs() if "-fp8" in name}
    assert len(promising) == 44


@pytest.mark.parametrize("name", ["fuji-test-v3-tiktoken", "fuji-golden-run-test-v1", "gspmd-16B-2x16x8"])
def test_the_data_directory_is_that_of_the_argument_while_a_config_is_built(name, monkeypatch):
    seen = []
    original = c4_trainer.common.input_configs
    monkeypatch.setattr(
        c4_trainer.common, "input_configs", lambda **kwargs: seen.append(get_data_dir()) or original(**kwargs)
    )
    monkeypatch.setenv("DATA_DIR", "/data")
    recipe = c4_trainer.named_trainer_configs()[name]
    recipe(data_dir=FAKE)
    recipe()
    assert seen == [FAKE, "/data"]


def test_all_recipes_cost_less_than_thirty_times_importing_jax():
    """The budget of imports, building, shapes and printing; `benchmarks/recipes_benchmark.md` has 6."""

    def seconds(*arguments: str) -> float:
        done = subprocess.run([sys.executable, *arguments], cwd=TESTS.parent, capture_output=True, check=True)
        return sum(seconds for _, seconds in json.loads(done.stdout))

    code = "import time; t = time.perf_counter(); import jax; print([[0, time.perf_counter() - t]])"
    assert seconds("benchmarks/recipes_benchmark.py", "--measure") < 30 * seconds("-c", code)
