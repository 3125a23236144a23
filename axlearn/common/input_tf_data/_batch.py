"""Examples into batches, of which every process makes its own part."""

import importlib
import itertools
import os
from collections.abc import Callable, Sequence
from typing import Any, Optional, Union

import jax
import numpy as np

from axlearn.common.config import InstantiableConfig, error_message, maybe_instantiate
from axlearn.common.input_dispatch import PADDING_VALUES
from axlearn.common.input_tf_data._dataset import ENDLESS, Dataset, DatasetToDatasetFn, load_grain
from axlearn.common.utils import Nested

PadExampleFn = Callable[[Nested[np.ndarray]], Nested[np.ndarray]]

# Batches made ahead by prefetch_buffer_size=-1: one being used, one ready, as in the trainer's own thread.
_NUM_PREFETCHED = 2


def default_pad_example_fn(example: Nested[np.ndarray]) -> Nested[np.ndarray]:
    """Returns an example of the same shapes and types without content, to fill up the last batch.

    Numbers are 0 and texts empty; `target_labels` are -1, which is no target, so that the example counts nowhere.

    Args:
        example: Any example of the dataset.
    """

    def pad(key_path: Any, value: Any) -> Any:
        if isinstance(value, (str, bytes)):
            return type(value)()
        array = np.zeros_like(value)
        array[...] = PADDING_VALUES.get(jax.tree_util.keystr(key_path[-1:], simple=True), array)
        return array if isinstance(value, np.ndarray) else array[()]

    padded: Nested[np.ndarray] = jax.tree_util.tree_map_with_path(pad, example)
    return padded


def per_feed_batch(
    feed_batch_size: int,
    *,
    is_training: bool,
    pad_example_fn: Union[PadExampleFn, InstantiableConfig[PadExampleFn]] = default_pad_example_fn,
    prefetch_buffer_size: int = -1,
    num_feeds: Optional[int] = None,
    feed_index: Optional[int] = None,
) -> DatasetToDatasetFn:
    """Returns a function that makes batches of one feed's part of the examples.

    Batch i of the run is made of the examples from `i * feed_batch_size * num_feeds` on; each feed takes
    consecutive ones. Examples that can be addressed by number are made on the process that reads them only; of a
    stream, every process makes all.

    The input sets everything but the last but two arguments.

    Args:
        feed_batch_size: Number of examples of a feed's part.
        is_training: Whether batches are for training. Then a dataset that can be addressed by number and has an
            end is read over and over, and what is left of a stream that is too little for a batch is left out.
            Otherwise the last batch is filled up.
        pad_example_fn: Makes the example that fills up the last batch, from the first one of the dataset, or of
            that batch.
        prefetch_buffer_size: Batches made ahead by threads. 0: a batch is made when it is asked for. -1: two.
        num_feeds: Number of feeds. None: 1.
        feed_index: Which of them this is. None: 0.

    Raises:
        ValueError: If a number is out of range.
    """
    num_feeds, feed_index = num_feeds or 1, feed_index or 0
    for name, value, is_legal, expected in (
        ("feed_batch_size", feed_batch_size, feed_batch_size >= 1, "at least 1"),
        ("prefetch_buffer_size", prefetch_buffer_size, prefetch_buffer_size >= -1, "-1, 0 or more"),
        ("feed_index", feed_index, 0 <= feed_index < num_feeds, f"in [0, {num_feeds})"),
    ):
        if not is_legal:
            raise ValueError(
                error_message(where=f"batcher.{name}", what=f"{value!r} cannot be used", expected=expected)
            )
    num_ahead = _NUM_PREFETCHED if prefetch_buffer_size == -1 else prefetch_buffer_size
    pad_fn: PadExampleFn = maybe_instantiate(pad_example_fn)
    here = slice(feed_index * feed_batch_size, (feed_index + 1) * feed_batch_size)
    global_batch_size = num_feeds * feed_batch_size

    def from_random_access(dataset: Dataset) -> Dataset:
        grain = load_grain()
        examples = _FeedExamples(
            dataset, here=here, global_batch_size=global_batch_size, pad_fn=None if is_training else pad_fn
        )
        batches = grain.MapDataset.source(examples).batch(feed_batch_size, batch_fn=stack)
        return batches.to_iter_dataset(
            grain.ReadOptions(
                num_threads=min(num_ahead, os.cpu_count() or 1), prefetch_buffer_size=max(1, num_ahead)
            )
        )

    def part_of(examples: Sequence[Any]) -> Any:
        missing = global_batch_size - len(examples)
        if missing:
            examples = [*examples, *itertools.repeat(pad_fn(examples[0]), missing)]
        return stack(examples[here])

    def process(dataset: Dataset) -> Dataset:
        if isinstance(dataset, load_grain().MapDataset):
            return from_random_access(dataset)
        batches = dataset.batch(global_batch_size, drop_remainder=is_training, batch_fn=part_of)
        return read_ahead(batches, num_ahead=num_ahead) if num_ahead else batches

    return process


