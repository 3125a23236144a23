"""Profiles: exactly the steps that were asked for, as the profiler's own reader finds them in the files."""

import logging

import jax
import pytest

from tests.common.trainer.tiny_recipe import trainer_config


def _run(folder, **fields):
    cfg = trainer_config(dir=str(folder), max_step=fields.pop("max_step", 8))
    cfg.evalers["heldout"].trace_at_iters = fields.pop("trace_at_iters", [])
    trainer = cfg.set(**fields).instantiate(parent=None)
    trainer.run(jax.random.PRNGKey(0))


def _events(folder):
    """The names and numbers of all events, by profile, in the order of their time."""
    found = {}
    for path in sorted(folder.glob("plugins/profile/*/*.xplane.pb")):
        data = jax.profiler.ProfileData.from_file(str(path))
        events = [event for plane in data.planes for line in plane.lines for event in line.events]
        found[path.parent.name] = sorted(events, key=lambda event: event.start_ns)
    return found


def _steps(folder, name="train"):
    return {
        profile: [dict(event.stats)["step_num"] for event in events if event.name == name]
        for profile, events in _events(folder).items()
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of eight steps with two windows that overlap and one that reaches over the end."""
    folder = tmp_path_factory.mktemp("run")
    _run(folder, start_trace_steps=[2, 5, 6, 8], n_steps_for_each_trace=2, trace_at_iters=[0, 2, 99])
    return folder


def test_each_window_holds_its_steps_and_windows_that_overlap_are_one(run):
    assert _steps(run / "summaries" / "train_train") == {
        "step_00000002": [2, 3],
        "step_00000005": [5, 6, 7],
        "step_00000008": [8],
    }


def test_the_evaluation_behind_the_last_step_is_in_no_window(run):
    for events in _events(run / "summaries" / "train_train").values():
        assert not [event for event in events if "_evaluate_batches" in event.name]


def test_batches_of_evaluations_have_profiles_of_their_own_with_the_work_in_them(run):
    folder = run / "summaries" / "heldout"
    assert _steps(folder, "heldout") == {
        "step_00000004_batch_0000": [0],
        "step_00000004_batch_0002": [2],
        "step_00000008_batch_0000": [0],
        "step_00000008_batch_0002": [2],
    }
    for events in _events(folder).values():
        (window,) = [event for event in events if event.name == "heldout"]
        executed = [event for event in events if event.name.startswith("ThunkExecutor::Execute")]
        # On each of the eight devices.
        assert len(executed) >= 8
        assert all(window.start_ns <= event.start_ns <= window.end_ns for event in executed)


def test_a_window_that_the_run_has_passed_is_not_recorded_again(tmp_path):
    _run(tmp_path, max_step=4)
    _run(tmp_path, start_trace_steps=[3, 6], python_tracer_level=0)
    profiles = _events(tmp_path / "summaries" / "train_train")
    assert _steps(tmp_path / "summaries" / "train_train") == {"step_00000006": [6, 7, 8]}
    # The names of Python functions begin like this; level 0 leaves them out.
    assert not [event for event in profiles["step_00000006"] if event.name.startswith("$")]


def test_an_evaluation_within_a_window_goes_into_its_profile(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="absl"):
        _run(
            tmp_path,
            max_step=5,
            start_trace_steps=[4],
            n_steps_for_each_trace=2,
            trace_at_iters=[0, 7],
            start_trace_process_indices="all",
        )
    assert "tiny.heldout.trace_at_iters: there are 3 batches, and no 7 to record" in caplog.text
    train = tmp_path / "summaries" / "train_train"
    assert _steps(train) == {"step_00000004": [4, 5]}
    assert _steps(train, "heldout") == {"step_00000004": [0]}
    assert list(_steps(tmp_path / "summaries" / "heldout")) == ["step_00000005_batch_0000"]
    # Of another process' profiles this one records none.
    _run(tmp_path / "other", max_step=2, start_trace_steps=[2], start_trace_process_indices=[1])
    assert not (tmp_path / "other" / "summaries" / "train_train" / "plugins").exists()


def test_a_profile_of_a_name_that_exists_gets_a_number(tmp_path):
    for _ in range(2):
        _run(tmp_path / "run", max_step=1, start_trace_steps=[1], n_steps_for_each_trace=1)
        (tmp_path / "run" / "checkpoints").rename(tmp_path / f"checkpoints_{len(list(tmp_path.iterdir()))}")
    assert sorted(_steps(tmp_path / "run" / "summaries" / "train_train")) == [
        "step_00000001",
        "step_00000001-2",
    ]


@pytest.mark.parametrize(("field", "value"), [("start_trace_steps", [0, 5]), ("n_steps_for_each_trace", 0)])
def test_a_window_that_cannot_be_is_refused_before_anything_runs(tmp_path, field, value):
    with pytest.raises(ValueError, match=rf"tiny\.{field}: 0 is no step"):
        _run(tmp_path, **{field: value})
    assert not list(tmp_path.iterdir())
