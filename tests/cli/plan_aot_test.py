"""Two rows of the table of plans at two layers, compiled for TPUs that are not there."""

import json

import pytest

from axlearn.cli import plan as plan_command
from axlearn.common.aot_compilation import Plan

pytest.importorskip("libtpu")
pytestmark = pytest.mark.tpu_aot


def _plan(name: str, *, mesh_selector: str, tmp_path, capsys) -> Plan:
    argv = [name, f"--mesh_selector={mesh_selector}", f"--output={tmp_path}", "--json"]
    argv += ["--set", "model.decoder.transformer.num_layers=2"]
    status = plan_command.main(argv)
    (row,) = json.loads(capsys.readouterr().out)
    assert "plan" in row, row
    plan = Plan.from_json(row["plan"])
    assert status == 0, plan
    return plan


def test_7b_on_256_chips_of_v5p(tmp_path, capsys):
    plan = _plan("fuji-7B-v2-flash", mesh_selector="tpu-v5p-512", tmp_path=tmp_path, capsys=capsys)
    assert plan.fits
    assert 1.0 <= plan.flops / plan.model_flops <= 1.1
    sent = {(x.kind, x.axes): x for x in plan.traffic}
    # Two layers, forward and backward, of five weights each.
    assert sent["all-gather", ("fsdp",)].count == 2 * 2 * 5
    assert {axis for _, axes in sent for axis in axes} == {"data", "fsdp"}
    weights = 2 * (4 * 4096 * 4096 + 3 * 4096 * 11008) * 2
    assert sent["all-gather", ("fsdp",)].sent_bytes == pytest.approx(2 * weights * 63 / 64)
    # Each sum of gradients over fsdp is a reduce-scatter, or an all-reduce that sends twice as much.
    reduced = sum(
        x.sent_bytes for (kind, axes), x in sent.items() if kind != "all-gather" and axes == ("fsdp",)
    )
    assert 1 <= reduced / (weights * 63 / 64) <= 2.01
    step = plan.step_seconds()
    assert step.best <= step.predicted <= step.worst


def test_70b_on_512_chips_of_v5p(tmp_path, capsys):
    plan = _plan("fuji-70B-v2-flash", mesh_selector="tpu-v5p-1024", tmp_path=tmp_path, capsys=capsys)
    assert plan.fits
    whole = {x.path for x in plan.parameters if x.num_parts == 1 and x.num_bytes > 2**29}
    assert whole == {"decoder/emb/token_emb/weight", "decoder/lm_head/weight"}
    assert plan.parts["parameters"] == sum(x.num_bytes for x in plan.parameters)
