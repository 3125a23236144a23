"""Two rows of the table of plans at two layers, compiled for TPUs that are not there."""

import json

import pytest

from axlearn.cli import _plan_worker
from axlearn.cli import plan as plan_command
from axlearn.common.aot_compilation import (
    Plan,
    advise,
    make_failed_plan,
    topology_devices,
    trace_trainer_step,
)
from axlearn.common.machines import machine_of

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


def test_7b_on_512_chips_of_v4(tmp_path, capsys):
    plan = _plan("fuji-7B-v2-flash", mesh_selector="tpu-v4-1024", tmp_path=tmp_path, capsys=capsys)
    assert plan.fits
    # 32768 x 4096 in float32.
    assert {x.path for x in plan.parameters if x.num_bytes == 2**29} == {"decoder/emb/token_emb/weight"}
    assert plan.parts["parameters"] == sum(x.num_bytes for x in plan.parameters)


def test_what_is_advised_for_70b_on_v5e_was_tried_on_its_devices():
    """Of 1024 rows on 1024 devices; the state alone is told by specs, so nothing is compiled."""
    request = {"name": "fuji-70B-v2-flash", "mesh_selector": "tpu-v5litepod-256-4", "module": None}
    cfg = _plan_worker.trainer_config_of({**request, "data_dir": "FAKE", "overrides": []})
    machine = machine_of("tpu-v5litepod-256-4")
    devices = topology_devices(machine)
    step = trace_trainer_step(cfg, devices=devices)
    plan = make_failed_plan(step, machine=machine, failure="no", temporary_bytes=2**34, compile_seconds=0)
    assert plan.whole == ("decoder/emb/token_emb/weight", "decoder/lm_head/weight")
    lines = advise(plan, trainer_config=cfg, devices=devices)
    assert not any("refused" in line or "GradientAccumulationModifier" in line for line in lines)
    assert sum(line.startswith("--set") and "'fsdp'" in line for line in lines) == 4
    assert not any("'data'" in line for line in lines)
    (offload,) = [line for line in lines if "offload_optimizer" in line]
    optimizer = plan.parts["optimizer"]
    assert f"the state is {(plan.state_bytes - optimizer) / 2**30:.3g} GiB then" in offload
