"""Ten steps of fuji-tiny's model on one device against the same steps where devices split the positions of each row.

Each row has two documents. Keys and values are gathered or passed around, positions lie in the order of the text or in
head-tail order, and each mesh takes its batches whole and in four parts. `make test` runs `_CASES`, and all of their
combinations are in `make test-scale`.
"""

import functools
import itertools
import math
from typing import NamedTuple

import pytest

from axlearn.common.compiled_program import Collective
from axlearn.common.trainer_config_modifier import ContextParallelMethod, ContextParallelModifier
from axlearn.experiments.text.gpt import common, fuji_tiny
from tests.parity.runs import Run, check_begins_and_trains_the_same, check_gradients_are_the_same, run
from tests.parity.small_models import NUM_STEPS, PackedInput, accumulate, input_partitioner, quick_learner

_DIM, _VOCAB_SIZE, _SEQ_LEN, _NUM_LAYERS = 32, 64, 32, 2
# Bytes of the keys of a position, or of its values: two heads of eight numbers.
_KEY_BYTES = 2 * 8 * 4
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

    @property
    def num_positions(self) -> int:
        """Of the rows that devices along "seq" share at a time."""
        return _SEQ_LEN * _BATCH_SIZE // self.grad_acc_steps // self.axes.get("fsdp", 1)


# A case takes some 15 s of one core, nearly all of it to compile.
_CASES = [
    _Case("all_gather", 4, True, "fsdp", 1),
    _Case("ring", 2, False, "model", 4),
]
_ALL_CASES = [
    _Case(*values)
    for values in itertools.product(("all_gather", "ring"), (2, 4), (True, False), _OTHER_AXES, (1, 4))
]
_SCALE_CASES = [case for case in _ALL_CASES if case not in _CASES]
_every_case = pytest.mark.parametrize(
    "case",
    [*_CASES, *(pytest.param(case, marks=pytest.mark.scale) for case in _SCALE_CASES)],
    ids=lambda case: "-".join(map(str, case)),
)


def _config(axes: dict[str, int], *, grad_acc_steps: int = 1):
    cfg = fuji_tiny.trainer_config()
    cfg.model.decoder.set(dim=_DIM, vocab_size=_VOCAB_SIZE)
    cfg.model.decoder.transformer.num_layers = _NUM_LAYERS
    cfg.learner = quick_learner()
    cfg.input = PackedInput.default_config().set(
        global_batch_size=_BATCH_SIZE,
        source_length=_SEQ_LEN,
        vocab_size=_VOCAB_SIZE,
        input_partitioner=input_partitioner(),
    )
    cfg.set(dir="unused", evalers={}, mesh_shape=common.mesh_shape_from_axes(**axes))
    return accumulate(cfg, grad_acc_steps)


@functools.cache
def _run(case: _Case) -> Run:
    cfg = _config(case.axes, grad_acc_steps=case.grad_acc_steps)
    modifier = ContextParallelModifier.default_config().set(
        method=ContextParallelMethod(case.method), num_chunks=None if case.balanced else 1
    )
    cfg = modifier.instantiate()(cfg)
    assert cfg.model.decoder.num_seq_chunks == (2 * case.num_devices if case.balanced else None)
    return run(cfg, num_devices=math.prod(case.axes.values()), num_steps=NUM_STEPS)


@functools.cache
def _reference() -> Run:
    """The plain recipe on one device."""
    return run(_config({}), num_devices=1, num_steps=NUM_STEPS)


@_every_case
def test_every_context_begins_with_the_same_bits_and_trains_the_same(case):
    check_begins_and_trains_the_same(_run(case), _reference())


@_every_case
def test_every_gradient_is_the_same_in_every_context(case):
    check_gradients_are_the_same(_run(case), _reference())


def _in_layers(case: _Case) -> list[Collective]:
    """The collectives along "seq" that run once or more in each layer and each part of a batch."""
    return [
        x
        for x in _run(case).collectives()
        if "seq" in x.axes and x.num_runs >= _NUM_LAYERS * case.grad_acc_steps
    ]


@_every_case
def test_in_a_layer_nothing_but_keys_and_values_travels_along_the_sequence(case):
    in_layers = _in_layers(case)
    # Parameters are split over "seq" too: they are gathered for products, and their gradients are added up.
    gathered = [x for x in in_layers if x.kind == "all-gather" and not x.op_name.endswith("dot_general")]
    key_bytes = _KEY_BYTES * case.num_positions // case.axes.get("model", 1)
    passed_on = [x for x in in_layers if x.kind == "collective-permute"]
    if case.method == "all_gather":
        assert [x.whole_bytes for x in gathered] == [key_bytes] * 2
        assert not passed_on
    else:
        assert not gathered
        # Each device passes on what it has of keys and values, and of their gradients in the backward pass.
        assert max(x.whole_bytes for x in passed_on) == key_bytes // case.num_devices
        assert all(x.axes == ("seq",) and "/shard_map/" in x.op_name for x in passed_on)
    others = [x for x in in_layers if x.kind not in ("all-gather", "all-reduce", "collective-permute")]
    # Only where "model" splits heads do those of the fused projection change places; see mesh_test.
    assert all(x.kind == "all-to-all" and "FusedGroupedQKVLinear" in x.op_name for x in others)
    assert not others or case.others == "model"


@_every_case
def test_for_the_order_ids_are_gathered_once_and_nothing_else(case):
    collectives = _run(case).collectives()
    id_bytes = 4 * case.num_positions
    gathered = [x for x in collectives if x.op_name.endswith("jvp(root[Model])/sharding_constraint")]
    # Ids, labels, segment ids and positions.
    expected = [("all-gather", ("seq",), case.grad_acc_steps, id_bytes)] * (4 if case.balanced else 0)
    assert [(x.kind, x.axes, x.num_runs, x.whole_bytes) for x in gathered] == expected


@_every_case
def test_outside_of_layers_only_rows_from_the_host_change_places(case):
    in_layers = _in_layers(case)
    outside = [x for x in _run(case).collectives() if "seq" in x.axes and x not in in_layers]
    # What the loss, its gradient and clipping add up, and ids and parameters that are gathered.
    others = [x for x in outside if x.kind not in ("all-gather", "all-reduce")]
    # Segment ids go around once for all layers. Where "model" splits the vocabulary its table changes places.
    names = {"all-to-all": ["jit(train_step)/sharding_constraint"], "collective-permute": []}
    if case.method == "ring":
        names["collective-permute"].append("/shard_map/")
    if case.others == "model":
        names["all-to-all"].append("emb_attend")
    assert not [x for x in others if not any(name in x.op_name for name in names.get(x.kind, []))]
