"""Rows of a dataset of texts: their order, their position, and what is refused."""

import itertools
import json
import threading
import time

import grain
import numpy as np
import pytest

from axlearn.common.input_lm import (
    InputDataType,
    PackingMethodType,
    lm_text_preprocessor,
    packed_row_spec,
    text_to_lm_eval_input,
    text_to_lm_training_input,
)
from axlearn.common.input_tf_data._batch import read_ahead
from axlearn.common.vocabulary import SentencePieceVocabulary, train_sentencepiece

TEXTS = [f"document {i} " * (1 + i % 5) for i in range(60)]


@pytest.fixture(scope="module")
def vocab():
    return SentencePieceVocabulary(train_sentencepiece(TEXTS, vocab_size=290))


def texts(*, repeat=False):
    dataset = grain.MapDataset.source([{"text": text.encode()} for text in TEXTS])
    return dataset.repeat(None) if repeat else dataset


def rows_as_tuples(rows):
    return [tuple(row["target_labels"].tolist()) for row in rows]


def test_shuffling_changes_the_order_of_rows_and_nothing_else(vocab):
    def rows(**kwargs):
        return rows_as_tuples(text_to_lm_training_input(vocab, 16, window_size=7, **kwargs)(texts()))

    in_order = rows(shuffle_buffer_size=0)
    shuffled = rows(shuffle_buffer_size=24)
    assert shuffled != in_order
    assert sorted(shuffled) == sorted(in_order)
    assert rows(shuffle_buffer_size=24) == shuffled
    assert rows(shuffle_buffer_size=24, seed=1) not in (shuffled, in_order)
    # For evaluation nothing is shuffled.
    assert rows(shuffle_buffer_size=24, is_training=False) == in_order
    # A row moves no further than a block is long, and a block is hardly longer than it has to be.
    moved = [abs(shuffled.index(row) - i) for i, row in enumerate(in_order) if in_order.count(row) == 1]
    assert 0 < max(moved) < 24 + 16


def test_every_token_is_there_once_and_windows_are_packed_apart(vocab):
    rows = list(text_to_lm_training_input(vocab, 16, window_size=7, shuffle_buffer_size=0)(texts()))
    ids = np.concatenate([row["target_labels"] for row in rows])
    expected = list(itertools.chain(*([*vocab.encode(text), vocab.eos_id] for text in TEXTS)))
    assert ids[ids >= 0].tolist() == expected
    # The last row of each of the nine windows is the only one with padding.
    assert sum(np.any(row["target_labels"] < 0) for row in rows) <= 9
    assert sum(int(row["target_num_bytes"]) for row in rows) == sum(map(len, TEXTS))


@pytest.mark.parametrize("shuffle_buffer_size", [0, 20])
@pytest.mark.parametrize("as_stream", [False, True])
def test_a_position_continues_the_stream_in_another_iterator(vocab, shuffle_buffer_size, as_stream):
    process = text_to_lm_training_input(vocab, 16, window_size=5, shuffle_buffer_size=shuffle_buffer_size)
    source = texts(repeat=True)
    dataset = process(source.to_iter_dataset() if as_stream else source)
    iterator = iter(dataset)
    states, rows = [], []
    for _ in range(70):
        states.append(json.loads(json.dumps(iterator.get_state())))
        rows.append(next(iterator))
    for at in (0, 1, 33, 69):
        other = iter(dataset)
        other.set_state(states[at])
        assert other.get_state() == states[at]
        assert rows_as_tuples(itertools.islice(other, 70 - at)) == rows_as_tuples(rows[at:])
    # Also in the iterator that has gone on, while its next block is being made.
    iterator.set_state(states[40])
    assert rows_as_tuples(itertools.islice(iterator, 10)) == rows_as_tuples(rows[40:50])
    iterator.close()


def test_an_error_in_the_thread_that_reads_ahead_is_raised_where_the_row_is_asked_for(vocab):
    class Broken:
        def __len__(self):
            return 1000

        def __getitem__(self, i):
            if i == 200:
                raise OSError("the disk is gone")
            return {"text": b"some words"}

    dataset = text_to_lm_training_input(vocab, 16, window_size=5, shuffle_buffer_size=8)(
        grain.MapDataset.source(Broken())
    )
    with pytest.raises(OSError, match="the disk is gone"):
        list(dataset)


