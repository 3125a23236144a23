"""A stream that a thread reads ahead of its consumer."""

import atexit
import weakref
from typing import Any

from axlearn.common.input_tf_data._dataset import Dataset, load_grain

# Iterators with a thread of grain's. What is still open when the interpreter ends would be closed after the modules
# that closing it needs, and say so on the terminal.
_open_iterators: "weakref.WeakSet[Any]" = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for iterator in list(_open_iterators):
        iterator.close()


def closed_at_exit(iterator: Any) -> Any:
    """Returns an iterator of grain's, which is closed before the interpreter ends."""
    if hasattr(iterator, "close"):
        _open_iterators.add(iterator)
    return iterator


def prefetched(dataset: Dataset, *, num_ahead: int) -> Dataset:
    """Returns a stream that makes up to `num_ahead` elements in a thread before they are asked for; 0: none."""
    if num_ahead == 0:
        return dataset
    return load_grain().experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=num_ahead)
