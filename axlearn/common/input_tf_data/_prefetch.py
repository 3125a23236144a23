"""A stream that a thread reads ahead of its consumer.

Imports grain, hence is itself loaded only when data is read. Grain has such a thread of its own, but closing its
iterator waits for the thread; the garbage collector closes iterators wherever it happens to run, such as in a thread
that the waited-for one is waiting for.
"""

import queue
import threading
from typing import Any, NamedTuple, Optional

import grain

from axlearn.common.input_tf_data._dataset import Dataset

# How often a thread with nobody to take its element looks whether it is still wanted.
_POLL_SECONDS = 0.1


class _Item(NamedTuple):
    element: Any
    # Where the stream stood behind the element.
    state: dict[str, Any]
    # What reading met in place of an element.
    error: Optional[BaseException]


class _Reader:
    """Reads a stream in a thread, which does not keep the process alive."""

    def __init__(self, iterator: Any, *, num_ahead: int):
        self._iterator = iterator
        self._items: queue.Queue[_Item] = queue.Queue(maxsize=num_ahead)
        self._is_stopping = False
        self._thread = threading.Thread(target=self._read, name="read-ahead", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        item: Optional[_Item] = None
        while not self._is_stopping and (item is None or item.error is None):
            try:
                element = next(self._iterator)
                item = _Item(element, self._iterator.get_state(), None)
            except BaseException as e:  # Raised again by the consumer.
                item = _Item(None, {}, e)
            self._put(item)

    def _put(self, item: _Item) -> None:
        while not self._is_stopping:
            try:
                self._items.put(item, timeout=_POLL_SECONDS)
                return
            except queue.Full:
                continue

    def get(self) -> _Item:
        return self._items.get()

    def stop(self) -> None:
        """Tells the thread to end, without waiting for it."""
        self._is_stopping = True

    def wait(self) -> None:
        """Waits until the thread, which was told to end, leaves the stream alone."""
        self._thread.join()


class ReadAheadIterDataset(grain.IterDataset):
    """The elements of a stream, read ahead by a thread, with the position of those that were taken."""

    def __init__(self, parent: Dataset, *, num_ahead: int):
        """Describes the stream.

        Args:
            parent: The stream.
            num_ahead: Elements that wait to be taken, at least 1.
        """
        super().__init__(parent)
        self._num_ahead = num_ahead

    def __iter__(self) -> "_ReadAheadIterator":
        return _ReadAheadIterator(self._parent.__iter__(), num_ahead=self._num_ahead)


class _ReadAheadIterator(grain.DatasetIterator):
    def __init__(self, parent: Any, *, num_ahead: int):
        super().__init__(parent)
        self._num_ahead = num_ahead
        self._state: dict[str, Any] = parent.get_state()
        self._reader: Optional[_Reader] = None
        self._error: Optional[BaseException] = None

    def __next__(self) -> Any:
        if self._error is not None:
            raise self._error
        if self._reader is None:
            self._reader = _Reader(self._parent, num_ahead=self._num_ahead)
        item = self._reader.get()
        if item.error is not None:
            self._error = item.error
            raise item.error
        self._state = item.state
        return item.element

    def get_state(self) -> dict[str, Any]:
        return self._state

    def set_state(self, state: dict[str, Any]) -> None:
        if self._reader is not None:
            self._reader.stop()
            self._reader.wait()
            self._reader = None
        self._error = None
        self._parent.set_state(state)
        self._state = state

    def close(self) -> None:
        # Also called by the garbage collector, from any thread: nothing here waits.
        if self._reader is not None:
            self._reader.stop()
        super().close()
