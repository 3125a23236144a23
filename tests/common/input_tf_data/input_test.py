"""The input made of functions: whose rows are whose, where the data ends, and where a run continues."""

import itertools
import json
import subprocess
import sys

import grain
import jax
import numpy as np
import pytest

from axlearn.common.config import config_for_function
from axlearn.common.input_dispatch import InputDispatcher
from axlearn.common.input_tf_data import (
    DescribedSource,
    Input,
    batch,
    default_pad_example_fn,
    filter_examples,
    identity,
    per_feed_batch,
    rekey,
)
from axlearn.common.utils import TensorSpec

BATCH = 4


def _example(i):
    return {"input_ids": np.full([3], i, np.int32), "target_labels": np.full([3], i, np.int32), "weight": 0.5}


def count(n, *, is_training):
    """A source of n examples that are told apart by their numbers."""
    del is_training
    return lambda: grain.MapDataset.source(range(n)).map(_example)


def stream(n, *, is_training):
    return lambda: count(n, is_training=is_training)().to_iter_dataset()


def make_input(source=count, *, n=10, is_training=True, feed=None, processor=None, **batcher):
    dispatcher = InputDispatcher.default_config().set(global_logical_batch_size=BATCH)
    if feed is not None:
        dispatcher.set(num_physical_feeds=feed[1], physical_feed_index=feed[0])
    cfg = Input.default_config().set(
        name="input",
        is_training=is_training,
        source=config_for_function(source).set(n=n),
        processor=processor or config_for_function(identity),
        batcher=config_for_function(per_feed_batch).set(**batcher),
        input_dispatcher=dispatcher,
    )
    return cfg.instantiate(parent=None)


def numbers(batches):
    return [batch["target_labels"][:, 0].tolist() for batch in batches]


@pytest.mark.parametrize("source", [count, stream])
@pytest.mark.parametrize("prefetch_buffer_size", [-1, 0, 3])
def test_for_evaluation_the_last_batch_is_filled_up_with_what_counts_nowhere(source, prefetch_buffer_size):
    batches = list(make_input(source, is_training=False, prefetch_buffer_size=prefetch_buffer_size).batches())
    assert numbers(batches) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, -1, -1]]
    assert batches[2]["input_ids"][2:].tolist() == [[0, 0, 0]] * 2
    assert batches[2]["weight"].tolist() == [0.5, 0.5, 0, 0]
    assert list(make_input(source, n=0, is_training=False).batches()) == []


def test_training_data_has_no_end_unless_it_is_a_stream_that_has_one():
    assert numbers(itertools.islice(make_input().batches(), 4)) == [
        [0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1], [2, 3, 4, 5],
    ]  # fmt: skip
    assert numbers(make_input(stream).batches()) == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize("source", [count, stream])
@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("num_feeds", [2, 4])
def test_feeds_read_parts_of_the_same_batches_and_as_many_of_them(source, is_training, num_feeds):
    whole = numbers(itertools.islice(make_input(source, is_training=is_training).batches(), 5))
    parts = [
        numbers(
            itertools.islice(make_input(source, is_training=is_training, feed=(i, num_feeds)).batches(), 5)
        )
        for i in range(num_feeds)
    ]
    assert [list(itertools.chain(*rows)) for rows in zip(*parts, strict=True)] == whole


def test_of_random_access_data_a_feed_makes_its_own_examples_only():
    made = []

    def counting(n, *, is_training):
        def example(i):
            made.append(i)
            return _example(i)

        return lambda: grain.MapDataset.source(range(n)).map(example)

    iterator = make_input(counting, n=100, feed=(1, 2), prefetch_buffer_size=0).batches()
    assert numbers(itertools.islice(iterator, 2)) == [[2, 3], [6, 7]]
    assert sorted(made) == [2, 3, 6, 7]


@pytest.mark.parametrize("source", [count, stream])
def test_a_position_survives_json_and_continues_in_another_process_count(source):
    iterator = make_input(source, n=40).batches()
    for _ in range(3):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    assert state["next_step"] == 3
    assert ("dataset" in state) == (source is stream)
    expected = numbers(itertools.islice(iterator, 2))
    assert expected == [[12, 13, 14, 15], [16, 17, 18, 19]]
    other = make_input(source, n=40).batches()
    other.set_state(state)
    assert other.get_state() == state
    assert numbers(itertools.islice(other, 2)) == expected
    half = make_input(source, n=40, feed=(1, 2)).batches()
    half.set_state(state)
    assert numbers(itertools.islice(half, 2)) == [[14, 15], [18, 19]]
    # And back, in an iterator that has read further.
    other.set_state(state)
    assert numbers(itertools.islice(other, 1)) == expected[:1]


@pytest.mark.parametrize("source", [count, stream])
def test_a_step_can_be_gone_to_where_there_is_no_position(source):
    iterator = make_input(source, n=40).batches()
    next(iterator)
    iterator.set_step(5)
    assert numbers(itertools.islice(iterator, 1)) == [[20, 21, 22, 23]]
    assert iterator.get_state()["next_step"] == 6


