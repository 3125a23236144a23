"""The order in which examples are seen, and functions from datasets to datasets."""

import grain
import numpy as np
import pytest

from axlearn.common.config import config_for_function
from axlearn.common.input_tf_data import (
    DescribedSource,
    ShuffledExamples,
    chain,
    concatenate_datasets,
    filter_examples,
    identity,
    rekey,
    sample_from_datasets,
    select_fields,
    take,
    with_processor,
)


def numbers(n, *, first=0):
    return grain.MapDataset.source(range(first, first + n))


def examples(n):
    return grain.MapDataset.source([{"x": i, "y": -i} for i in range(n)])


@pytest.mark.parametrize(("n", "window_size"), [(20, 6), (20, 5), (20, 100), (3, 1), (1, 8)])
def test_every_epoch_holds_every_example_once_within_the_windows(n, window_size):
    shuffled = ShuffledExamples(range(n), window_size=window_size, seed=(3,))
    for epoch in range(4):
        seen = [shuffled[i] for i in range(epoch * n, (epoch + 1) * n)]
        assert sorted(seen) == list(range(n))
        size = min(window_size, n)
        for begin in range(0, n, size):
            # What is seen together also lies together.
            assert len({i // size for i in seen[begin : begin + size]}) == 1
        assert shuffled.index_of(epoch * n) == seen[0]


def test_the_order_is_a_function_of_seed_and_epoch():
    def order(epoch, **kwargs):
        shuffled = ShuffledExamples(range(50), **{"window_size": 10, "seed": (0,), **kwargs})
        return [shuffled[i] for i in range(50 * epoch, 50 * epoch + 50)]

    assert order(0) == order(0)
    assert len({tuple(o) for o in (order(0), order(1), order(0, seed=(1,)), order(0, seed=(0, 1)))}) == 4
    # The last window may be smaller, and stays where it is; the others change places.
    assert order(0, window_size=0) == list(range(50))
    assert len({order(epoch)[0] // 10 for epoch in range(10)}) > 1


def test_a_mixture_has_the_parts_that_its_weights_say_all_along():
    sources = [
        lambda: numbers(10_000),
        lambda: numbers(10_000, first=10_000),
        lambda: numbers(10_000, first=20_000),
    ]
    weights = [0.6, 0.3, 0.1]
    mixed = sample_from_datasets(sources=sources, weights=weights)()
    seen = np.asarray([mixed[i] // 10_000 for i in range(500)])
    for n in range(1, 500, 7):
        counts = np.bincount(seen[:n], minlength=3)
        assert np.all(np.abs(counts - n * np.asarray(weights)) < 1.5), n
    # Each source is read in its own order, without a gap.
    assert [mixed[i] for i in range(500) if seen[i] == 2] == list(range(20_000, 20_000 + np.sum(seen == 2)))


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, -1.0], []])
def test_weights_that_are_none_are_refused(weights):
    with pytest.raises(ValueError, match="one positive number per source"):
        sample_from_datasets(sources=[lambda: numbers(3), lambda: numbers(3)], weights=weights)


def test_sources_can_be_put_behind_each_other():
    assert list(concatenate_datasets(sources=[lambda: numbers(2), lambda: numbers(2, first=7)])()) == [
        0,
        1,
        7,
        8,
    ]


def test_a_stream_cannot_be_mixed_and_the_error_says_what_to_do():
    with pytest.raises(ValueError, match="Mix the sources first"):
        concatenate_datasets(sources=[lambda: numbers(2).to_iter_dataset()])()


def test_entries_are_renamed_and_left_out():
    assert list(rekey({"z": "x"})(examples(2))) == [{"z": 0}, {"z": 1}]
    assert rekey({"z": "x"}, retain_original_inputs=True)(examples(2))[1] == {"x": 1, "y": -1, "z": 1}
    assert select_fields(["y"])(examples(2))[1] == {"y": -1}
    with pytest.raises(ValueError, match="no entry 'inputs'"):
        list(rekey({"z": "inputs"})(examples(1)))


@pytest.mark.parametrize("as_stream", [False, True])
def test_filtering_and_taking_work_on_both_kinds_of_datasets(as_stream):
    dataset = numbers(10).to_iter_dataset() if as_stream else numbers(10)
    assert list(filter_examples(lambda i: i % 3 == 0)(dataset)) == [0, 3, 6, 9]
    assert list(take(4)(dataset)) == [0, 1, 2, 3]
    assert list(take(99)(dataset)) == list(range(10))
    assert identity()(dataset) is dataset


def add(number, *, is_training=None):
    return lambda dataset: dataset.map(lambda i: i + number + (1000 if is_training else 0))


def count(n, *, is_training):
    return DescribedSource(lambda: numbers(n + is_training), vocab_size=lambda: 12)


def test_processors_are_chained_and_put_behind_sources():
    processor = config_for_function(chain).set(
        args=[config_for_function(add).set(number=1), lambda dataset: dataset.map(lambda i: i * 2)]
    )
    source = with_processor(config_for_function(count).set(n=2), processor=processor, is_training=True)
    assert list(source()) == [2, 4, 6]
    assert source.vocab_size() == 12
    source = with_processor(
        config_for_function(count).set(n=1),
        processor=config_for_function(add).set(number=1),
        is_training=True,
    )
    assert list(source()) == [1001, 1002]
