"""What a check says of a trainer config, without its machine."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from axlearn.common.config import config_for_function
from axlearn.common.config_check import (
    CheckReport,
    Finding,
    Severity,
    check_config,
    devices_of,
    least_devices_for,
    report_text,
    with_findings,
)
from axlearn.common.evaler import SpmdEvaler, every_n_steps_policy
from axlearn.common.input_fake import FakeLmInput
from axlearn.common.machines import machine_of, usual_names
from axlearn.common.trainer import select_mesh_config
from axlearn.common.utils import HybridMeshShape, build_mesh
from axlearn.experiments.registry import find_trainer_config
from tests.cli.config_recipe import VOCAB_SIZE, trainer_config


def _texts(report: CheckReport, severity: Severity) -> list[str]:
    return [f"{finding.path}: {finding.message}" for finding in report.of(severity)]


def _fuji_tiny():
    return find_trainer_config("fuji-tiny")(data_dir="FAKE")


def test_bytes_and_places_are_those_of_a_trainer_on_real_devices():
    cfg = _fuji_tiny().set(dir="run")
    cfg.mesh_shape = (1, 2, 1, 2, 1, 2)
    report = check_config(cfg, name="tiny")
    assert report.num_devices == jax.device_count() == 8
    trainer = cfg.instantiate(parent=None)
    needs = trainer.programs.memory_needs()
    assert report.needs is not None
    assert report.needs.parts() == needs.parts()
    sizes = [math.prod(spec.shape) for spec in jax.tree.leaves(trainer.trainer_state_specs.model)]
    assert report.num_parameters == sum(sizes)
    assert report.flops_per_token == trainer.model.flops_per_token(256)
    assert report.is_ok
    assert report.findings == ()


def test_facts_of_a_large_model_agree_with_arithmetic():
    cfg = find_trainer_config("fuji-7B-v2-flash")()
    select_mesh_config(cfg, mesh_selector="tpu-v4-1024")
    report = check_config(cfg, name="7B", mesh_selector="tpu-v4-1024")
    dim, ffn, vocab, layers = 4096, 11008, 32768, 32
    layer = 4 * dim * dim + 3 * dim * ffn + 2 * dim
    assert report.num_parameters == vocab * dim + layers * layer + dim
    assert report.parameters["decoder/transformer"] == layers * layer
    assert report.num_devices == 512
    assert {axis: size for axis, size in report.mesh.items() if size > 1} == {"data": 32, "fsdp": 16}
    assert report.tokens_per_step == 1024 * 4096
    # Six per parameter of a product (the head shares the table's), and 12 x heads x head dim x length x layers.
    full = 6 * (vocab * dim + layers * (layer - 2 * dim)) + 12 * layers * dim * 4096
    assert report.flops_per_token is not None
    assert report.flops_per_token.full == full
    # Weights and two moments in float32, a checkpoint of all of them.
    assert report.checkpoint_bytes is not None
    assert report.checkpoint_bytes == pytest.approx(3 * 4 * report.num_parameters, rel=1e-6)
    assert report.needs is not None
    # The table lies whole on every device, and the check says so.
    split = report.num_parameters - vocab * dim
    assert report.needs.parts()["optimizer"] == pytest.approx(2 * 4 * (split / 16 + vocab * dim), rel=1e-3)
    whole = (
        "model/decoder/emb/token_emb/weight: 32768 x 4096 float32 with spec (None, 'model') is whole along "
        "'fsdp' (16): 512.0 MiB and 1.0 GiB of optimizer state on each device"
    )
    assert [text for text in _texts(report, Severity.WARNING) if text.startswith(whole)]
    assert report.is_ok


def test_the_report_reads_like_this(golden):
    cfg = find_trainer_config("fuji-7B-v2-flash")(data_dir="FAKE")
    cfg.max_step = 1000
    select_mesh_config(cfg, mesh_selector="tpu-v5litepod-256-4")
    report = check_config(cfg, name="fuji-7B-v2-flash", mesh_selector="tpu-v5litepod-256-4", trace_step=False)
    # Whose tokenizers lie on this machine is not the question here.
    findings = [finding for finding in report.findings if finding.severity is not Severity.NOTE]
    golden("cli/config_check.txt", report_text(dataclasses.replace(report, findings=tuple(findings))) + "\n")


def test_a_parameter_that_does_not_divide_is_named_with_its_bytes():
    cfg = trainer_config()
    cfg.mesh_shape = (2, 3)
    report = check_config(cfg, name="bigrams")
    # 16 columns over 3 devices: whole on each of them, 16 x 16 floats.
    table = (
        "dimension 1 is not split over 'model': its size 16 is no multiple of 3: 1.0 KiB per device, 3 times"
    )
    assert f"model/weight: {table} what was meant" in _texts(report, Severity.WARNING)
    assert report.is_ok
    cfg.mesh_shape = (2, 4)
    assert check_config(cfg, name="bigrams").findings == ()


def test_steps_that_differ_from_the_run_s_are_warned_of():
    cfg = trainer_config().set(max_step=5)
    cfg.checkpointer.keep_every_n_steps = 3
    report = check_config(cfg, name="bigrams")
    assert _texts(report, Severity.WARNING) == [
        "checkpointer.save_policy.max_step: it is 40, and the run's own max_step is 5",
        "learner.optimizer.learning_rate.max_step: it is 40, and the run's own max_step is 5",
        "checkpointer.save_policy.n: it is 10, and the run has 5 steps: nothing is saved before its end",
    ]
    cfg.max_step = 40
    assert _texts(check_config(cfg, name="bigrams"), Severity.WARNING) == [
        "checkpointer.keep_every_n_steps: it is 3, and there is a checkpoint every 10 steps: none of them is ever "
        "deleted"
    ]


def test_data_with_more_ids_than_the_model_is_an_error():
    cfg = _fuji_tiny()
    cfg.input.vocab_size = cfg.model.decoder.vocab_size + 1
    (text,) = _texts(check_config(cfg, name="tiny"), Severity.ERROR)
    assert text.startswith("input.vocab_size: its tokenizer has 2049 ids, ")


def test_a_tokenizer_that_is_not_here_is_a_note_and_said_once():
    cfg = find_trainer_config("fuji-test-v1")(data_dir="/nowhere")
    report = check_config(cfg, name="test", trace_step=False)
    (text,) = [text for text in _texts(report, Severity.NOTE) if "vocab_cfg" in text]
    assert text.startswith("input.source.vocab_cfg: the tokenizer is not here")


def test_rows_of_an_evaluation_must_divide_as_well():
    cfg = trainer_config()
    cfg.evalers = {
        "small": SpmdEvaler.default_config().set(
            input=FakeLmInput.default_config().set(
                is_training=False,
                global_batch_size=6,
                source_length=8,
                vocab_size=VOCAB_SIZE,
                total_num_batches=1,
            ),
            eval_policy=config_for_function(every_n_steps_policy).set(n=10),
        )
    }
    cfg.mesh_shape = (4, 1)
    (text,) = _texts(check_config(cfg, name="bigrams"), Severity.ERROR)
    assert text == "evalers['small'].input: a batch of 6 rows does not divide over the 4 shards of data"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mesh_shape": (3, 1)}, "a batch of 64 rows does not divide over the 3 shards"),
        ({"batch_axis_names": "rows"}, "'rows' is no axis of the mesh"),
        ({"mesh_shape": (0, 2)}, "is not the size of an axis"),
        ({"mesh_shape": (2, 2, 2)}, "Expected one size per name"),
        ({"input": FakeLmInput.default_config()}, "Missing value for required fields"),
    ],
)
def test_what_a_start_would_refuse_is_an_error(change, message):
    cfg = trainer_config()
    cfg.set(**change)
    (text,) = _texts(check_config(cfg, name="bigrams"), Severity.ERROR)
    assert message in text


def test_state_that_does_not_fit_the_machine_is_an_error_unless_the_run_may_try():
    cfg = find_trainer_config("fuji-7B-v2-flash")(data_dir="FAKE")
    cfg.mesh_shape = (1, 8, 1, 1, 1, 1)
    report = check_config(cfg, name="7B", mesh_selector="tpu-v5litepod-8", trace_step=False)
    (text,) = _texts(report, Severity.ERROR)
    assert text.startswith("mesh_shape: each device needs ")
    assert text.endswith("without activations, and TPU v5 lite has 15.8 GiB")
    cfg.check_memory = False
    report = check_config(cfg, name="7B", mesh_selector="tpu-v5litepod-8", trace_step=False)
    assert report.is_ok
    assert text in _texts(report, Severity.WARNING)


def test_a_machine_that_nobody_knows_is_a_note():
    report = check_config(trainer_config(), name="bigrams", mesh_selector="my-cluster")
    assert report.machine is None
    assert report.num_devices == 1
    (text,) = _texts(report, Severity.NOTE)
    assert "'my-cluster' is no kind of machine" in text
    assert report.is_ok


def test_an_error_of_ours_is_no_finding(monkeypatch):
    def fail(*args, **kwargs):
        return len(None)

    monkeypatch.setattr("axlearn.common.trainer._programs.Programs.trace_train_step", fail)
    with pytest.raises(TypeError, match="NoneType"):
        check_config(trainer_config(), name="bigrams")


def test_the_config_is_not_changed():
    cfg = trainer_config()
    before = cfg.debug_string()
    check_config(cfg, name="bigrams")
    assert cfg.debug_string() == before


def test_devices_that_are_not_there_lie_over_slices_as_real_ones_do():
    devices = devices_of(machine_of("tpu-v5litepod-256-4"))
    assert [(device.id, device.process_index) for device in devices[[0, 255, 256, 1023]]] == [
        (0, 0), (255, 0), (256, 1), (1023, 3),
    ]  # fmt: skip
    shape = HybridMeshShape(ici_mesh_shape=(1, -1), dcn_mesh_shape=(-1, 1))
    mesh = build_mesh(mesh_shape=shape, mesh_axis_names=("data", "fsdp"), devices=list(devices))
    assert dict(mesh.shape) == {"data": 4, "fsdp": 256}
    slices = np.vectorize(lambda device: device.process_index)(mesh.devices)
    assert (slices == np.arange(4)[:, None]).all()
    flat = build_mesh(mesh_shape=(-1, 16), mesh_axis_names=("data", "fsdp"), devices=list(devices))
    assert dict(flat.shape) == {"data": 64, "fsdp": 16}


@pytest.mark.parametrize(
    ("mesh_shape", "num_devices", "num_slices"),
    [
        ((-1, 2, 3), 6, 1),
        ((1, -1), 1, 1),
        (HybridMeshShape(ici_mesh_shape=(-1, 4), dcn_mesh_shape=(2, 1)), 8, 2),
    ],
)
def test_without_a_machine_there_are_as_many_devices_as_the_mesh_takes(mesh_shape, num_devices, num_slices):
    devices = least_devices_for(mesh_shape)
    assert len(devices) == num_devices
    assert len({device.process_index for device in devices}) == num_slices


def test_usual_names_are_names_of_machines():
    names = list(usual_names())
    assert len(set(names)) == len(names)
    machines = [machine_of(name) for name in names]
    assert {machine.accelerator for machine in machines} == {"tpu", "gpu", "neuron"}
    assert {"tpu-v5p-1024", "tpu-v5litepod-256-4", "gpu-p5.48xlarge-256"} <= set(names)


def test_errors_come_first_in_a_report():
    report = CheckReport("x", None, 1, findings=(Finding(Severity.WARNING, "a", "b"),))
    report = with_findings(report, [Finding(Severity.NOTE, "c", "d"), Finding(Severity.ERROR, "e", "f")])
    assert report_text(report) == "error: e: f.\nwarning: a: b.\nnote: c: d.\nx: 1 error, 1 warning, 1 note"
    assert not report.is_ok
