"""`axlearn config check` on recipes with mesh rules, ours and those of the reference."""

import json

import pytest

from axlearn.cli import main
from axlearn.common.machines import machine_of

MODULE = "--module=tests.cli.config_recipe"


@pytest.fixture
def check(capsys):
    """Runs `axlearn config check ...` and returns its status and output."""

    def call(*args: str) -> tuple[int, str]:
        status = main.main(["config", "check", *args])
        captured = capsys.readouterr()
        assert captured.err == ""
        return status, captured.out

    return call


def test_every_rule_is_checked_for_a_machine_of_its_own(check):
    status, out = check("bigrams", MODULE, "--all_rules")
    summaries = [line for line in out.splitlines() if line.startswith("bigrams@")]
    assert summaries == [
        "bigrams@gpu-a3-highgpu-8g-8: no errors, no warnings",
        "bigrams@tpu-v5litepod-4: no errors, no warnings",
        "bigrams@tpu-v4-8: 1 error, no warnings",
        "bigrams@my-cluster: no errors, no warnings, 1 note",
    ]
    assert "error: mesh_shape=(-1, 6): the known axes have product 6, which does not divide 4 devices" in out
    assert status == 1


def test_the_status_is_0_where_there_are_only_warnings(check):
    status, out = check("bigrams", MODULE, "--set=max_step=20")
    assert status == 0
    assert out.endswith("bigrams: no errors, 2 warnings\n")


def test_rows_of_padding_are_warned_of(check):
    rows = "input.input_dispatcher.global_logical_batch_size=1000"
    _, out = check("fuji-7B-v2@tpu-v4-1024", "--data_dir=FAKE", "--set", rows)
    assert "1,000 rows do not divide over the devices: 24 of padding make them 1,024 in every step." in out
    _, out = check("fuji-7B-v2@tpu-v4-1024", "--data_dir=FAKE")
    assert "padding" not in out


def test_programs_get_all_of_it(check):
    status, out = check("bigrams@tpu-v4-8", MODULE, "--set", "mesh_shape=(2,2)", "--json")
    assert status == 0
    (report,) = json.loads(out)["checks"]
    assert report["config"] == "bigrams@tpu-v4-8"
    assert report["machine"]["num_slices"] == 1
    assert (report["num_devices"], report["mesh"]) == (4, {"data": 2, "model": 2})
    # A table of pairs and a bias.
    assert report["num_parameters"] == 16 * 16 + 16
    assert report["parameters"] == {"weight": 256, "bias": 16}
    assert report["bytes_per_device"]["parameters"] == (256 + 16) * 4 // 2
    assert report["max_step"] == 40
    assert report["findings"] == []


def test_a_name_that_promises_more_than_its_rule_keeps_is_warned_of(check):
    status, out = check("fuji-7B-v1-flash-fp8", "--data_dir=FAKE")
    assert status == 0
    assert "warning: --mesh_selector: the recipe's name promises fp8" in out
    _, out = check("fuji-7B-v1-flash-fp8@gpu-a3-highgpu-8g-256", "--data_dir=FAKE")
    assert "promises fp8" not in out


@pytest.mark.parametrize("name", ["fuji-1B-v3-flash", "fuji-7B-v2-flash", "fuji-70B", "fuji-405B-v3-flash"])
def test_the_rules_of_the_reference_s_recipes_have_no_mistakes(check, monkeypatch, name):
    from axlearn.cli import _config_check
    from axlearn.common.config_check import check_config

    # Tracing 80 layers for each of eight rules takes a minute; `tests/parity` runs them, made small.
    monkeypatch.setattr(
        _config_check,
        "check_config",
        lambda *args, **kwargs: check_config(*args, **{**kwargs, "trace_step": False}),
    )
    status, out = check(name, "--all_rules", "--data_dir=FAKE", "--json")
    assert status == 0
    for report in json.loads(out)["checks"]:
        assert report["num_devices"] == machine_of(report["config"].rpartition("@")[2]).num_devices
        assert {finding["severity"] for finding in report["findings"]} <= {"note", "warning"}


def test_a_rule_of_the_reference_that_cannot_hold_its_state_is_found(check):
    """Two tables of 128256 x 8192 lie whole on every chip, where the rule splits the layers alone."""
    status, out = check("fuji-70B-v3@tpu-v5litepod-256-4", "--data_dir=FAKE")
    assert status == 1
    assert (
        "error: mesh_shape: each device needs 31.5 GiB without activations, and TPU v5 lite has 15.8 GiB."
        in out
    )
    whole = "131072 x 8192 float32 with spec (None, 'model') is whole along 'fsdp' (256): 4.0 GiB and 8.0 GiB"
    assert f"warning: model/decoder/emb/token_emb/weight: {whole}" in out