def batch(
    global_batch_size: int,
    *,
    is_training: bool,
    pad_example_fn: Union[PadExampleFn, InstantiableConfig[PadExampleFn]] = default_pad_example_fn,
    prefetch_buffer_size: int = -1,
    num_feeds: Optional[int] = None,
    feed_index: Optional[int] = None,
) -> DatasetToDatasetFn:
    """Returns a function that makes batches of this process' part of the examples; see `per_feed_batch`.

    Args:
        global_batch_size: Number of examples of a batch, over all processes.
        is_training: As in `per_feed_batch`.
        pad_example_fn: As in `per_feed_batch`.
        prefetch_buffer_size: As in `per_feed_batch`.
        num_feeds: Number of feeds. None: one per process.
        feed_index: Which of them this is. None: this process.

    Raises:
        ValueError: If the batch does not divide over the feeds, or a number is out of range.
    """
    num_feeds = jax.process_count() if num_feeds is None else num_feeds
    if global_batch_size < 1 or global_batch_size % num_feeds:
        raise ValueError(
            error_message(
                where="batcher.global_batch_size",
                what=f"{global_batch_size} does not divide over {num_feeds} processes",
                expected=f"a positive multiple of {num_feeds}",
            )
        )
    return per_feed_batch(
        global_batch_size // num_feeds,
        is_training=is_training,
        pad_example_fn=pad_example_fn,
        prefetch_buffer_size=prefetch_buffer_size,
        num_feeds=num_feeds,
        feed_index=jax.process_index() if feed_index is None else feed_index,
    )


def read_ahead(dataset: Dataset, *, num_ahead: int) -> Dataset:
    """Returns a stream whose elements a thread reads ahead, up to `num_ahead` of them."""
    # The stream's class is one of grain's, which is loaded only when data is read.
    module = importlib.import_module("axlearn.common.input_tf_data._prefetch")
    return module.ReadAheadIterDataset(dataset, num_ahead=num_ahead)


def stack(examples: Sequence[Any]) -> Any:
    """Returns a batch of examples: arrays with one dimension more in front."""
    return jax.tree.map(lambda *values: np.stack(values), *examples)


class _FeedExamples:
    """The examples of one feed in the order in which it reads them: grain's random-access data source."""

    def __init__(
        self, dataset: Dataset, *, here: slice, global_batch_size: int, pad_fn: Optional[PadExampleFn]
    ):
        self._dataset = dataset
        self._num_examples = len(dataset)
        self._here = here
        self._feed_batch_size = here.stop - here.start
        self._global_batch_size = global_batch_size
        self._pad_fn = pad_fn

    def __len__(self) -> int:
        if self._pad_fn is None:
            # An empty dataset has no examples, however often it is read.
            return ENDLESS if self._num_examples else 0
        return -(-self._num_examples // self._global_batch_size) * self._feed_batch_size

    def __getitem__(self, index: int) -> Any:
        step, row = divmod(int(index), self._feed_batch_size)
        place = step * self._global_batch_size + self._here.start + row
        if place < self._num_examples:
            return self._example(place)
        if self._pad_fn is None:
            return self._example(place % self._num_examples)
        return self._pad_fn(self._example(0))

    def _example(self, place: int) -> Any:
        example = self._dataset[place]
        if example is None:
            raise ValueError(
                error_message(
                    where="input.processor",
                    what=f"the dataset has no example {place}: it was filtered while it could still be addressed",
                    expected="a stream behind a filter",
                    advice="Use input_tf_data.filter_examples, or dataset.to_iter_dataset() before the filter.",
                )
            )
        return example
