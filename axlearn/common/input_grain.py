"""Batches read by grain from a source of examples that can be addressed by number.

What the source offers is the example at (epoch, index); from this the batch of any step follows by
arithmetic, so the order depends on nothing but the source's seed and the step, and a run continues anywhere
without replaying.
"""

import functools
import os
from collections.abc import Iterator
from typing import Any, Optional, Protocol, Union, runtime_checkable

import numpy as np

from axlearn.common import input_base
from axlearn.common.config import REQUIRED, InstantiableConfig, Required, config_class
from axlearn.common.input_base import Batch, DataIterator, Feed
from axlearn.common.module import Module, nowrap
from axlearn.common.utils import TensorSpec

Example = dict[str, np.ndarray]

# Grain asks for a length, and training data has no end: more examples than any run sees, yet no overflow when
# multiplied by the sizes of batches.
_ENDLESS = 2**62


@runtime_checkable
class ExampleSource(Protocol):
    """Examples of equal shapes by epoch and index. Every method but `element_spec` may read data."""

    def num_examples(self) -> int:
        """Returns the number of examples of an epoch, the same for each."""

    def example(self, *, epoch: int, index: int) -> Example:
        """Returns the example at 0 <= index < num_examples(), as a pure function; called from threads."""

    def dead_example(self) -> Example:
        """Returns an example without targets, to fill up the last batch of an evaluation."""

    def element_spec(self) -> dict[str, TensorSpec]:
        """Returns shape and dtype of each array of an example, without reading data."""

    def fingerprint(self) -> dict[str, Union[str, int, float, None]]:
        """Returns what the examples are a function of, as JSON values by name."""

    def write_assets(self, directory: Union[str, os.PathLike[str]]) -> None:
        """Writes what it takes to read and write text as this source does."""


def _grain() -> Any:
    """Loads grain, which only inputs that read data need."""
    import grain

    return grain


class _Rows:
    """The examples of one process, in the order in which it reads them: grain's random-access data source."""

    def __init__(self, source: ExampleSource, *, is_training: bool, global_batch_size: int, feed: Feed):
        self._source = source
        self._is_training = is_training
        self._global_batch_size = global_batch_size
        self._feed_batch_size = global_batch_size // feed.num_processes
        self._feed_start = feed.process_index * self._feed_batch_size
        self._num_examples = source.num_examples()

    def __len__(self) -> int:
        if self._is_training:
            return _ENDLESS
        return -(-self._num_examples // self._global_batch_size) * self._feed_batch_size

    def __getitem__(self, index: int) -> Example:
        step, row = divmod(int(index), self._feed_batch_size)
        example_index = step * self._global_batch_size + self._feed_start + row
        epoch, index_in_epoch = divmod(example_index, self._num_examples)
        if epoch > 0 and not self._is_training:
            return self._source.dead_example()
        return self._source.example(epoch=epoch, index=index_in_epoch)


def _stack(examples: list[Example]) -> Batch:
    return {key: np.stack([example[key] for example in examples]) for key in examples[0]}


class Input(input_base.Input):
    """Batches of a source of examples, read ahead by threads."""

    @config_class
    class Config(input_base.Input.Config):
        # True: endless, epoch after epoch. False: epoch 0 once, the last batch filled up with examples
        # without targets.
        is_training: Required[bool] = REQUIRED
        # Builds the `ExampleSource`.
        source: Required[InstantiableConfig[Any]] = REQUIRED
        # Number of examples of a batch, over all processes.
        global_batch_size: Required[int] = REQUIRED
        # Threads that make examples; 0: they are made when the batch is asked for.
        num_read_threads: int = 1
        # Batches made ahead, at least num_read_threads.
        num_prefetched_batches: int = 2

    def __init__(self, cfg: Config, *, parent: Optional[Module]):
        super().__init__(cfg, parent=parent)
        self._source: ExampleSource = cfg.source.instantiate()

    @property
    def source(self) -> ExampleSource:
        """Where the examples come from."""
        return self._source

    @property
    def vocab_size(self) -> Optional[int]:
        vocab = getattr(self._source, "vocab", None)
        return None if vocab is None else vocab.vocab_size

    @nowrap
    def batches(self) -> DataIterator:
        """Returns an iterator over this process' parts of the batches; see `input_base.Input.batches`.

        Raises:
            ValueError: If the data cannot be read, or the batch does not divide over the processes.
        """
        cfg = self.config
        feed = self._feed(cfg.global_batch_size)
        rows = _Rows(
            self._source, is_training=cfg.is_training, global_batch_size=cfg.global_batch_size, feed=feed
        )
        return DataIterator(
            batches_from=functools.partial(
                self._batches_from, rows, cfg.global_batch_size // feed.num_processes
            ),
            fingerprint={
                **self._source.fingerprint(),
                "global_batch_size": cfg.global_batch_size,
                "is_training": cfg.is_training,
            },
        )

    def _batches_from(self, rows: _Rows, feed_batch_size: int, step: int) -> Iterator[Batch]:
        grain = _grain()
        cfg = self.config
        dataset = grain.MapDataset.source(rows).batch(feed_batch_size, batch_fn=_stack)
        options = grain.ReadOptions(
            num_threads=cfg.num_read_threads,
            prefetch_buffer_size=max(cfg.num_read_threads, cfg.num_prefetched_batches),
        )
        return map(self._to_physical, dataset[step:].to_iter_dataset(options))

    @nowrap
    def element_spec(self) -> dict[str, TensorSpec]:
        num_rows = self.config.global_batch_size
        return self._to_physical_spec(
            {
                key: TensorSpec(shape=(num_rows, *spec.shape), dtype=spec.dtype)
                for key, spec in self._source.element_spec().items()
            }
        )

    @nowrap
    def write_assets(self, directory: Union[str, os.PathLike[str]]) -> None:
        self._source.write_assets(directory)
