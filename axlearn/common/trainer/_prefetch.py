"""A thread that prepares the next batches and puts them on the mesh while the device computes."""

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Optional

import jax
import numpy as np

from axlearn.common.utils import NestedTensor

# Batches that wait, on the mesh, for the loop to take them.
_DEPTH = 2
# Steps that may be dispatched or prepared beyond the last one that the device has finished. Four keeps the
# device supplied (one running, one queued, two prepared) and bounds what the batches hold of its memory.
_MAX_AHEAD = 4


class PreparedBatch(NamedTuple):
    """One batch on the mesh, and what the host needs to know about it.

    Attributes:
        arrays: The batch as global arrays.
        position: The iterator's state behind this batch: what to save once the batch has been used.
        num_tokens: Positions that are not padding, in the batches of all processes.
    """

    arrays: NestedTensor
    position: Optional[dict[str, Any]]
    num_tokens: int


class _Failure(NamedTuple):
    error: BaseException


def count_tokens(batch: dict[str, np.ndarray]) -> int:
    """Returns the positions of a batch of token rows that are not padding.

    A batch with `input_segment_ids` marks its padding by segment 0; without them every position counts. A
    batch without `input_ids` counts its rows as tokens.
    """
    if "input_ids" not in batch:
        return max((len(leaf) for leaf in jax.tree.leaves(batch)), default=0)
    segment_ids = batch.get("input_segment_ids")
    return int(batch["input_ids"].size if segment_ids is None else np.count_nonzero(segment_ids))


class BatchPrefetcher:
    """Hands out prepared batches in order; what goes wrong in the thread is raised where the batch is taken.

    The thread also is the brake of the loop: it prepares batch i only when step i - 4 has finished on the
    device, so the loop itself never has to wait for the device between the steps at which something is due.

    Args:
        iterator: The input's iterator; from `start` on only the thread touches it. `get_state` is called
            after each batch where the iterator has it.
        prepare: Checks a host batch and puts it on the mesh; runs in the thread.
        on_finished: Called in the thread with a step's loss when the device has computed it; may raise.
        logical_rows: Leaves out of a host batch the rows that only fill up the mesh, and are no tokens.
        num_feeds: Into how many parts processes cut a batch. Of the tokens of the others no more is known than
            that they are about as many as here.
        thread_context: Makes the context in which the thread works, such as that of the mesh.
    """

    def __init__(
        self,
        iterator: Iterator[dict[str, np.ndarray]],
        *,
        prepare: Callable[[dict[str, np.ndarray]], NestedTensor],
        on_finished: Callable[[int, jax.Array], None],
        logical_rows: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] = lambda batch: batch,
        num_feeds: int = 1,
        thread_context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ):
        self._iterator = iterator
        self._prepare = prepare
        self._on_finished = on_finished
        self._logical_rows = logical_rows
        self._num_feeds = num_feeds
        self._thread_context = thread_context
        self._ready: queue.Queue[PreparedBatch | _Failure] = queue.Queue(maxsize=_DEPTH)
        self._dispatched: queue.SimpleQueue[Optional[tuple[int, jax.Array]]] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name="batch-prefetch", daemon=True)

    def __enter__(self) -> "BatchPrefetcher":
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stopping.set()
        self._dispatched.put(None)
        self._drain()
        # The thread may be inside the user's data code; it is a daemon, so the process can end without it.
        self._thread.join(timeout=10)

    def get(self) -> PreparedBatch:
        """Returns the next batch, waiting for it if need be.

        Raises:
            StopIteration: If the input ended.
            Exception: What the thread met, as it was raised there.
        """
        item = self._ready.get()
        if isinstance(item, _Failure):
            raise item.error
        return item

    def step_dispatched(self, step: int, loss: jax.Array) -> None:
        """Tells the thread that a step is on its way to the device; `loss` says when it is done."""
        self._dispatched.put((step, loss))

    def _work(self) -> None:
        try:
            with self._thread_context():
                num_prepared = 0
                while not self._stopping.is_set():
                    if num_prepared >= _MAX_AHEAD and not self._wait_for_a_finished_step():
                        return
                    self._put(self._next_batch())
                    num_prepared += 1
        except BaseException as e:  # Raised again by `get`, in the loop.
            self._put(_Failure(e))

    def _wait_for_a_finished_step(self) -> bool:
        dispatched = self._dispatched.get()
        if dispatched is None:
            return False
        step, loss = dispatched
        self._on_finished(step, jax.block_until_ready(loss))
        return True

    def _next_batch(self) -> PreparedBatch:
        batch = next(self._iterator)
        get_state = getattr(self._iterator, "get_state", None)
        position = None if get_state is None else get_state()
        num_tokens = self._num_feeds * count_tokens(self._logical_rows(batch))
        return PreparedBatch(self._prepare(batch), position, num_tokens)

    def _put(self, item: PreparedBatch | _Failure) -> None:
        while not self._stopping.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def _drain(self) -> None:
        while True:
            try:
                self._ready.get_nowait()
            except queue.Empty:
                return
