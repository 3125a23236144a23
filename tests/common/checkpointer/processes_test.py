"""Several real processes save and restore: each its own parts, and all to the same end."""

import pathlib
import shutil
import signal

import jax
import pytest

from axlearn.common.checkpointer import Checkpointer, verify_checkpoint
from axlearn.common.checkpointer._manifest import read_manifest
from tests.common.checkpointer import processes_worker as worker
from tests.processes_harness import Outcome, run_processes, start_processes

_WORKER = "tests.common.checkpointer.processes_worker"


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder of a run of two processes, and what each of them had to say."""
    folder = tmp_path_factory.mktemp("processes")
    _in_one_process(folder / "from-one", saves=[1, 2, 3])
    folders = {"base_dir": "run", "from_one": "from-one", "scratch": "scratch"}
    outcomes = run_processes(
        f"{_WORKER}:run_all",
        num_processes=2,
        num_devices=2,
        arguments={name: str(folder / value) for name, value in folders.items()},
    )
    return folder, [outcome.result for outcome in outcomes]


def _in_one_process(base_dir: pathlib.Path, *, saves: list[int]) -> None:
    """Saves from this process, over its eight devices."""
    worker.save(str(base_dir), seeds=saves)


def test_each_process_writes_its_part_and_another_number_of_processes_restores_it(done, tmp_path):
    folder, results = done
    for result in results:
        assert result["fresh"] == [None, False]
        assert result["saved"] == [".writer", "step_00000001", "step_00000002"]
        assert result["restored"] == [2, True]
        # One process of eight devices had saved it.
        assert result["from_one"] == [3, True]
    shutil.copytree(folder / "run" / "step_00000002", tmp_path / "step_00000002")
    verify_checkpoint(tmp_path / "step_00000002")
    assert worker.restore(str(tmp_path)) == [2, True]


def test_what_is_on_disk_is_what_one_process_would_write(done, tmp_path):
    folder, _ = done
    mesh_devices = jax.devices()[:4]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: mesh_devices)
        _in_one_process(tmp_path, saves=[2])
    name = "step_00000002"
    by_two, by_one = folder / "run" / name, tmp_path / name
    for path in sorted(by_one.rglob("*")):
        if path.is_file():
            assert (by_two / path.relative_to(by_one)).read_bytes() == path.read_bytes()
    assert len(list(by_two.rglob("*"))) == len(list(by_one.rglob("*")))


def test_each_part_is_written_once_by_a_process_that_has_it_and_copies_share_the_work(done):
    _, results = done
    first, second = (result["chunks"] for result in results)
    assert first == [
        *("learner/both/c/0/0", "learner/both/c/1/0", "local/c/0"),
        *("model/columns/c/0/0",),
    ]
    # Process 0 has copies of "rows" and of "count" too.
    assert second == [
        *("learner/both/c/2/0", "learner/both/c/3/0"),
        *("model/columns/c/0/1", "model/rows/c/0/0", "model/rows/c/1/0"),
    ]


def test_the_work_of_verifying_is_divided(done):
    folder, results = done
    manifest = read_manifest(folder / "run" / "step_00000002", step=2)
    first, second = (result["hashed"] for result in results)
    assert sorted(first + second) == sorted(manifest.files)
    assert abs(len(first) - len(second)) <= 1


def test_all_processes_fall_back_to_the_same_step_and_refuse_to_start_anew_together(done):
    _, results = done
    for result in results:
        damaged = result["damaged"]
        assert damaged["first"] == [2, True]
        assert damaged["after_first"] == [
            ".writer",
            "step_00000001",
            "step_00000002",
            "step_00000003.corrupt-hash-mismatch",
        ]
        assert damaged["second"][0] == "CorruptCheckpointError"
        assert "step_00000002/gda/model/columns/c/" in damaged["second"][1]
        assert damaged["third"][0] == "NoUsableCheckpointError"
        assert "gda/learner/both/c/" in damaged["third"][1]
        assert damaged["at_last"] == [
            ".writer",
            *(f"step_0000000{step}.corrupt-hash-mismatch" for step in (1, 2, 3)),
        ]


def test_a_save_that_fails_on_one_process_fails_on_all_and_leaves_nothing(done):
    folder, results = done
    before = [".writer", "step_00000001", "step_00000002"]
    for result in results:
        failed = result["failed"]
        assert failed["full"][0] == failed["differing"][0] == "CheckpointSaveError"
        assert "No space left on device" in failed["full"][1]
        assert "Free space on the disk" in failed["full"][1]
        assert "the newest is step_00000002" in failed["full"][1]
        assert "input_iter on process 1 differs from that on process 0" in failed["differing"][1]
        assert failed["after_full"] == failed["after_differing"] == before
        assert failed["at_last"] == [*before, "step_00000007"]
    assert "(on process 1)" in results[0]["failed"]["full"][1]
    verify_checkpoint(folder / "run" / "step_00000007")


def test_what_one_process_is_refused_all_are(done):
    _, results = done
    for result in results:
        refused = result["refused"]
        assert refused["second"][0] == "DirectoryInUseError"
        assert refused["mismatch"][0] == "CheckpointMismatchError"
        assert "model/rows" in refused["mismatch"][1]
        assert refused["missing"][0] == "ValueError"
        assert "one of 1, 2" in refused["missing"][1]
        for case in ("apart", "copied"):
            assert refused[case][0] == "FileNotFoundError"
            assert "Process 1 does not see what process 0 has here" in refused[case][1]
            assert "file system that all processes share" in refused[case][1]
        # A folder that is not shared is no damage.
        assert refused["kept"] == [".writer", "step_00000001", "step_00000002"]


def _kill_during_save(base_dir: pathlib.Path, *, victim: int) -> Outcome:
    """Kills one of two processes during the save of step 2; returns how the other one ended."""
    arguments = {"base_dir": str(base_dir), "victim": victim}
    with start_processes(
        f"{_WORKER}:die_during_save", num_processes=2, num_devices=2, arguments=arguments
    ) as processes:
        outcomes = processes.wait(timeout_seconds=120)
    assert outcomes[victim].status == -signal.SIGKILL, outcomes[victim].output
    assert worker.restore(str(base_dir)) == [1, True]
    assert sorted(path.name for path in base_dir.iterdir()) == [".writer", "step_00000001"]
    return outcomes[1 - victim]


def test_a_process_that_is_killed_during_a_save_is_missed_in_time(tmp_path):
    other = _kill_during_save(tmp_path, victim=1)
    assert other.status == 0, other.output
    assert other.result[0] == "CheckpointSaveError"
    assert "process 1 of 2 did not come within 2 s" in other.result[1]


@pytest.mark.slow
def test_where_process_0_is_killed_during_a_save_jax_ends_the_others(tmp_path):
    assert _kill_during_save(tmp_path, victim=0).status != 0


@pytest.mark.slow
def test_four_processes_save_and_two_restore(tmp_path):
    steps = [(4, 2, None, 1), (2, 4, 1, 2), (4, 2, 2, None)]
    for num_processes, num_devices, restores, saves in steps:
        outcomes = run_processes(
            f"{_WORKER}:run_steps",
            num_processes=num_processes,
            num_devices=num_devices,
            arguments={"base_dir": str(tmp_path), "restores": restores, "saves": saves},
        )
        for outcome in outcomes:
            assert outcome.result[0] == (None if restores is None else [restores, True])
    assert worker.restore(str(tmp_path)) == [2, True]


def test_a_time_to_wait_for_others_is_more_than_nothing(tmp_path):
    cfg = Checkpointer.default_config().set(name="checkpointer", dir=str(tmp_path), peer_timeout_seconds=0)
    with pytest.raises(ValueError, match=r"checkpointer\.peer_timeout_seconds: 0"):
        cfg.instantiate(parent=None)
