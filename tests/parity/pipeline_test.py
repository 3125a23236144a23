"""Ten steps of gspmd's model, made small, on one device against the same steps on pipelines of two and four stages.

Rows have different numbers of live targets, some none at all; each mesh takes its batches whole and in four parts, each
of which passes the pipeline in four micro-batches.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
import pytest

from axlearn.common.pipeline import GPipeSchedule, StreamSchedule
from axlearn.common.trainer_config_modifier import GradientAccumulationModifier
from axlearn.common.utils import HybridMeshShape
from axlearn.experiments.text.gpt import common, gspmd
from tests.parity.layout_runs import (
    LayoutRun,
    UnevenInput,
    check_begins_and_trains_the_same,
    check_gradients_are_the_same,
    input_partitioner,
    run_layout,
)

_NUM_MICROBATCHES = 4
_DIM, _VOCAB_SIZE, _SEQ_LEN = 32, 64, 8
# Two rows for each micro-batch of each part.
_BATCH_SIZE = 32


class _Layout(NamedTuple):
    """A mesh, and the number of stages on it."""

    num_stages: int
    axes: dict[str, int]
    # How the mesh extends over slices; None: it has one.
    dcn_axes: dict[str, int] | None = None

    @property
    def mesh_shape(self):
        shape = common.mesh_shape_from_axes(**self.axes)
        if self.dcn_axes is None:
            return shape
        return HybridMeshShape(shape, common.mesh_shape_from_axes(**self.dcn_axes))

    @property
    def axis_sizes(self) -> dict[str, int]:
        shapes = [common.mesh_shape_from_axes(**axes) for axes in (self.axes, self.dcn_axes or {})]
        return dict(zip(common.MESH_AXIS_NAMES, (x * y for x, y in zip(*shapes, strict=True)), strict=True))


_LAYOUTS = {
    "one device, 2 stages": _Layout(2, {}),
    "one device, 4 stages": _Layout(4, {}),
    "pipeline 2": _Layout(2, {"pipeline": 2}),
    "pipeline 4": _Layout(4, {"pipeline": 4}),
    "pipeline 2 for 4 stages": _Layout(4, {"pipeline": 2}),
    "pipeline 2, fsdp 2, model 2": _Layout(2, {"pipeline": 2, "fsdp": 2, "model": 2}),
    "pipeline 4, data 2": _Layout(4, {"pipeline": 4, "data": 2}),
    "2 slices of data 2, model 2": _Layout(2, {"data": 2, "model": 2}, {"pipeline": 2}),
}
_SCHEDULES = {"gpipe": GPipeSchedule, "stream": StreamSchedule}
# Layout, schedule, parts of a batch: those of every run; all others are in `make test-scale`.
_CASES = [
    ("pipeline 4", "stream", 1),
    ("pipeline 2, fsdp 2, model 2", "gpipe", 4),
    ("2 slices of data 2, model 2", "stream", 4),
]
_SCALE_CASES = [
    (layout, schedule, steps)
    for layout in _LAYOUTS
    for schedule in _SCHEDULES
    for steps in (1, 4)
    if (layout, schedule, steps) not in _CASES
]
_every_case = pytest.mark.parametrize(
    ("name", "schedule", "grad_acc_steps"),
    [*_CASES, *(pytest.param(*case, marks=pytest.mark.scale) for case in _SCALE_CASES)],
)


@functools.cache
def _run(name: str, schedule: str = "gpipe", grad_acc_steps: int = 1) -> LayoutRun:
    layout = _LAYOUTS[name]
    cfg = gspmd.trainer_config()
    cfg.model = gspmd.model_config(
        schedule=_SCHEDULES[schedule].default_config(),
        dim=_DIM,
        num_heads=4,
        num_kv_heads=2,
        num_layers=layout.num_stages,
        num_stages=layout.num_stages,
        num_microbatches=_NUM_MICROBATCHES,
        vocab_size=_VOCAB_SIZE,
    )
    # Of Adam the first step shows the gradient.
    cfg.learner = common.learner_config(peak_lr=3e-3, max_step=100, warmup_steps=1, weight_decay=1e-4)
    cfg.input = UnevenInput.default_config().set(
        global_batch_size=_BATCH_SIZE,
        source_length=_SEQ_LEN,
        vocab_size=_VOCAB_SIZE,
        input_partitioner=input_partitioner(),
    )
    cfg.set(dir="unused", evalers={}, mesh_shape=layout.mesh_shape, train_dtype=jnp.float32)
    if grad_acc_steps > 1:
        GradientAccumulationModifier.default_config().set(grad_acc_steps=grad_acc_steps).instantiate()(cfg)
    return run_layout(cfg, axis_sizes=layout.axis_sizes)


def _reference(name: str) -> LayoutRun:
    return _run(f"one device, {_LAYOUTS[name].num_stages} stages")


@_every_case
def test_every_pipeline_begins_with_the_same_bits_and_trains_the_same(name, schedule, grad_acc_steps):
    check_begins_and_trains_the_same(_run(name, schedule, grad_acc_steps), _reference(name))


@_every_case
def test_every_gradient_is_the_same_on_every_pipeline(name, schedule, grad_acc_steps):
    check_gradients_are_the_same(_run(name, schedule, grad_acc_steps), _reference(name))


@_every_case
def test_between_stages_there_is_nothing_but_the_way_to_the_next_one(name, schedule, grad_acc_steps):
    layout = _LAYOUTS[name]
    if "pipeline" not in {**layout.axes, **(layout.dcn_axes or {})}:
        return
    collectives = _run(name, schedule, grad_acc_steps).collectives
    num_steps = _NUM_MICROBATCHES + layout.num_stages - 1
    along_pipeline = [x for x in collectives if "pipeline" in x.axes]
    in_loop = [x for x in along_pipeline if "_TransformerPipeline]/while/body" in x.op_name]
    assert {(x.kind, x.axes, x.num_runs) for x in in_loop} == {
        ("collective-permute", ("pipeline",), num_steps * grad_acc_steps)
    }
    # Hidden states there and back, segment ids and positions there; a stream moves those that wait, too.
    assert len(in_loop) == {"gpipe": 4, "stream": 8}[schedule]
    # Besides: what the first stage gets, what the last one has made, and the vocabulary, whose rows are split.
    others = [x for x in along_pipeline if x not in in_loop]
    assert all(x.num_runs <= grad_acc_steps for x in others)
    unusual = [x for x in others if x.kind not in ("all-gather", "all-reduce")]
    # Where "model" splits it too, the table goes from where it is stored to where the logits lie; these do not move.
    assert all(x.kind == "all-to-all" and "emb_attend" in x.op_name for x in unusual)
    assert all(x.whole_bytes <= 4 * _VOCAB_SIZE * _DIM for x in unusual)
    assert not unusual or "model" in layout.axes
    if set(layout.axes) == {"pipeline"}:
        assert len(collectives) == len(along_pipeline)


def test_one_device_needs_no_collectives():
    assert not _run("one device, 2 stages").collectives
