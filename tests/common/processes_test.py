"""Texts between processes: three real ones, of which one is late, silent or fast."""

import threading
import time

import pytest

from axlearn.common import processes
from axlearn.common.jax_compat import coordination
from axlearn.common.processes import PeerTimeoutError
from tests.processes_harness import run_processes

_LONG = 5_000_000


def _left_in_store() -> int:
    """How many texts of earlier meetings the store still holds, for everybody who asks after the same meeting."""
    processes.wait_for_all("before counting", timeout_seconds=30)
    peers = coordination()
    assert peers is not None
    # The last one to leave a meeting removes it.
    for _ in range(100):
        stored = peers.client.key_value_dir_get_bytes("axlearn/processes")
        # Others may have gone on already.
        keys = [key for key, _ in stored if "after counting" not in key]
        if not keys:
            break
        time.sleep(0.02)
    processes.wait_for_all("after counting", timeout_seconds=30)
    return len(keys)


def talk():
    """What each of three processes does; returns what it heard."""
    peers = coordination()
    assert peers is not None
    me = peers.process_index
    heard = {
        "all": [
            processes.all_gather_text(f"greeting/{i}", f"{i} of {me}: ü\n", timeout_seconds=30)
            for i in range(2)
        ],
        "first": processes.gather_text("to the first", f"{me}" * 2, timeout_seconds=30),
        "broadcast": processes.broadcast_text(
            "from the first", "hello" if me == 0 else None, timeout_seconds=30
        ),
        "long": [
            len(x) for x in processes.all_gather_text("long", "x" * (_LONG * (me == 1)), timeout_seconds=30)
        ],
    }
    # A thread waits, and the others of this process go on.
    processes.wait_for_all("in step", timeout_seconds=30)
    waiting = threading.Thread(target=processes.wait_for_all, args=("late",), kwargs={"timeout_seconds": 30})
    if me == 2:
        time.sleep(0.5)
    started_at = time.monotonic()
    waiting.start()
    num_rounds = 0
    while waiting.is_alive():
        num_rounds += 1
        time.sleep(0.01)
    heard["waited"] = me == 2 or (num_rounds > 5 and time.monotonic() - started_at > 0.3)
    heard["left"] = _left_in_store()
    # Process 1 stays away.
    try:
        if me != 1:
            processes.wait_for_all("absent", timeout_seconds=0.5)
        heard["absent"] = None
    except PeerTimeoutError as e:
        heard["absent"] = str(e)
    # Who failed there cannot meet there again.
    try:
        if me == 0:
            processes.wait_for_all("absent", timeout_seconds=0.5)
        heard["again"] = None
    except ValueError as e:
        heard["again"] = str(e)
    # A failed meeting does not stand in the way of the next one.
    processes.wait_for_all("at last", timeout_seconds=30)
    return heard


def test_three_processes_hear_each_other_and_name_the_one_that_does_not_come():
    heard = [x.result for x in run_processes("tests.common.processes_test:talk", num_processes=3)]
    for me in range(3):
        assert heard[me]["all"] == [[f"{i} of {k}: ü\n" for k in range(3)] for i in range(2)]
        assert heard[me]["first"] == (["00", "11", "22"] if me == 0 else None)
        assert heard[me]["broadcast"] == "hello"
        assert heard[me]["long"] == [0, _LONG, 0]
        assert heard[me]["waited"]
        assert heard[me]["left"] == 0
    assert heard[1]["absent"] is None
    assert "There was a meeting 'absent' before" in heard[0]["again"]
    for me in (0, 2):
        assert (
            f"absent: Process {me} waited for the others: process 1 of 3 did not come within 0.5 s"
            in (heard[me]["absent"])
        )


def test_a_process_that_is_alone_hears_itself():
    assert processes.all_gather_text("tag", "text", timeout_seconds=1) == ["text"]
    assert processes.gather_text("tag", "text", timeout_seconds=1) == ["text"]
    assert processes.broadcast_text("tag", "text", timeout_seconds=1) == "text"
    processes.wait_for_all("tag", timeout_seconds=1)


def test_several_processes_without_a_service_are_told_what_is_missing(monkeypatch):
    monkeypatch.setattr("jax.process_count", lambda: 2)
    with pytest.raises(RuntimeError, match=r"jax\.distributed\.initialize"):
        processes.wait_for_all("tag", timeout_seconds=1)
