"""A look or a meeting that fails does not lose the request to stop. Real processes agree in `tests/hosts`."""

import time

import pytest

from axlearn.common import notices, processes
from axlearn.common.processes import PeerTimeoutError
from axlearn.common.trainer import _agreement
from axlearn.common.trainer._agreement import StopAgreement
from axlearn.common.trainer._signals import StopSignals


def test_processes_look_and_meet_again_until_they_agree(monkeypatch):
    looks = iter([RuntimeError("UNAVAILABLE"), None, "15", "15"])
    meetings = iter([PeerTimeoutError("process 1 did not come"), ["7", "9"]])
    tags = []

    def outcome(outcomes):
        value = next(outcomes)
        if isinstance(value, Exception):
            raise value
        return value

    def meet(tag, text, *, timeout_seconds):
        del text
        assert timeout_seconds <= 30
        tags.append(tag)
        return outcome(meetings)

    monkeypatch.setattr(_agreement, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(notices, "posted", lambda tag: outcome(looks))
    monkeypatch.setattr(processes, "all_gather_text", meet)
    with StopAgreement(StopSignals(), step=7, num_processes=2) as stops:
        deadline = time.monotonic() + 5
        while stops.signal_behind(10) is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert stops.signal_behind(9) is None
        assert stops.signal_behind(10) == 15
    # A name serves for one meeting.
    assert len(set(tags)) == 2


@pytest.mark.parametrize(("num_processes", "seconds"), [(2, 0.5), (4000, 4.0)])
def test_many_processes_look_less_often(num_processes, seconds):
    stops = StopAgreement(StopSignals(), step=0, num_processes=num_processes)
    assert stops._look_seconds == seconds
