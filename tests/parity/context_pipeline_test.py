"""Ten steps of gspmd's model, made small, on one device against the same steps on two stages of two devices each.

Each row has two documents. The devices of a stage split the positions of each row, in head-tail order, and attend by
both methods; a batch comes whole and in four parts, each of which passes the pipeline in two micro-batches.

`make test-scale` runs all cases, each a minute of a busy core: `make test` has contexts and pipelines by themselves.
"""

import functools

import pytest

from axlearn.common.trainer_config_modifier import ContextParallelMethod, ContextParallelModifier
from axlearn.experiments.text.gpt import common
from tests.parity.runs import Run, check_begins_and_trains_the_same, check_gradients_are_the_same, run
from tests.parity.small_models import NUM_STEPS, PackedInput, small_gspmd

pytestmark = pytest.mark.scale

_NUM_STAGES, _NUM_MICROBATCHES, _NUM_CONTEXT = 2, 2, 2
_SEQ_LEN, _BATCH_SIZE = 32, 16
# Bytes of the keys of a position, or of its values: two heads of eight numbers.
_KEY_BYTES = 2 * 8 * 4
# Method, schedule, parts of a batch.
_every_case = pytest.mark.parametrize(
    ("method", "schedule", "grad_acc_steps"),
    [
        (ContextParallelMethod.ALL_GATHER, "gpipe", 1),
        (ContextParallelMethod.ALL_GATHER, "stream", 4),
        (ContextParallelMethod.RING, "stream", 1),
        (ContextParallelMethod.RING, "gpipe", 4),
    ],
)


def _config(axes: dict[str, int], *, schedule: str = "gpipe", grad_acc_steps: int = 1):
    return small_gspmd(
        PackedInput.default_config().set(global_batch_size=_BATCH_SIZE, source_length=_SEQ_LEN),
        mesh_shape=common.mesh_shape_from_axes(**axes),
        num_stages=_NUM_STAGES,
        num_microbatches=_NUM_MICROBATCHES,
        schedule=schedule,
        grad_acc_steps=grad_acc_steps,
    )


@functools.cache
def _run(method: ContextParallelMethod, schedule: str, grad_acc_steps: int) -> Run:
    axes = {"pipeline": _NUM_STAGES, "seq": _NUM_CONTEXT}
    cfg = _config(axes, schedule=schedule, grad_acc_steps=grad_acc_steps)
    cfg = ContextParallelModifier.default_config().set(method=method).instantiate()(cfg)
    assert cfg.model.decoder.num_seq_chunks == 2 * _NUM_CONTEXT
    return run(cfg, num_devices=_NUM_STAGES * _NUM_CONTEXT, num_steps=NUM_STEPS)


@functools.cache
def _reference() -> Run:
    """Without contexts, on one device."""
    return run(_config({}), num_devices=1, num_steps=NUM_STEPS)


@_every_case
def test_every_pipeline_of_contexts_begins_with_the_same_bits_and_trains_the_same(
    method, schedule, grad_acc_steps
):
    check_begins_and_trains_the_same(_run(method, schedule, grad_acc_steps), _reference())


@_every_case
def test_every_gradient_is_the_same_in_every_pipeline_of_contexts(method, schedule, grad_acc_steps):
    check_gradients_are_the_same(_run(method, schedule, grad_acc_steps), _reference())


@_every_case
def test_in_the_loop_only_keys_travel_along_the_sequence_and_hidden_states_along_the_pipeline(
    method, schedule, grad_acc_steps
):
    collectives = _run(method, schedule, grad_acc_steps).collectives()
    in_loop = [x for x in collectives if x.num_runs > grad_acc_steps]
    assert {x.num_runs for x in in_loop} == {(_NUM_MICROBATCHES + _NUM_STAGES - 1) * grad_acc_steps}
    # As in pipeline_test: hidden states there and back, segment ids and positions there, and what waits in a stream.
    to_next_stage = [x for x in in_loop if "pipeline" in x.axes]
    assert {(x.kind, x.axes) for x in to_next_stage} == {("collective-permute", ("pipeline",))}
    assert len(to_next_stage) == {"gpipe": 4, "stream": 8}[schedule]
    along_seq = [x for x in in_loop if x not in to_next_stage]
    assert {x.axes for x in along_seq} == {("seq",)}
    num_positions = _SEQ_LEN * _BATCH_SIZE // grad_acc_steps // _NUM_MICROBATCHES
    key_bytes, id_bytes = _KEY_BYTES * num_positions, 4 * num_positions
    if method is ContextParallelMethod.ALL_GATHER:
        # Segment ids, in the forward pass and again in the backward pass, keys and values.
        gathered = [x.whole_bytes for x in along_seq if x.kind == "all-gather"]
        assert sorted(gathered) == [id_bytes, id_bytes, key_bytes, key_bytes]
        expected = {"all-gather", "all-reduce"}
    else:
        passed_on = [x for x in along_seq if x.kind == "collective-permute"]
        assert max(x.whole_bytes for x in passed_on) == key_bytes // _NUM_CONTEXT
        assert all("/shard_map/" in x.op_name for x in passed_on)
        expected = {"collective-permute", "all-reduce"}
    # Gradients of parameters are added up, and those of gathered keys and values.
    assert {x.kind for x in along_seq} == expected
