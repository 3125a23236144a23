"""Events of a run, as records that a program can add up."""

import json

import pytest

from axlearn.common.measurement import Event, EventLog, EventType, maybe_build_recorder, maybe_record_event


def test_moments_and_durations_are_lines_of_json(tmp_path):
    path = tmp_path / "made" / "events.jsonl"
    recorder = maybe_build_recorder(EventLog.default_config().set(path=str(path), name="job"))
    recorder.record(Event.START_JOB, step=3)
    with pytest.raises(KeyError), maybe_record_event(recorder, EventType.EVAL), recorder.maybe_monitor_all():
        raise KeyError
    first, second = map(json.loads, path.read_text().splitlines())
    assert (first["event"], first["step"], first["job"]) == ("start_job", 3, "job")
    assert second["event"] == "eval"
    assert second["time"] >= first["time"]
    assert second["seconds"] >= 0


def test_without_a_recorder_nothing_is_recorded():
    assert maybe_build_recorder(None) is None
    with maybe_record_event(None, EventType.EVAL):
        pass
