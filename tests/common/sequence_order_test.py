"""The order in which positions lie, against slices of lists."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axlearn.common.sequence_order import (
    head_tail_chunks,
    head_tail_indices,
    text_order_indices,
    to_head_tail_order,
    to_text_order,
)


def _reference(seq_len, num_chunks):
    chunks = [
        list(range(seq_len))[i : i + seq_len // num_chunks] for i in range(0, seq_len, seq_len // num_chunks)
    ]
    places = []
    while chunks:
        places += chunks.pop(0) + (chunks.pop() if chunks else [])
    return places


def test_the_first_and_the_last_chunk_take_turns():
    assert head_tail_indices(12, num_chunks=4).tolist() == [0, 1, 2, 9, 10, 11, 3, 4, 5, 6, 7, 8]
    assert head_tail_chunks(8).tolist() == [0, 7, 1, 6, 2, 5, 3, 4]


@settings(deadline=None)
@given(chunk_len=st.integers(1, 5), num_chunks=st.sampled_from([1, 2, 4, 6, 8, 16]))
def test_a_row_is_put_in_order_and_back(chunk_len, num_chunks):
    seq_len = chunk_len * num_chunks
    indices = head_tail_indices(seq_len, num_chunks=num_chunks)
    assert indices.dtype == np.int32
    assert indices.tolist() == _reference(seq_len, num_chunks)
    row = np.arange(100, 100 + seq_len)
    there = row[indices]
    np.testing.assert_array_equal(to_head_tail_order(row, num_chunks=num_chunks, axis=0), there)
    np.testing.assert_array_equal(to_text_order(there, num_chunks=num_chunks, axis=0), row)
    assert there[text_order_indices(seq_len, num_chunks=num_chunks)].tolist() == row.tolist()


@given(chunk_len=st.integers(1, 5), num_shards=st.sampled_from([1, 2, 4]), per_shard=st.sampled_from([2, 4]))
def test_equal_parts_see_equally_much_of_a_causal_past(chunk_len, num_shards, per_shard):
    num_chunks = num_shards * per_shard
    indices = head_tail_indices(chunk_len * num_chunks, num_chunks=num_chunks)
    num_visible = (indices + 1).reshape(num_shards, -1).sum(axis=1)
    assert len(set(num_visible.tolist())) == 1


@pytest.mark.parametrize("num_chunks", [0, -2, 3])
def test_an_odd_number_of_chunks_is_refused(num_chunks):
    with pytest.raises(
        ValueError, match=f"^{num_chunks} chunks in head-tail order.\n  Expected an even number"
    ):
        head_tail_indices(12, num_chunks=num_chunks)


def test_chunks_that_do_not_divide_a_row_are_refused():
    with pytest.raises(
        ValueError, match=r"^8 chunks of a row of 12 positions\.\n  Expected a number of chunks that"
    ):
        head_tail_indices(12, num_chunks=8)
