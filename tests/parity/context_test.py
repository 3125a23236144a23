"""Ten steps of fuji-tiny's model on one device against the same steps where devices split the positions of each row.

Each row has two documents. Keys and values are gathered or passed around, positions lie in the order of the text or in
head-tail order, and each mesh takes its batches whole and in four parts.
"""

import functools
from typing import NamedTuple

import numpy as np
import pytest

from axlearn.common.module import nowrap
from axlearn.common.trainer_config_modifier import (
    ContextParallelMethod,
    ContextParallelModifier,
    GradientAccumulationModifier,
)
from axlearn.experiments.text.gpt import common, fuji_tiny
from tests.parity.layout_runs import (
    LayoutRun,
    UnevenInput,
    check_begins_and_trains_the_same,
    check_gradients_are_the_same,
    input_partitioner,
    run_layout,
)

_DIM, _VOCAB_SIZE, _SEQ_LEN, _NUM_LAYERS = 32, 64, 32, 2
# A row for each part and each of the devices that split rows.
_BATCH_SIZE = 16
_OTHER_AXES = {"alone": {}, "fsdp": {"fsdp": 2}, "model": {"model": 2}}


class _Case(NamedTuple):
    """A layout of devices, and the number of parts of a batch."""

    method: str
    num_devices: int
    balanced: bool
    others: str
    grad_acc_steps: int

    @property
    def axes(self) -> dict[str, int]:
        return {"seq": self.num_devices, **_OTHER_AXES[self.others]}


# Each pair of values of two of these fields occurs.
_CASES = [
    _Case("all_gather", 2, True, "fsdp", 4),
    _Case("all_gather", 4, False, "model", 4),
    _Case("all_gather", 4, True, "alone", 1),
    _Case("all_gather", 2, False, "fsdp", 1),
    _Case("all_gather", 2, True, "model", 1),
    _Case("all_gather", 2, False, "alone", 4),
    _Case("all_gather", 4, True, "fsdp", 4),
]
_SLOW_CASES = [
    case
    for method in ("all_gather",)
    for num_devices in (2, 4)
    for balanced in (False, True)
    for others in _OTHER_AXES
    for grad_acc_steps in (1, 4)
    if (case := _Case(method, num_devices, balanced, others, grad_acc_steps)) not in _CASES
]
_every_case = pytest.mark.parametrize(
    "case",
    [*_CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in _SLOW_CASES)],
    ids=lambda case: "-".join(map(str, case)),
)


class _PackedInput(UnevenInput):
    """Rows of two documents, whose lengths differ from row to row."""

    @nowrap
    def batches(self):
        starts = 1 + np.arange(_BATCH_SIZE)[:, None] * 5 % (_SEQ_LEN - 1)
        indices = np.arange(_SEQ_LEN)
        is_second = indices >= starts
        segment_ids = (1 + is_second).astype(np.int32)
        positions = np.where(is_second, indices - starts, indices).astype(np.int32)
        for batch in super().batches():
            yield {**batch, "input_segment_ids": segment_ids, "input_positions": positions}


def _config(axes: dict[str, int], *, grad_acc_steps: int = 1):
    cfg = fuji_tiny.trainer_config()
    cfg.model.decoder.set(dim=_DIM, vocab_size=_VOCAB_SIZE)
    cfg.model.decoder.transformer.num_layers = _NUM_LAYERS
    cfg.learner = common.learner_config(peak_lr=3e-3, max_step=100, warmup_steps=1, weight_decay=1e-4)
    cfg.input = _PackedInput.default_config().set(
        global_batch_size=_BATCH_SIZE,
        source_length=_SEQ_LEN,
        vocab_size=_VOCAB_SIZE,
        input_partitioner=input_partitioner(),
    )
    cfg.set(dir="unused", evalers={}, mesh_shape=common.mesh_shape_from_axes(**axes))
    if grad_acc_steps > 1:
        GradientAccumulationModifier.default_config().set(grad_acc_steps=grad_acc_steps).instantiate()(cfg)
    return cfg


def _run_config(cfg) -> LayoutRun:
    return run_layout(cfg, axis_sizes=dict(zip(common.MESH_AXIS_NAMES, cfg.mesh_shape, strict=True)))


@functools.cache
def _run(case: _Case) -> LayoutRun:
    cfg = _config(case.axes, grad_acc_steps=case.grad_acc_steps)
    modifier = ContextParallelModifier.default_config().set(
        method=ContextParallelMethod(case.method), num_chunks=None if case.balanced else 1
    )
    cfg = modifier.instantiate()(cfg)
    assert cfg.model.decoder.num_seq_chunks == (2 * case.num_devices if case.balanced else None)
    return _run_config(cfg)


@functools.cache
def _reference() -> LayoutRun:
    """The plain recipe on one device."""
    return _run_config(_config({}))


@_every_case
def test_every_context_begins_with_the_same_bits_and_trains_the_same(case):
    check_begins_and_trains_the_same(_run(case), _reference())


@_every_case
def test_every_gradient_is_the_same_in_every_context(case):
    check_gradients_are_the_same(_run(case), _reference())
