"""Attention over rows in head-tail order: what it computes of rows in the order of the text, place by place."""

import functools

import jax
import numpy as np
import pytest

from axlearn.common.attention import MultiheadAttention
from axlearn.common.attention_kernels import collect_attention_choices
from axlearn.common.module import functional
from axlearn.common.sequence_order import head_tail_indices
from axlearn.common.utils import flatten_items
from tests.common.attention.layer_configs import DIM, normal, random_params
from tests.common.attention.multihead_configs import _attention
from tests.common.flash_attention.kernel_cases import CASES, SEQ, build, forward_and_grads, inputs_of

_NUM_CHUNKS = 8
_INDICES = head_tail_indices(SEQ, num_chunks=_NUM_CHUNKS)
_IN_FLOAT32 = [name for name in CASES if "bfloat16" not in name]


def _reordered(inputs):
    """What has positions, in head-tail order."""
    inputs = {**inputs, "query": inputs["query"][:, _INDICES]}
    if "segment_ids" in inputs:
        inputs["segment_ids"] = inputs["segment_ids"][:, _INDICES]
    if "attention_logit_biases" in inputs:
        inputs["attention_logit_biases"] = inputs["attention_logit_biases"][:, :, _INDICES][..., _INDICES]
    return inputs


@functools.cache
def _expected(name):
    outputs, grads = forward_and_grads(build(CASES[name]), inputs_of(CASES[name]))
    return {"outputs": outputs[:, _INDICES], **_reordered(grads)}


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        *[(name, "xla") for name in _IN_FLOAT32],
        ("causal, packed", "tpu_splash"),
        # Interpreted kernels take seconds.
        *[
            pytest.param(*case, marks=pytest.mark.scale)
            for case in (
                ("prefix, sink, packed", "tpu_splash"),
                ("two-sided window, cap, sink", "tpu_splash"),
                ("bidirectional", "tpu_splash"),
                ("causal, packed", "tpu_flash"),
                ("causal, ALiBi, packed", "tpu_flash"),
            )
        ],
    ],
)
def test_outputs_and_gradients_are_those_of_the_text_at_the_places_of_the_order(name, kernel):
    layer = build(CASES[name], implementation=kernel, num_seq_chunks=_NUM_CHUNKS)
    with collect_attention_choices() as choices:
        outputs, grads = forward_and_grads(layer, _reordered(inputs_of(CASES[name])))
    assert [choice.name for choice in choices] == [kernel]
    for (path, found), (_, expected) in zip(
        flatten_items({"outputs": outputs, **grads}), flatten_items(_expected(name)), strict=True
    ):
        if not path.endswith("k_proj/bias"):
            error = np.abs(found - expected).max() / np.abs(expected).max()
            assert error < 2e-5, f"{path}: {error}"


def _run(**inputs):
    layer = _attention(MultiheadAttention, causal=True, num_seq_chunks=4).instantiate(parent=None)
    return functional(layer, None, random_params(layer), inputs, is_training=False)[0]


def test_rows_that_chunks_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"^attention\.num_seq_chunks: 4 chunks of a row of 6 positions\."):
        jax.eval_shape(lambda: _run(query=normal(1, 6, DIM)))


def test_another_sequence_has_no_order():
    with pytest.raises(
        ValueError, match=r"num_seq_chunks=4 together with key or value\.\n  Expected num_seq"
    ):
        jax.eval_shape(lambda: _run(query=normal(1, 8, DIM), key=normal(1, 8, DIM), value=normal(1, 8, DIM)))


def test_keys_that_are_returned_say_their_positions_in_the_text():
    output = _run(query=normal(1, 8, DIM), return_aux={"kv_state"})
    assert output.kv_state.key_positions.tolist() == [[0, 1, 6, 7, 2, 3, 4, 5]]
