"""What the functions of an input take and return, and the order in which documents are seen."""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Optional, Protocol, Union

import numpy as np

from axlearn.common.lm_packing import permutation
from axlearn.common.utils import TensorSpec
from axlearn.common.vocabulary import Vocabulary

if TYPE_CHECKING:
    import grain

    Dataset = Union["grain.MapDataset", "grain.IterDataset"]
else:
    # grain takes longer to import than a command has for starting, and a config needs none of it.
    Dataset = Any

# Grain asks for a length, and training data has no end: more examples than any run sees, yet no overflow when
# multiplied by weights and the sizes of batches.
ENDLESS = 2**62


def load_grain() -> Any:
    """Loads grain, which only inputs that read data need."""
    import grain

    return grain


class BuildDatasetFn(Protocol):
    """Builds the dataset of a whole run, of which every process reads its part. Called when data is to be read.

    It may have the attributes of a `DescribedSource`, each of which the input looks for.
    """

    def __call__(self) -> Dataset: ...


class DatasetToDatasetFn(Protocol):
    """Makes a dataset of another one."""

    def __call__(self, dataset: Dataset, /) -> Dataset: ...


class DescribedSource:
    """A `BuildDatasetFn` that says of its examples what an input is asked before it reads any.

    Args:
        build: Builds the dataset.
        element_spec: Shape and dtype of each array of an example. None: not known without reading one.
        vocab_size: Returns the number of ids that examples may hold; may read a tokenizer. None: not known.
        fingerprint: Returns what the examples are a function of beyond the source's config, as JSON values by
            name, such as a tokenizer's digest; may read data. None: nothing.
        write_assets: Writes what it takes to read and write text as the examples do into a folder. None:
            there is nothing of the kind.
    """

    def __init__(
        self,
        build: Callable[[], Dataset],
        *,
        element_spec: Optional[Mapping[str, TensorSpec]] = None,
        vocab_size: Optional[Callable[[], Optional[int]]] = None,
        fingerprint: Optional[Callable[[], Mapping[str, Union[str, int, float, None]]]] = None,
        write_assets: Optional[Callable[[Union[str, os.PathLike[str]]], None]] = None,
    ):
        self._build = build
        self.element_spec = element_spec
        self.vocab_size = vocab_size
        self.fingerprint = fingerprint
        self.write_assets = write_assets

    def __call__(self) -> Dataset:
        return self._build()


class VocabSource(DescribedSource):
    """A `DescribedSource` of rows of ids of a tokenizer, which is loaded when it is first asked for.

    Args:
        build: Builds the dataset from the tokenizer.
        vocab: Loads the tokenizer; called once.
        element_spec: As in `DescribedSource`.
        order_version: To be raised when the same config gives other rows or another order.
        fingerprint: As in `DescribedSource`, without tokenizer and order.
    """

    def __init__(
        self,
        build: Callable[[Vocabulary], Dataset],
        *,
        vocab: Callable[[], Vocabulary],
        element_spec: Mapping[str, TensorSpec],
        order_version: int,
        fingerprint: Callable[[], Mapping[str, Union[str, int, float, None]]] = dict,
    ):
        self._load_vocab = functools.lru_cache(maxsize=1)(vocab)
        super().__init__(
            lambda: build(self.vocab()),
            element_spec=element_spec,
            vocab_size=lambda: self.vocab().vocab_size,
            fingerprint=lambda: {
                **fingerprint(),
                "tokenizer": self.vocab().fingerprint,
                "order_version": order_version,
            },
            write_assets=lambda folder: self.vocab().save(folder),
        )

    def vocab(self) -> Vocabulary:
        """Returns the tokenizer, loaded at the first call."""
        return self._load_vocab()


class ShuffledExamples:
    """Examples epoch after epoch, without an end, in an order that is a function of the seed: a source of grain's.

    The examples are cut into consecutive windows. An epoch takes the windows in a drawn order (the last one,
    which may be smaller, at the end), and the examples of each window in a drawn order, so that examples which
    are seen together also lie together on the disk. With one window for all, that is a full shuffle.
    """

    def __init__(self, examples: Sequence[Any], *, window_size: int, seed: Sequence[int] = (0,)):
        """Describes the order.

        Args:
            examples: The examples of an epoch, at least one.
            window_size: Number of examples of a window; 0: nothing is shuffled.
            seed: Chooses the order, together with the epoch; none of them negative.
        """
        self._examples = examples
        self._num_examples = len(examples)
        self._window_size = min(window_size, self._num_examples)
        self._seed = tuple(seed)
        # Threads stand in neighbouring windows.
        self._order = functools.lru_cache(maxsize=16)(self._make_order)

    def _make_order(self, epoch: int, window: Optional[int], size: int) -> np.ndarray:
        # The order of windows and the order within window w differ in their key.
        return permutation(size, key=(*self._seed, epoch, 0 if window is None else window + 1))

    def __len__(self) -> int:
        return ENDLESS

    def index_of(self, place: int) -> int:
        """Returns which example of an epoch stands at a place, counted from 0 through all epochs."""
        epoch, place = divmod(int(place), self._num_examples)
        if not self._window_size:
            return place
        num_full, rest = divmod(self._num_examples, self._window_size)
        window, place = divmod(place, self._window_size)
        if window < num_full:
            window = int(self._order(epoch, None, num_full)[window])
        size = self._window_size if window < num_full else rest
        return window * self._window_size + int(self._order(epoch, window, size)[place])

    def __getitem__(self, place: int) -> Any:
        return self._examples[self.index_of(place)]
