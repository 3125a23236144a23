"""Ten steps of gspmd's model, made small, on one device against the same steps on pipelines of two and four stages.

Rows have different numbers of live targets, some none at all; each mesh takes its batches whole and in four parts, each
of which passes the pipeline in four micro-batches.
"""

import contextlib
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axlearn.common.compiled_program import Collective, collectives_of
from axlearn.common.config import config_for_function
from axlearn.common.input_base import partition_by_path_rank
from axlearn.common.input_fake import FakeLmInput
from axlearn.common.module import nowrap
from axlearn.common.pipeline import GPipeSchedule, StreamSchedule
from axlearn.common.trainer import SpmdTrainer
from axlearn.common.trainer_config_modifier import GradientAccumulationModifier
from axlearn.common.utils import HybridMeshShape, flatten_items, host_to_global_array
from axlearn.experiments.text.gpt import common, gspmd
from tests.parity.fuji_runs import compiling_anew

_NUM_STEPS = 10
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
# Layout, schedule, parts of a batch: each pair of them occurs.
_CASES = [
    ("pipeline 2", "gpipe", 1),
    ("pipeline 2", "stream", 4),
    ("pipeline 4", "gpipe", 4),
    ("pipeline 4", "stream", 1),
    ("pipeline 2, fsdp 2, model 2", "gpipe", 4),
    ("pipeline 2, fsdp 2, model 2", "stream", 1),
    ("2 slices of data 2, model 2", "gpipe", 1),
    ("2 slices of data 2, model 2", "stream", 4),
]
_SLOW_CASES = [
    (layout, schedule, steps)
    for layout in _LAYOUTS
    for schedule in _SCHEDULES
    for steps in (1, 4)
    if (layout, schedule, steps) not in _CASES
]
_every_case = pytest.mark.parametrize(
    ("name", "schedule", "grad_acc_steps"),
    [*_CASES, *(pytest.param(*case, marks=pytest.mark.scale) for case in _SLOW_CASES)],
)


class _UnevenInput(FakeLmInput):
    """Made-up ids, with labels of different length in each row: rows 0 and 5 have none."""

    @nowrap
    def batches(self):
        lens = 1 + np.arange(_BATCH_SIZE) * 3 % _SEQ_LEN
        lens[[0, 5]] = 0
        is_live = np.arange(_SEQ_LEN) < lens[:, None]
        for batch in super().batches():
            labels = np.where(is_live, batch["target_labels"], -1).astype(np.int32)
            yield {**batch, "target_labels": labels, "target_num_bytes": lens.astype(np.int32)}


def _trainer(layout: _Layout, *, schedule: str, grad_acc_steps: int) -> SpmdTrainer:
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
    partition = config_for_function(partition_by_path_rank).set(
        path_rank_to_partition={
            (None, 1): jax.P(common.BATCH_AXIS_NAMES),
            (None, 2): jax.P(common.BATCH_AXIS_NAMES, "seq"),
        }
    )
    cfg.input = _UnevenInput.default_config().set(
        global_batch_size=_BATCH_SIZE,
        source_length=_SEQ_LEN,
        vocab_size=_VOCAB_SIZE,
        input_partitioner=partition,
    )
    cfg.set(dir="unused", evalers={}, mesh_shape=layout.mesh_shape, train_dtype=jnp.float32)
    if grad_acc_steps > 1:
        GradientAccumulationModifier.default_config().set(grad_acc_steps=grad_acc_steps).instantiate()(cfg)
    num_devices = int(np.prod(list(layout.axis_sizes.values())))
    return cfg.klass(cfg.clone(), parent=None, devices=np.array(jax.devices()[:num_devices]))


class _Run(NamedTuple):
    initial: dict[str, np.ndarray]
    losses: list[float]
    gradients: dict[str, np.ndarray]
    final: dict[str, np.ndarray]
    collectives: list[Collective]


def _arrays(tree) -> dict[str, np.ndarray]:
    return {path: np.asarray(x) for path, x in flatten_items(tree)}


@functools.cache
def _run(name: str, schedule: str = "gpipe", grad_acc_steps: int = 1) -> _Run:
    layout = _LAYOUTS[name]
    trainer = _trainer(layout, schedule=schedule, grad_acc_steps=grad_acc_steps)
    trainer.init(jax.random.PRNGKey(5))
    initial, losses, gradients = _arrays(trainer.trainer_state.model), [], {}
    with trainer.mesh():
        with (
            compiling_anew()
            if any(size > 1 for size in layout.axis_sizes.values())
            else contextlib.nullcontext()
        ):
            step_fn = trainer.compile_train_step()
        state, batches = trainer.trainer_state, trainer.input.batches()
        for _ in range(_NUM_STEPS):
            batch = host_to_global_array(next(batches), partition=trainer.input.partition_spec)
            state, outputs = step_fn(state, batch)
            losses.append(float(outputs["loss"]))
            if not gradients:
                moments = {path: x for path, x in _arrays(state.learner).items() if "/mu/" in path}
                gradients = {path.split("/mu/")[1]: x for path, x in moments.items()}
    return _Run(
        initial=initial,
        losses=losses,
        gradients=gradients,
        final=_arrays(state.model),
        collectives=collectives_of(step_fn.as_text(), mesh_shape=layout.axis_sizes),
    )


def _reference(name: str) -> _Run:
    return _run(f"one device, {_LAYOUTS[name].num_stages} stages")


@_every_case
def test_every_pipeline_begins_with_the_same_bits_and_trains_the_same(name, schedule, grad_acc_steps):
    run, expected = _run(name, schedule, grad_acc_steps), _reference(name)
    assert run.initial.keys() == expected.initial.keys()
    # From jax 0.11 on, XLA's CPU code for random normal numbers depends on how many a device draws; see mesh_test.
    max_ulp = 0 if jax.__version_info__ < (0, 11) else 4
    for path, value in expected.initial.items():
        np.testing.assert_array_max_ulp(run.initial[path], value, maxulp=max_ulp)
    np.testing.assert_allclose(run.losses, expected.losses, rtol=1e-5)
    # The steps have moved something: equal losses of an unchanged model would prove little.
    assert all((value != run.initial[path]).any() for path, value in run.final.items())


@_every_case
def test_every_gradient_is_the_same_on_every_pipeline(name, schedule, grad_acc_steps):
    run, expected = _run(name, schedule, grad_acc_steps), _reference(name)
    assert run.gradients.keys() == expected.gradients.keys() == run.initial.keys()
    for path, gradient in expected.gradients.items():
        error = np.abs(run.gradients[path] - gradient).max() / np.abs(gradient).max()
        assert error < 1e-5, (path, error)


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
