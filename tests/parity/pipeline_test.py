"""Ten steps of gspmd's model, made small, on one device against the same steps on pipelines of two and four stages.

Rows have different numbers of live targets, some none at all; each mesh takes its batches whole and in four parts, each
of which passes the pipeline in four micro-batches.
"""

import functools
import math
from typing import NamedTuple

import pytest

from axlearn.common.utils import HybridMeshShape
from axlearn.experiments.text.gpt import common
from tests.parity.runs import Run, check_begins_and_trains_the_same, check_gradients_are_the_same, run
from tests.parity.small_models import NUM_STEPS, SCHEDULES, UnevenInput, small_gspmd

_NUM_MICROBATCHES = 4
# Bytes of the table of the vocabulary.
_TABLE_BYTES = 4 * 64 * 32
# Two rows for each micro-batch of each part.
_INPUT = UnevenInput.default_config().set(global_batch_size=32, source_length=8)


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
    def num_devices(self) -> int:
        return math.prod([*self.axes.values(), *(self.dcn_axes or {}).values()])


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
# Layout, schedule, parts of a batch: those of every run; all others are in `make test-scale`.
_CASES = [
    ("pipeline 4", "stream", 1),
    ("pipeline 2, fsdp 2, model 2", "gpipe", 4),
]
_SCALE_CASES = [
    (layout, schedule, steps)
    for layout in _LAYOUTS
    for schedule in SCHEDULES
    for steps in (1, 4)
    if (layout, schedule, steps) not in _CASES
]
_every_case = pytest.mark.parametrize(
    ("name", "schedule", "grad_acc_steps"),
    [*_CASES, *(pytest.param(*case, marks=pytest.mark.scale) for case in _SCALE_CASES)],
)


@functools.cache
def _run(name: str, schedule: str = "gpipe", grad_acc_steps: int = 1) -> Run:
    layout = _LAYOUTS[name]
    cfg = small_gspmd(
        _INPUT.clone(),
        mesh_shape=layout.mesh_shape,
        num_stages=layout.num_stages,
        num_microbatches=_NUM_MICROBATCHES,
        schedule=schedule,
        grad_acc_steps=grad_acc_steps,
    )
    return run(cfg, num_devices=layout.num_devices, num_steps=NUM_STEPS)


def _reference(name: str) -> Run:
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
    collectives = _run(name, schedule, grad_acc_steps).collectives()
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
    assert all(x.whole_bytes <= _TABLE_BYTES for x in unusual)
    assert not unusual or "model" in layout.axes
    if set(layout.axes) == {"pipeline"}:
        assert len(collectives) == len(along_pipeline)


def test_one_device_needs_no_collectives():
    assert not _run("one device, 2 stages").collectives()
