"""gspmd: its dumps beside the reference's, and a few steps of the recipe made small."""

import contextlib
import functools
import json

import jax
import numpy as np
import pytest

from axlearn.common.data_dir import FAKE
from axlearn.common.golden_config import config_text
from axlearn.common.utils import HybridMeshShape
from axlearn.experiments.text.gpt import c4_trainer, common, gspmd
from tests.compiling import compiling_anew

_GPIPE, _STREAM = "gspmd-16B-2x16x8", "gspmd-16B-2x16x8-stream"
_SMALL = {
    "dim": 64,
    "num_heads": 4,
    "num_kv_heads": 2,
    "num_layers": 4,
    "num_microbatches": 4,
    "vocab_size": 128,
}


def test_streaming_changes_one_line_of_the_config():
    # tests/experiments/text/gpt/c4_trainer_test.py compares all lines with the reference's.
    configs = gspmd.trainer_configs()
    assert list(configs) == [_GPIPE, _STREAM]
    gpipe, stream = (config_text(configs[name]()).splitlines() for name in (_GPIPE, _STREAM))
    different = [line for line, other in zip(gpipe, stream, strict=True) if line != other]
    assert different == [
        "model.decoder.transformer.pipeline.schedule.klass: 'axlearn.common.pipeline.GPipeSchedule'"
    ]


def test_the_model_has_as_many_parameters_as_it_says():
    model = gspmd.trainer_config().model.set(name="model").instantiate(parent=None)
    specs = jax.tree.leaves(model.create_parameter_specs_recursively())
    assert round(sum(np.prod(spec.shape) for spec in specs) / 1e9, 1) == 11.1


@pytest.fixture
def small_gspmd(monkeypatch):
    monkeypatch.setattr(gspmd, "model_config", functools.partial(gspmd.model_config, **_SMALL))
    monkeypatch.setattr(gspmd, "MAX_SEQUENCE_LENGTH", 16)
    monkeypatch.setattr(gspmd, "GLOBAL_BATCH_SIZE", 16)


def _losses(name, *, mesh_shape, num_devices, run_dir) -> list[float]:
    cfg = c4_trainer.named_trainer_configs()[name](data_dir=FAKE)
    cfg.set(dir=str(run_dir), max_step=5, mesh_shape=mesh_shape, log_every_n_steps=1)
    cfg.evalers = {"validation": cfg.evalers["validation"]}
    trainer = cfg.instantiate(parent=None, devices=np.array(jax.devices()[:num_devices]))
    with compiling_anew() if num_devices > 1 else contextlib.nullcontext():
        trainer.run(jax.random.PRNGKey(0))
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


@pytest.mark.scale
def test_five_steps_of_the_recipe_made_small(small_gspmd, tmp_path):
    slices = HybridMeshShape(
        ici_mesh_shape=common.mesh_shape_from_axes(data=-1, model=2),
        dcn_mesh_shape=common.mesh_shape_from_axes(pipeline=2, data=-1),
    )
    ours = _losses(_STREAM, mesh_shape=slices, num_devices=8, run_dir=tmp_path / "slices")
    alone = _losses(
        _GPIPE, mesh_shape=common.mesh_shape_from_axes(), num_devices=1, run_dir=tmp_path / "one_device"
    )
    assert len(ours) == 5
    # In bfloat16, as the recipe has it: eight bits.
    np.testing.assert_allclose(ours, alone, rtol=2e-2)
