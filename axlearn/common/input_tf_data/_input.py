"""The input that is put together from functions."""

import os
from typing import Any, Optional, Union

import numpy as np

from axlearn.common import input_base
from axlearn.common.config import (
    REQUIRED,
    InstantiableConfig,
    Required,
    config_class,
    config_for_function,
    error_message,
    maybe_set_config,
)
from axlearn.common.input_base import Batch, Feed
from axlearn.common.input_tf_data._batch import batch, stack
from axlearn.common.input_tf_data._combinators import identity
from axlearn.common.input_tf_data._dataset import BuildDatasetFn, Dataset, DatasetToDatasetFn, load_grain
from axlearn.common.input_tf_data._iterator import DatasetIterator
from axlearn.common.module import Module, nowrap
from axlearn.common.utils import TensorSpec

# Of a batch nothing depends on how it was read ahead.
_NOT_IN_FINGERPRINT = ("prefetch_buffer_size",)


class Input(input_base.Input):
    """Batches of `batcher(processor(source()))`, each of them a function that a config builds.

    Building the input builds the functions and reads nothing; the dataset is built when batches are asked for.

    Where the dataset can be addressed by number, so can the batches, and a process makes its own examples only.
    Where it is a stream, such as packed text, every process makes the examples of all, so that the order is the
    same on any number of them, and the position says where the stream stood.
    """

    @config_class
    class Config(input_base.Input.Config):
        # True: endless, or as long as the source goes on. False: once, the last batch filled up.
        is_training: Required[bool] = REQUIRED
        # Builds the `BuildDatasetFn`.
        source: Required[InstantiableConfig[Any]] = REQUIRED
        # Builds the `DatasetToDatasetFn` between source and batcher.
        processor: Required[InstantiableConfig[Any]] = REQUIRED
        # Builds the `DatasetToDatasetFn` that makes batches. What it takes of is_training, feed_batch_size,
        # global_batch_size, num_feeds and feed_index is set here.
        batcher: InstantiableConfig[Any] = config_for_function(batch)

    def __init__(self, cfg: Config, *, parent: Optional[Module]):
        super().__init__(cfg, parent=parent)
        self._global_batch_size = self._find_global_batch_size()
        self._part = self._feed(self._global_batch_size)
        self._source: BuildDatasetFn = maybe_set_config(
            cfg.source.clone(), is_training=cfg.is_training
        ).instantiate()
        self._processor: DatasetToDatasetFn = maybe_set_config(
            cfg.processor.clone(), is_training=cfg.is_training
        ).instantiate()
        self._batcher = self._make_batcher(self._part)

    def _find_global_batch_size(self) -> int:
        cfg = self.config
        if self._dispatcher is not None:
            size: int = self._dispatcher.config.global_logical_batch_size
            return size
        size = getattr(cfg.batcher, "global_batch_size", REQUIRED)
        if size is REQUIRED:
            raise ValueError(
                error_message(
                    where=f"{self.path()}.batcher",
                    what="there is no batch size",
                    expected="input_dispatcher.global_logical_batch_size, or batcher.global_batch_size of "
                    "input_tf_data.batch",
                )
            )
        return size

    def _make_batcher(self, part: Feed) -> DatasetToDatasetFn:
        given = {
            "feed_batch_size": self._global_batch_size // part.num_processes,
            "global_batch_size": self._global_batch_size,
            "num_feeds": part.num_processes,
            "feed_index": part.process_index,
        }
        batcher_cfg = self.config.batcher.clone()
        for name, value in given.items():
            found = getattr(batcher_cfg, name, REQUIRED)
            if found is not REQUIRED and found is not None and found != value:
                raise ValueError(
                    error_message(
                        where=f"{self.path()}.batcher.{name}",
                        what=f"{found!r} contradicts the batch of {self._global_batch_size} rows",
                        expected=f"{value}, or left out",
                    )
                )
        maybe_set_config(batcher_cfg, is_training=self.config.is_training, **given)
        batcher: DatasetToDatasetFn = batcher_cfg.instantiate()
        return batcher

    @property
    def source(self) -> BuildDatasetFn:
        """Builds the dataset before it is processed and batched."""
        return self._source

    @property
    def vocab_size(self) -> Optional[int]:
        vocab_size = getattr(self._source, "vocab_size", None)
        size: Optional[int] = None if vocab_size is None else vocab_size()
        return size

    @nowrap
    def dataset(self) -> Dataset:
        """Builds the dataset of this process' parts of the batches, before the dispatcher fills them up."""
        return self._batcher(self._processor(self._source()))

    @nowrap
    def batches(self) -> DatasetIterator:
        """Returns an iterator over this process' parts of the batches; see `input_base.Input.batches`.

        Raises:
            ValueError: If the data cannot be read.
        """
        dataset = self.dataset()
        if isinstance(dataset, load_grain().MapDataset):
            dataset = dataset.to_iter_dataset()
        return DatasetIterator(dataset, finish=self._to_physical, fingerprint=self._fingerprint())

    def _fingerprint(self) -> dict[str, Union[str, int, float, None]]:
        cfg = self.config
        parts = {"source": cfg.source, "processor": cfg.processor, "batcher": cfg.batcher}
        settings: dict[str, Union[str, int, float, None]] = {}
        for part, part_cfg in parts.items():
            for line in part_cfg.debug_string().split("\n"):
                name, _, value = line.partition(": ")
                if name not in _NOT_IN_FINGERPRINT:
                    settings[f"{part}.{name}"] = value
        of_source = getattr(self._source, "fingerprint", None)
        return {
            **settings,
            **({} if of_source is None else of_source()),
            "is_training": cfg.is_training,
            "global_batch_size": self._global_batch_size,
        }

    @nowrap
    def element_spec(self) -> dict[str, TensorSpec]:
        """Returns shape and dtype of each array of a global batch.

        Reads no data where the source says what its examples look like (`DescribedSource`), as those of this
        package do; else the first example.

        Raises:
            ValueError: If the source does not say it, and cannot be read or is empty.
        """
        return self._to_physical_spec(
            {
                name: TensorSpec(shape=(self._global_batch_size, *leaf.shape), dtype=leaf.dtype)
                for name, leaf in self._example_spec().items()
            }
        )

    def _example_spec(self) -> dict[str, TensorSpec]:
        declared = getattr(self._source, "element_spec", None)
        if declared is None:
            return self._spec_of_first(self._processor(self._source()))
        if getattr(self.config.processor, "fn", None) is identity:
            return dict(declared)
        zeros = {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in declared.items()}
        # What the processor makes of an example of the declared shapes has the shapes of all.
        return self._spec_of_first(self._processor(load_grain().MapDataset.source([zeros])))

    def _spec_of_first(self, examples: Dataset) -> dict[str, TensorSpec]:
        for example in examples:
            # As they are in a batch: numbers of Python's become arrays there.
            if not isinstance(example, dict) or any(isinstance(value, dict) for value in example.values()):
                break
            arrays: Batch = stack([example])
            return {
                name: TensorSpec(shape=value.shape[1:], dtype=value.dtype) for name, value in arrays.items()
            }
        raise ValueError(
            error_message(
                where=f"{self.path()}.source",
                what="there is no example whose shapes could be known",
                expected="dictionaries of arrays, at least one, or a source with an element_spec (DescribedSource)",
            )
        )

    @nowrap
    def write_assets(self, directory: Union[str, os.PathLike[str]]) -> None:
        write = getattr(self._source, "write_assets", None)
        if write is not None:
            write(directory)
