"""The rows of all windows as a stream of grain's, in a drawn order, with a position.

Imports grain, hence is itself loaded only when data is read.
"""

import threading
from collections.abc import Callable
from typing import Any, NamedTuple, Optional

import grain
import numpy as np

from axlearn.common.input_base import Batch
from axlearn.common.input_lm._windows import Rows
from axlearn.common.input_tf_data import Dataset
from axlearn.common.lm_packing import permutation

# The first block is this part of a whole one, and each of the following twice as large as the one before, so that
# the first batch does not wait for a whole block.
_FIRST_BLOCK_PART = 8


class _Block(NamedTuple):
    number: int
    # Where the stream of windows stood before its first window.
    parent_state: dict[str, Any]
    windows: list[Rows]
    # The place of each window's first row among those of the block, and the end of the last.
    bounds: np.ndarray
    # The rows of the block in the order in which they are seen; None: as they come.
    order: Optional[np.ndarray]

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def row(self, place: int) -> Batch:
        index = place if self.order is None else int(self.order[place])
        window = int(np.searchsorted(self.bounds, index, side="right")) - 1
        return self.windows[window][index - int(self.bounds[window])]


class RowsIterDataset(grain.IterDataset):
    """The rows of a stream of windows.

    The stream is cut into blocks, each of as many whole windows as it takes for `num_rows_to_shuffle` rows (the
    first blocks are smaller), and the rows of a block come in an order that is a function of the seed and the
    index of the block. The next block is made by a thread while the rows of one are handed out.
    """

    def __init__(self, windows: Dataset, *, num_rows_to_shuffle: int, seed: int):
        """Describes the stream.

        Args:
            windows: A stream whose elements are `Rows`.
            num_rows_to_shuffle: The size of a block; 0 or 1: every window is one, and nothing is shuffled.
            seed: Chooses the order.
        """
        super().__init__(windows)
        self._num_rows_to_shuffle = num_rows_to_shuffle
        self._seed = seed

    def __iter__(self) -> "_RowsIterator":
        return _RowsIterator(
            self._parent.__iter__(), num_rows_to_shuffle=self._num_rows_to_shuffle, seed=self._seed
        )


class _RowsIterator(grain.DatasetIterator):
    def __init__(self, windows: Any, *, num_rows_to_shuffle: int, seed: int):
        super().__init__(windows)
        self._num_rows_to_shuffle = num_rows_to_shuffle
        self._seed = seed
        self._block: Optional[_Block] = None
        self._place = 0
        self._next_block: Optional[_Task] = None
        # Whether a block that is being made is of no use any more.
        self._is_abandoned = False

    def __next__(self) -> Batch:
        while self._block is None or self._place >= len(self._block):
            self._advance()
        row = self._block.row(self._place)
        self._place += 1
        return row

    def _advance(self) -> None:
        number = 0 if self._block is None else self._block.number + 1
        task, self._next_block = self._next_block, None
        self._start_block(number, self._read_block(number) if task is None else task.result())
        if not len(self._block or ()):
            raise StopIteration

    def _start_block(self, number: int, block: _Block) -> None:
        self._block, self._place = block, 0
        if self._num_rows_to_shuffle > 1 and len(block):
            self._next_block = _Task(lambda: self._read_block(number + 1))

    def _read_block(self, number: int) -> _Block:
        parent_state = self._parent.get_state()
        whole = self._num_rows_to_shuffle
        num_wanted = max(1, min(whole, whole * 2 ** min(number, _FIRST_BLOCK_PART) // _FIRST_BLOCK_PART))
        windows: list[Rows] = []
        num_rows = 0
        while num_rows < num_wanted and not self._is_abandoned:
            window = next(self._parent, None)
            if window is None:
                break
            windows.append(window)
            num_rows += len(window)
        bounds = np.cumsum([0, *map(len, windows)])
        order = permutation(num_rows, key=(self._seed, number)) if whole > 1 else None
        return _Block(number, parent_state, windows, bounds, order)

    def get_state(self) -> dict[str, Any]:
        block = self._block
        if block is None:
            return {"block": 0, "row": 0, "windows": self._parent.get_state()}
        return {"block": block.number, "row": self._place, "windows": block.parent_state}

    def set_state(self, state: dict[str, Any]) -> None:
        self._abandon_next_block()
        self._parent.set_state(state["windows"])
        self._block, self._place = None, 0
        if state["row"]:
            self._start_block(state["block"], self._read_block(state["block"]))
            self._place = state["row"]

    def _abandon_next_block(self) -> None:
        if self._next_block is not None:
            self._is_abandoned = True
            self._next_block.wait()
            self._next_block, self._is_abandoned = None, False

    def close(self) -> None:
        # Also called by the garbage collector, from any thread: nothing here waits.
        self._is_abandoned = True
        super().close()


class _Task:
    """A call in a thread of its own, which does not keep the process alive."""

    def __init__(self, fn: Callable[[], _Block]):
        self._fn = fn
        self._result: Optional[_Block] = None
        self._error: Optional[BaseException] = None
        self._thread = threading.Thread(target=self._run, name="rows-block", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = self._fn()
        except BaseException as e:  # Raised again by `result`.
            self._error = e

    def wait(self) -> None:
        self._thread.join()

    def result(self) -> _Block:
        self.wait()
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result


def rows_dataset(
    examples: Dataset,
    *,
    window_fn: Callable[[Any], Rows],
    window_size: int,
    num_rows_to_shuffle: int,
    seed: int,
    num_threads: int,
) -> Dataset:
    """Returns the rows of the windows of a dataset of examples.

    Args:
        examples: The examples. Where they can be addressed by number, threads make windows ahead.
        window_fn: Makes the rows of a window from its examples.
        window_size: Number of consecutive examples of a window; the last one may be smaller.
        num_rows_to_shuffle: As in `RowsIterDataset`.
        seed: As in `RowsIterDataset`.
        num_threads: Threads that make windows.
    """
    windows = examples.batch(window_size, batch_fn=list).map(window_fn)
    if isinstance(windows, grain.MapDataset):
        windows = windows.to_iter_dataset(
            grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)
        )
    return RowsIterDataset(windows, num_rows_to_shuffle=num_rows_to_shuffle, seed=seed)
