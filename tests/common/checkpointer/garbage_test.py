"""Old checkpoints go, and there is always one that is whole."""

import itertools
import os
import pathlib
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axlearn.common.checkpointer import (
    CorruptCheckpointError,
    checkpoint_paths,
    checkpoint_steps,
    cleanup_checkpoint,
    latest_checkpoint_path,
    latest_checkpoint_step,
    parse_step_from_dir,
    verify_checkpoint,
)
from axlearn.common.checkpointer._garbage import steps_to_delete
from tests.common.checkpointer.harness import Hooked, make_state, opened, save_steps, specs_of


@pytest.mark.parametrize(
    ("steps", "verified", "keep_last_n", "keep_every_n", "kept"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], 2, None, [3, 4]),
        ([1, 2, 3, 4], [3, 4], 2, None, [3, 4]),
        # The newest is all that is known: nothing goes.
        ([1, 2, 3, 4], [4], 2, None, [1, 2, 3, 4]),
        # What is not known to be whole does not count, and what is newer stays.
        ([1, 2, 3, 4], [1, 2, 4], 2, None, [2, 3, 4]),
        ([500, 1000, 1500, 2000, 2500], [500, 1000, 1500, 2000, 2500], 2, 1000, [1000, 2000, 2500]),
        # Steps that are no multiples: the first behind each multiple.
        ([700, 1400, 2100, 2800], [700, 1400, 2100, 2800], 2, 1000, [1400, 2100, 2800]),
        ([0, 1, 2, 3], [0, 1, 2, 3], 2, 2, [2, 3]),
    ],
)
def test_the_last_whole_ones_and_one_of_each_period_stay(steps, verified, keep_last_n, keep_every_n, kept):
    deletable = steps_to_delete(
        steps, verified_steps=verified, keep_last_n=keep_last_n, keep_every_n_steps=keep_every_n
    )
    assert [step for step in steps if step not in deletable] == kept


@settings(max_examples=200, deadline=None)
@given(
    steps=st.lists(st.integers(0, 60), unique=True).map(sorted),
    verified=st.sets(st.integers(0, 60)),
    keep_last_n=st.integers(2, 4),
    keep_every_n=st.none() | st.integers(1, 20),
)
def test_deleting_never_leaves_fewer_whole_ones_than_asked_for(steps, verified, keep_last_n, keep_every_n):
    deletable = steps_to_delete(
        steps, verified_steps=verified, keep_last_n=keep_last_n, keep_every_n_steps=keep_every_n
    )
    whole = verified & set(steps)
    kept = set(steps) - set(deletable)
    assert len(whole & kept) >= min(keep_last_n, len(whole))
    if deletable:
        newer_and_whole = [step for step in whole if step > max(deletable)]
        assert len(newer_and_whole) >= keep_last_n
    if keep_every_n is not None and steps:
        periods = {step // keep_every_n for step in steps} - {0}
        assert periods <= {step // keep_every_n for step in kept}
    again = steps_to_delete(
        sorted(kept), verified_steps=verified, keep_last_n=keep_last_n, keep_every_n_steps=keep_every_n
    )
    assert again == [], "what was kept once is kept"


def test_a_run_keeps_what_it_is_told_to(tmp_path):
    with opened(tmp_path, keep_last_n=2, keep_every_n_steps=3) as checkpointer:
        for step in range(1, 9):
            checkpointer.save(step=step, state=make_state(step))
    assert checkpoint_steps(tmp_path) == [3, 6, 7, 8]
    assert not list(tmp_path.glob("*.trash-*"))


def _num_whole(base_dir: pathlib.Path) -> int:
    num = 0
    for path in checkpoint_paths(base_dir):
        try:
            verify_checkpoint(path)
            num += 1
        except CorruptCheckpointError:
            pass
    return num


def test_there_is_a_whole_checkpoint_at_every_moment_even_if_the_newest_was_damaged(tmp_path):
    save_steps(tmp_path, 1, 2)
    seen = []

    def look(kind, path):
        if kind in ("rename", "remove_tree", "make_dir"):
            seen.append(_num_whole(tmp_path))

    with opened(tmp_path, keep_last_n=2, files=Hooked(look)) as checkpointer:
        checkpointer.restore(state=specs_of(make_state(2)))
        (tmp_path / "step_00000002/index").unlink()
        for step in range(3, 8):
            checkpointer.save(step=step, state=make_state(step))
            checkpointer.wait_until_finished()
            if step == 5:  # The newest of those that this very process wrote.
                (tmp_path / "step_00000005/gda/model/w/c/0/0").write_bytes(b"")
    assert len(seen) > 20
    assert min(seen) >= 1
    assert {6, 7} <= set(checkpoint_steps(tmp_path))


def test_one_that_was_damaged_since_does_not_count_among_those_that_stay(tmp_path):
    with opened(tmp_path, keep_last_n=2) as checkpointer:
        for step in (1, 2, 3, 4):
            checkpointer.save(step=step, state=make_state(step))
        checkpointer.wait_until_finished()
        checkpointer._garbage.stop()
        assert checkpoint_steps(tmp_path) == [3, 4]
        (tmp_path / "step_00000004/index").unlink()
        checkpointer.save(step=5, state=make_state(5))
    assert checkpoint_steps(tmp_path) == [3, 4, 5]


def test_a_checkpoint_loses_its_name_before_its_files(tmp_path):
    names = []

    def look(kind, path):
        if kind == "remove_tree":
            names.append((path.name.split("-")[0], checkpoint_steps(tmp_path)))

    with opened(tmp_path, keep_last_n=2, files=Hooked(look)) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step=step, state=make_state(step))
    assert names == [("step_00000001.trash", [2, 3])]


@pytest.mark.parametrize("operation", ["rename", "remove_tree"])
def test_deleting_that_fails_is_tried_again_and_does_not_stop_the_saves(tmp_path, caplog, operation):
    failures = itertools.count()

    def fail_twice(kind, path):
        if kind == operation and ".tmp-" not in path.name and next(failures) < 2:
            raise PermissionError(13, "Permission denied", str(path))

    with opened(
        tmp_path, keep_last_n=2, gc_loop_interval_seconds=0.01, files=Hooked(fail_twice)
    ) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step=step, state=make_state(step))
        checkpointer.wait_until_finished()
        deadline = time.monotonic() + 20
        while len(list(tmp_path.glob("step_*"))) > 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_00000002", "step_00000003"]
    assert "could not be deleted; it is tried again: [Errno 13] Permission denied" in caplog.text