class Blocking:
    """Texts, of which those behind a place are only there once `released` is set."""

    def __init__(self, place):
        self.place = place
        self.released = threading.Event()

    def __len__(self):
        return 1000

    def __getitem__(self, i):
        if i >= self.place:
            assert self.released.wait(timeout=60)
        return {"text": f"text number {i}".encode()}


def test_going_elsewhere_while_a_block_is_being_read_takes_nothing_from_it(vocab):
    source = Blocking(40)
    dataset = text_to_lm_training_input(vocab, 16, window_size=2, shuffle_buffer_size=40)(
        grain.MapDataset.source(source)
    )
    iterator = iter(dataset)
    state = iterator.get_state()
    first = [next(iterator) for _ in range(4)]
    threading.Timer(0.3, source.released.set).start()
    iterator.set_state(state)
    rows = rows_as_tuples(itertools.islice(iterator, 200))
    assert rows[:4] == rows_as_tuples(first)
    assert rows == rows_as_tuples(itertools.islice(dataset, 200))
    iterator.close()


@pytest.mark.parametrize("num_ahead", [0, 2])
def test_closing_waits_for_nobody(vocab, num_ahead):
    """The garbage collector closes iterators in any thread, maybe in one that is itself waited for."""
    source = Blocking(16)
    dataset = text_to_lm_training_input(vocab, 16, window_size=2, shuffle_buffer_size=40)(
        grain.MapDataset.source(source)
    )
    batches = dataset.batch(2, batch_fn=list)
    iterator = iter(read_ahead(batches, num_ahead=num_ahead) if num_ahead else batches)
    next(iterator)
    start = time.perf_counter()
    iterator.close()
    assert time.perf_counter() - start < 5
    assert not source.released.is_set()
    source.released.set()


def test_rows_for_evaluation_are_of_single_documents(vocab):
    rows = list(text_to_lm_eval_input(vocab, 8)(texts()))
    expected = []
    for text in TEXTS:
        ids = [*vocab.encode(text), vocab.eos_id]
        expected += [tuple((ids[i : i + 8] + [-1] * 8)[:8]) for i in range(0, len(ids), 8)]
    assert rows_as_tuples(rows) == expected
    strided = list(text_to_lm_eval_input(vocab, 8, stride=3)(texts()))
    assert sum(np.sum(row["target_labels"] >= 0) for row in strided) == sum(
        np.sum(row["target_labels"] >= 0) for row in rows
    )
    assert len(strided) > len(rows)


@pytest.mark.parametrize("packing_method", [None, *PackingMethodType])
def test_rows_are_what_their_spec_says(vocab, packing_method):
    process = lm_text_preprocessor(
        vocab_cfg=vocab, max_sequence_length=16, replace_newlines_with="\n", is_training=True,
        packing_method=packing_method,
    )  # fmt: skip
    row = next(iter(process(texts())))
    spec = packed_row_spec(16, packing_method=packing_method)
    assert {k: (np.shape(v), v.dtype) for k, v in row.items()} == {
        k: (tuple(v.shape), v.dtype) for k, v in spec.items()
    }
    assert ("input_segment_ids" in row) == (packing_method is PackingMethodType.EOS_DELIM_MASK)


def test_kinds_of_examples_have_names():
    assert [kind.name for kind in InputDataType] == ["LM", "SEQ2SEQ_MASK", "SEQ2SEQ_NO_MASK"]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_len": 0}, "max_len: 0 cannot be used"),
        ({"window_size": 0}, "window_size"),
        ({"max_padding_fraction": 1.5}, "a number from 0 to 1"),
        ({"shuffle_buffer_size": -1}, "shuffle_buffer_size"),
        ({"seed": -1}, "seed"),
    ],
)
def test_numbers_out_of_range_are_refused_when_the_function_is_made(kwargs, message):
    with pytest.raises(ValueError, match=message):
        text_to_lm_training_input(None, **{"max_len": 8, **kwargs})
    with pytest.raises(ValueError, match="from 1 to 8"):
        text_to_lm_eval_input(None, 8, stride=9)
