"""The thread that feeds the loop: order, position, errors, and how far ahead it may be."""

import itertools
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axlearn.common.trainer._position import DataPosition
from axlearn.common.trainer._prefetch import BatchPrefetcher, count_tokens


class _Counter:
    """Batches 0, 1, ...; remembers how many it has given."""

    def __init__(self, *, end=None, fail_at=None):
        self.next = 0
        self._end, self._fail_at = end, fail_at

    def __iter__(self):
        return self

    def __next__(self):
        if self.next == self._end:
            raise StopIteration
        if self.next == self._fail_at:
            raise OSError("the disk is gone")
        self.next += 1
        return {"x": np.full([2], self.next - 1)}

    def get_state(self):
        return {"next_step": self.next}

    def set_state(self, state):
        self.next = state["next_step"]


def _prefetcher(iterator, *, on_finished=lambda step, loss: None, prepare=lambda batch: batch):
    return BatchPrefetcher(iterator, prepare=prepare, on_finished=on_finished)


def _settle(counter):
    """Waits until the thread has stopped to read."""
    before = -1
    while before != counter.next:
        before = counter.next
        time.sleep(0.05)
    return counter.next


def test_batches_come_in_order_with_the_position_behind_each():
    with _prefetcher(_Counter(end=3)) as prefetcher:
        got = []
        for step in range(1, 4):
            batch = prefetcher.get()
            got.append((int(batch.arrays["x"][0]), batch.position))
            prefetcher.step_dispatched(step, jnp.zeros([]))
        with pytest.raises(StopIteration):
            prefetcher.get()
    assert got == [(0, {"next_step": 1}), (1, {"next_step": 2}), (2, {"next_step": 3})]


def test_an_error_of_the_data_is_raised_where_the_batch_is_taken_after_the_batches_before_it():
    with _prefetcher(_Counter(fail_at=1)) as prefetcher:
        prefetcher.get()
        with pytest.raises(OSError, match="the disk is gone"):
            prefetcher.get()


def test_an_error_of_the_check_is_raised_where_the_batch_is_taken():
    def refuse(batch):
        raise ValueError("id 99 is outside the vocabulary")

    with _prefetcher(_Counter(), prepare=refuse) as prefetcher, pytest.raises(ValueError, match="id 99"):
        prefetcher.get()


def test_at_most_two_batches_wait_for_the_loop():
    counter = _Counter()
    with _prefetcher(counter):
        # Two wait, and the thread holds a third in its hand.
        assert _settle(counter) == 3


def test_the_thread_is_at_most_four_batches_ahead_of_the_last_finished_step():
    counter, finished = _Counter(), []
    with _prefetcher(counter, on_finished=lambda step, loss: finished.append(step)) as prefetcher:
        for _ in range(4):
            prefetcher.get()
        assert _settle(counter) == 4
        prefetcher.step_dispatched(1, jnp.zeros([]))
        assert _settle(counter) == 5
    assert finished == [1]


def test_what_the_thread_finds_in_a_finished_step_is_raised_in_the_loop():
    def check(step, loss):
        raise RuntimeError(f"step {step}: {float(loss)}")

    with _prefetcher(_Counter(), on_finished=check) as prefetcher:
        for step in range(1, 5):
            prefetcher.get()
            prefetcher.step_dispatched(step, jnp.asarray(float(step)))
        with pytest.raises(RuntimeError, match=r"step 1: 1\.0"):
            prefetcher.get()


def test_the_thread_ends_with_the_context_even_if_nobody_takes_its_batches():
    before = threading.active_count()
    with _prefetcher(_Counter()):
        pass
    assert threading.active_count() == before


def test_the_position_is_that_of_the_last_batch_used_not_of_the_last_one_read():
    counter = _Counter()
    position = DataPosition(counter)
    assert position.get_state() == {"next_step": 0}
    with _prefetcher(counter) as prefetcher:
        position.advance(prefetcher.get().position)
        _settle(counter)
    assert counter.next > 1
    assert position.get_state() == {"next_step": 1}
    position.set_state({"next_step": 7})
    assert next(counter)["x"][0] == 7


def test_padding_is_no_token():
    segment_ids = np.array([[1, 1, 2, 0], [1, 0, 0, 0]])
    batch = {"input_ids": np.zeros([2, 4], int), "input_segment_ids": segment_ids}
    assert count_tokens(batch) == 4
    del batch["input_segment_ids"]
    assert count_tokens(batch) == 8
    assert count_tokens({"image": np.zeros([3, 8, 8])}) == 3
    assert count_tokens({}) == 0


def test_the_context_of_the_thread_is_entered_in_it():
    names = []

    class _Context:
        def __enter__(self):
            names.append(threading.current_thread().name)

        def __exit__(self, *exc_info):
            names.append("left")

    prefetcher = BatchPrefetcher(
        itertools.repeat({"x": np.zeros([1])}, 1),
        prepare=jax.device_put,
        on_finished=lambda step, loss: None,
        thread_context=_Context,
    )
    with prefetcher:
        assert prefetcher.get().position is None
        with pytest.raises(StopIteration):
            prefetcher.get()
    assert names == ["batch-prefetch", "left"]
