"""Packing against a ten-line reference, and the laws of an epoch."""

import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axlearn.common.lm_packing import PackedDocuments

BOS, PAD, VOCAB = 2, 0, 50
PIECE_NUM_BYTES = np.random.default_rng(0).integers(0, 6, size=VOCAB).astype(np.int32)


def packed(documents, *, max_len, prefix_num_bytes=None):
    """The documents (lists of targets) with other things between them, as in a corpus with two splits."""
    tokens, starts = [7], []
    for targets in documents:
        starts.append(len(tokens))
        tokens += [*targets, 9, 9]
    return PackedDocuments(
        tokens=np.asarray(tokens, dtype=np.uint16),
        starts=np.asarray(starts, dtype=np.int64),
        lengths=np.asarray([len(d) for d in documents], dtype=np.int64),
        piece_num_bytes=PIECE_NUM_BYTES,
        max_len=max_len,
        bos_id=BOS,
        pad_id=PAD,
        prefix_num_bytes=prefix_num_bytes,
    )


def reference_rows(documents, *, max_len):
    """The slow way: one long list of (input, label, document, place), cut into rows."""
    line = [(([BOS, *d])[t], d[t], i, t) for i, d in enumerate(documents) for t in range(len(d))]
    for start in range(0, len(line), max_len):
        row = line[start : start + max_len]
        padding = max_len - len(row)
        changes = [k == 0 or row[k][2] != row[k - 1][2] for k in range(len(row))]
        starts = [max(j for j in range(k + 1) if changes[j]) for k in range(len(row))]
        yield {
            "input_ids": [r[0] for r in row] + [PAD] * padding,
            "target_labels": [r[1] for r in row] + [-1] * padding,
            "input_segment_ids": np.cumsum(changes).tolist() + [0] * padding,
            "input_positions": [k - s for k, s in enumerate(starts)] + [0] * padding,
            "target_num_bytes": sum(PIECE_NUM_BYTES[r[1]] for r in row),
        }


documents_strategy = st.lists(
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9), min_size=1, max_size=8
)


@settings(max_examples=60, deadline=None)
@given(documents=documents_strategy, max_len=st.integers(1, 8), seed=st.integers(0, 3))
def test_every_row_is_the_one_that_the_slow_way_gives(documents, max_len, seed):
    rows = packed(documents, max_len=max_len)
    epoch = rows.epoch(seed=seed, epoch=1)
    in_order = [documents[i] for i in epoch._document_order]
    expected = list(reference_rows(in_order, max_len=max_len))
    assert rows.num_rows == len(expected)
    for place, row in enumerate(epoch._row_order):
        got = {key: np.asarray(value).tolist() for key, value in epoch[place]._asdict().items()}
        assert got == expected[row]


@settings(max_examples=30, deadline=None)
@given(documents=documents_strategy, max_len=st.integers(1, 8), seed=st.integers(0, 3))
def test_an_epoch_covers_every_target_exactly_once_with_its_bytes(documents, max_len, seed):
    rows = packed(documents, max_len=max_len)
    for number in (0, 1):
        epoch = rows.epoch(seed=seed, epoch=number)
        seen, num_bytes = [], 0
        for i in range(rows.num_rows):
            row = epoch[i]
            live = row.target_labels >= 0
            seen += zip(row.input_ids[live].tolist(), row.target_labels[live].tolist(), strict=True)
            num_bytes += int(row.target_num_bytes)
            assert np.array_equal(live, row.input_segment_ids > 0)
        pairs = [pair for d in documents for pair in zip([BOS, *d], d, strict=False)]
        assert collections.Counter(seen) == collections.Counter(pairs)
        assert num_bytes == sum(int(PIECE_NUM_BYTES[t]) for d in documents for t in d)


def test_bytes_that_stand_before_a_document_are_taken_off_the_row_in_which_it_begins():
    documents = [[5] * 7, [6] * 3, [7] * 4]
    prefixes = np.asarray([1, 0, 1], np.int32)
    with_prefixes = packed(documents, max_len=4, prefix_num_bytes=prefixes).epoch(seed=0, epoch=0)
    without = packed(documents, max_len=4).epoch(seed=0, epoch=0)
    for i in range(4):
        row, expected = with_prefixes[i], without[i]
        begins = row.input_ids == BOS
        taken_off = sum(prefixes[label - 5] for label in row.target_labels[begins])
        assert row.target_num_bytes == expected.target_num_bytes - taken_off
        assert np.array_equal(row.target_labels, expected.target_labels)


def test_epochs_and_seeds_differ_and_each_is_a_function_of_both():
    documents = [[i % VOCAB] * (1 + i % 5) for i in range(40)]

    def epoch_labels(seed, epoch):
        rows = packed(documents, max_len=4).epoch(seed=seed, epoch=epoch)
        return np.stack([rows[i].target_labels for i in range(20)])

    first = epoch_labels(0, 0)
    assert np.array_equal(first, epoch_labels(0, 0))
    assert not np.array_equal(first, epoch_labels(0, 1))
    assert not np.array_equal(first, epoch_labels(1, 0))


def test_the_order_of_a_seed_never_changes():
    # Written down once: a run that continues under another numpy must find the rows where it left them.
    epoch = packed([[i] for i in range(12)], max_len=3).epoch(seed=7, epoch=3)
    assert epoch._document_order.tolist() == [7, 1, 9, 6, 0, 11, 10, 4, 2, 8, 3, 5]
    assert epoch._row_order.tolist() == [1, 2, 3, 0]


def test_rows_of_a_long_document_do_not_follow_each_other():
    rows = packed([[5] * 400, *[[6] for _ in range(400)]], max_len=4)
    epoch = rows.epoch(seed=0, epoch=0)
    of_long = [bool((epoch[i].target_labels == 5).all()) for i in range(rows.num_rows)]
    longest_run = max(len(run) for run in "".join("x" if hit else " " for hit in of_long).split())
    # Half of the rows belong to it; in the order of the line they would be one run of about 100.
    assert sum(of_long) > 90
    assert longest_run < 30


@pytest.mark.parametrize("max_len", [1, 4, 1000])
def test_positions_restart_in_every_piece_and_at_every_cut(max_len):
    rows = packed([[1] * 6, [2] * 5], max_len=max_len)
    epoch = rows.epoch(seed=0, epoch=0)
    for i in range(rows.num_rows):
        row = epoch[i]
        for segment in set(row.input_segment_ids.tolist()) - {0}:
            here = row.input_positions[row.input_segment_ids == segment]
            assert here.tolist() == list(range(len(here)))