def test_what_was_being_deleted_when_the_process_was_killed_is_swept(tmp_path):
    save_steps(tmp_path, 1, 2)
    (tmp_path / "step_00000001").rename(tmp_path / "step_00000001.trash-00")
    with opened(tmp_path) as checkpointer:
        checkpointer.restore(state=specs_of(make_state(2)))
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_00000002"]


def test_what_was_being_replaced_when_the_process_was_killed_gets_its_name_back(tmp_path):
    save_steps(tmp_path, 1)
    (tmp_path / "step_00000001").rename(tmp_path / "step_00000001.replaced-00")
    with opened(tmp_path) as checkpointer:
        assert checkpointer.restore(state=specs_of(make_state(1))).step == 1


def test_listing_is_in_the_order_of_steps(tmp_path):
    save_steps(tmp_path, 2, 10**8, 30)
    assert checkpoint_steps(tmp_path) == [2, 30, 10**8]
    assert latest_checkpoint_step(tmp_path) == 10**8
    assert latest_checkpoint_path(tmp_path) == str(tmp_path / "step_100000000")
    assert [parse_step_from_dir(path) for path in checkpoint_paths(tmp_path)] == [2, 30, 10**8]
    with pytest.raises(IndexError, match="there is no checkpoint"):
        latest_checkpoint_path(tmp_path / "none")


def test_a_checkpoint_that_is_deleted_while_others_are_listed_is_none(tmp_path, monkeypatch):
    save_steps(tmp_path, 1, 2)
    listdir = os.listdir

    def listdir_after_a_deletion(path):
        if str(path).endswith("step_00000001"):
            cleanup_checkpoint(path)
        return listdir(path)

    monkeypatch.setattr(os, "listdir", listdir_after_a_deletion)
    assert checkpoint_steps(tmp_path) == [2]


def test_only_a_checkpoint_can_be_cleaned_up(tmp_path):
    save_steps(tmp_path / "a", 1)
    (tmp_path / "step_00000001").symlink_to(tmp_path / "a/step_00000001")
    with pytest.raises(ValueError, match="this is a link"):
        cleanup_checkpoint(tmp_path / "step_00000001")
    with pytest.raises(ValueError, match="not the name of a checkpoint"):
        cleanup_checkpoint(tmp_path / "a")
    cleanup_checkpoint(tmp_path / "a/step_00000001")
    assert checkpoint_steps(tmp_path / "a") == []