def test_a_position_in_other_data_is_refused_naming_what_differs():
    state = make_input(n=40).batches().get_state()
    with pytest.raises(ValueError, match=r"source\.n was '40', is '41'"):
        make_input(n=41).batches().set_state(state)
    with pytest.raises(ValueError, match=r"source\.fn was .*count.*, is .*stream"):
        make_input(stream, n=40).batches().set_state(state)
    of_stream = make_input(stream, n=40).batches()
    lacking = {**of_stream.get_state()}
    del lacking["dataset"]
    with pytest.raises(ValueError, match="lacks a place in a stream"):
        of_stream.set_state(lacking)
    # How far it is read ahead is no part of the data.
    make_input(n=40, prefetch_buffer_size=5).batches().set_state(state)
    assert "0x" not in json.dumps(state)


def described(n, *, is_training):
    del is_training

    def build():
        raise AssertionError("read")

    del n
    return DescribedSource(
        build,
        element_spec={"target_labels": TensorSpec(shape=(3,), dtype=np.int32)},
        vocab_size=lambda: 7,
        write_assets=lambda folder: (folder / "words").write_text("here"),
    )


def test_shapes_are_known_without_reading_where_the_source_says_them(tmp_path):
    module = make_input(described)
    assert module.element_spec() == {"target_labels": TensorSpec(shape=(BATCH, 3), dtype=np.int32)}
    assert module.vocab_size == 7
    module.write_assets(tmp_path)
    assert (tmp_path / "words").read_text() == "here"
    renamed = make_input(described, processor=config_for_function(rekey).set(key_map={"y": "target_labels"}))
    assert renamed.element_spec() == {"y": TensorSpec(shape=(BATCH, 3), dtype=np.int32)}


def test_shapes_of_other_sources_are_those_of_their_first_example(tmp_path):
    module = make_input()
    batch_of = next(module.batches())
    assert {k: (tuple(v.shape), v.dtype) for k, v in module.element_spec().items()} == {
        k: (v.shape, v.dtype) for k, v in batch_of.items()
    }
    assert module.vocab_size is None
    module.write_assets(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    with pytest.raises(ValueError, match="no example whose shapes could be known"):
        make_input(n=0).element_spec()


def test_a_dataset_that_was_filtered_in_place_is_refused_with_what_to_do():
    def filtered(*, as_stream):
        if as_stream:
            return filter_examples(lambda example: example["target_labels"][0] % 2 == 0)
        return lambda dataset: dataset.filter(lambda example: example["target_labels"][0] % 2 == 0)

    module = make_input(processor=config_for_function(filtered).set(as_stream=True))
    assert numbers(module.batches()) == [[0, 2, 4, 6]]
    module = make_input(processor=config_for_function(filtered).set(as_stream=False))
    with pytest.raises(ValueError, match="to_iter_dataset"):
        next(module.batches())


def test_the_default_batcher_says_the_size_itself():
    cfg = Input.default_config().set(
        name="input", is_training=False, source=config_for_function(count).set(n=5),
        processor=config_for_function(identity),
    )  # fmt: skip
    assert cfg.batcher.fn is batch
    with pytest.raises(ValueError, match="there is no batch size"):
        cfg.instantiate(parent=None)
    cfg.batcher.global_batch_size = 2
    assert numbers(cfg.instantiate(parent=None).batches()) == [[0, 1], [2, 3], [4, -1]]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"feed_batch_size": 3}, "3 contradicts the batch of 4 rows"),
        ({"prefetch_buffer_size": -2}, "-1, 0 or more"),
    ],
)
def test_what_cannot_be_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_input(**kwargs)


def test_a_batch_that_does_not_divide_over_the_processes_is_refused():
    with pytest.raises(ValueError, match="does not divide over 2 processes"):
        batch(3, is_training=True, num_feeds=2)


def test_padding_has_the_shapes_and_types_of_the_example():
    example = {"target_labels": np.ones([2], np.int32), "x": np.float32(2), "text": b"abc", "n": 3, "s": "t"}
    padding = default_pad_example_fn(example)
    assert padding["target_labels"].tolist() == [-1, -1]
    assert (padding["x"], padding["text"], padding["n"], padding["s"]) == (0, b"", 0, "")
    assert padding["x"].dtype == np.float32
    assert jax.tree.structure(padding) == jax.tree.structure(example)


def test_its_config_prints_as_in_the_reference_dumps():
    cfg = Input.default_config().set(batcher=config_for_function(per_feed_batch))
    assert cfg.debug_string().split("\n") == [
        "batcher.fn: 'axlearn.common.input_tf_data.per_feed_batch'",
        "batcher.pad_example_fn: 'axlearn.common.input_tf_data.default_pad_example_fn'",
        "batcher.prefetch_buffer_size: -1",
        "klass: 'axlearn.common.input_tf_data.Input'",
    ]


def test_an_interpreter_that_ends_in_the_middle_of_the_data_says_nothing():
    code = (
        "import tests.common.input_tf_data.input_test as t\n"
        "it = t.make_input(t.stream, n=100).batches(); next(it); print('done')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout == "done\n"
    assert "Exception" not in done.stderr
