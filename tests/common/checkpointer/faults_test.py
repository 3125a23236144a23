"""A save that fails is told, costs nothing that was there, and the next one works."""

import errno
import io
import os
import pathlib
import shutil
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest

from axlearn.common.checkpointer import (
    CheckpointSaveError,
    DirectoryInUseError,
    TensorStoreStateStorage,
    load_checkpoint,
    verify_checkpoint,
)
from axlearn.common.checkpointer._file_ops import FileOps
from tests.common.checkpointer.harness import (
    Gate,
    Hooked,
    all_files,
    assert_same,
    make_state,
    one_device,
    opened,
    save_steps,
    specs_of,
)


def _env_of_a_script() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).resolve().parents[3])}


class Failing(Hooked):
    """Fails at one operation, counted from 0; -1: never."""

    def __init__(self, error: Exception, *, at: int = -1):
        super().__init__(self._count)
        self.num_ops = 0
        self.at = at
        self._error = error

    def _count(self, kind: str, path: pathlib.Path) -> None:
        self.num_ops += 1
        if self.num_ops - 1 == self.at:
            raise self._error


def _num_ops_of_a_save(base_dir: pathlib.Path) -> int:
    files = Failing(OSError())
    with opened(base_dir, files=files) as checkpointer:
        checkpointer.save(step=1, state=make_state(1))
    return files.num_ops


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_full_or_broken_disk_at_any_moment_costs_one_checkpoint(tmp_path, code):
    num_ops = _num_ops_of_a_save(tmp_path / "count")
    assert num_ops > 20
    specs = specs_of(make_state(1))
    # Every other operation, and the last one.
    for at in sorted({*range(0, num_ops, 2 if code == errno.ENOSPC else 9), num_ops - 1}):
        base_dir = tmp_path / str(at)
        shutil.copytree(tmp_path / "count", base_dir)
        files = Failing(OSError(code, os.strerror(code), str(base_dir / "the-file")), at=at)
        with opened(base_dir, files=files) as checkpointer:
            checkpointer.restore(state=specs)
            checkpointer.save(step=2, state=make_state(2))
            with pytest.raises(CheckpointSaveError) as e:
                checkpointer.wait_until_finished()
            assert e.value.step == 2
            assert "the-file" in str(e.value)
            assert not list(base_dir.glob("*.tmp-*")), "room is made"
            # The last operation makes a checkpoint durable that is there already.
            newest = 2 if at == num_ops - 1 else 1
            step, restored = checkpointer.restore(state=specs)
            assert step == newest
            assert_same(restored, make_state(newest))
            checkpointer.save(step=3, state=make_state(3))
            checkpointer.wait_until_finished()
            assert checkpointer.restore(state=specs).step == 3


def test_the_message_of_a_failed_save_says_what_is_left_and_what_to_do(tmp_path):
    save_steps(tmp_path, 100)
    files = Failing(OSError(errno.ENOSPC, "No space left on device", f"{tmp_path}/x"), at=4)
    with opened(tmp_path, files=files) as checkpointer:
        checkpointer.save(step=200, state=make_state(2))
        with pytest.raises(CheckpointSaveError) as e:
            checkpointer.wait_until_finished()
    assert str(e.value) == (
        "checkpoint of step 200: It could not be written: [Errno 28] No space left on device: "
        f"'{tmp_path}/x'.\n"
        "  Earlier checkpoints are as they were, the newest is step_00000100. Free space on the disk; "
        "the next save tries again."
    )


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_an_error_inside_of_a_write_names_the_file(tmp_path, monkeypatch, call):
    class Full:
        def __init__(self, f):
            self._f = f

        def __getattr__(self, name):
            return getattr(self._f, name)

        def __enter__(self):
            self._f.__enter__()
            return self

        def __exit__(self, *args):
            return self._f.__exit__(*args)

        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    def fail(fd):
        raise OSError(errno.EIO, "Input/output error")

    if call == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        real_open = open
        monkeypatch.setattr("builtins.open", lambda *args, **kwargs: Full(real_open(*args, **kwargs)))
    with pytest.raises(OSError, match=r"\[Errno (28|5)\] .*'.*/x'"):
        FileOps().write_file(tmp_path / "x", b"data")


def test_a_write_that_takes_only_a_part_is_continued(tmp_path, monkeypatch):
    real_write = io.FileIO.write

    class Slow(io.FileIO):
        def write(self, data):
            return real_write(self, bytes(data[:3]))

    monkeypatch.setattr("builtins.open", lambda path, mode, buffering: Slow(path, mode.replace("b", "")))
    FileOps().write_file(tmp_path / "x", b"0123456789")
    assert (tmp_path / "x").read_bytes() == b"0123456789"


def test_any_exception_in_the_background_surfaces_at_the_next_call_and_training_goes_on(tmp_path):
    files = Failing(ZeroDivisionError("a bug"), at=3)
    with opened(tmp_path, files=files) as checkpointer:
        checkpointer.save(step=1, state=make_state(1))
        checkpointer._save_under_way.join()
        # The save that tells of the failure is under way all the same.
        with pytest.raises(
            CheckpointSaveError, match="step 1: It could not be written: ZeroDivisionError: a bug"
        ):
            checkpointer.save(step=2, state=make_state(2))
        checkpointer.wait_until_finished()
        assert checkpointer.restore(state=specs_of(make_state(2))).step == 2


def test_a_failure_surfaces_also_where_no_save_is_due(tmp_path):
    files = Failing(OSError(errno.EIO, "Input/output error"), at=3)
    with opened(tmp_path, files=files) as checkpointer:
        checkpointer.save(step=1, state=make_state(1))
        checkpointer._save_under_way.join()
        with pytest.raises(CheckpointSaveError):
            checkpointer.is_due(step=2)
        assert checkpointer.is_due(step=3), "it is told once"


def test_a_failure_of_the_last_save_is_not_lost_at_stop(tmp_path, caplog):
    files = Failing(OSError(errno.EIO, "Input/output error"), at=3)
    with pytest.raises(CheckpointSaveError), opened(tmp_path, files=files) as checkpointer:
        checkpointer.save(step=1, state=make_state(1))
    # Where an exception is on its way already, that one stays.
    files = Failing(OSError(errno.EIO, "Input/output error"), at=3)
    with pytest.raises(KeyError), opened(tmp_path, files=files) as checkpointer:  # noqa: PT012
        checkpointer.save(step=1, state=make_state(1))
        raise KeyError
    assert "checkpoint of step 1: It could not be written" in caplog.text


def test_what_is_written_wrongly_never_gets_a_name(tmp_path):
    class Corrupting(FileOps):
        def write_file(self, path, data):
            super().write_file(path, data[:-1] + b"?" if path.parent.name == "c" else data)

    with opened(tmp_path, files=Corrupting()) as checkpointer:
        checkpointer.save(step=1, state=make_state(1))
        with pytest.raises(CheckpointSaveError, match="does not hold what was written"):
            checkpointer.wait_until_finished()
    assert not list(tmp_path.glob("step_*"))


def test_save_returns_while_the_disk_is_slow_and_the_next_one_waits(tmp_path):
    gate = Gate()
    with opened(tmp_path, files=gate) as checkpointer:
        started_at = time.monotonic()
        checkpointer.save(step=1, state=make_state(1))
        assert time.monotonic() - started_at < 5
        assert not checkpointer._save_under_way.join(timeout=0.05)
        assert checkpointer._save_under_way.is_alive()
        assert not list(tmp_path.glob("step_????????"))
        gate.open()
        checkpointer.save(step=2, state=make_state(2))
        assert (tmp_path / "step_00000001").is_dir(), "one save at a time"


def test_while_a_save_is_under_way_its_folder_says_so(tmp_path):
    seen = []

    def look(kind, path):
        seen.append((kind, [p.name.split("-")[0] for p in tmp_path.glob("step_*")]))

    with opened(tmp_path, files=Hooked(look)) as checkpointer:
        checkpointer.save(step=7, state=make_state(7))
    assert seen[0] == ("make_dir", [])
    assert all(names == ["step_00000007.tmp"] for _, names in seen[1:-1])
    assert seen[-1] == ("sync_dir", ["step_00000007"])


def test_waiting_for_a_disk_that_hangs_ends_with_the_step_and_the_time(tmp_path):
    gate = Gate()
    storage = TensorStoreStateStorage.default_config().set(timeout_secs=0.05)
    with opened(tmp_path, files=gate, storage=storage) as checkpointer:
        checkpointer.save(step=9, state=make_state(9))
        message = r"checkpoint of step 9: .*\n.*at most checkpointer.storage.timeout_secs=0.05 s"
        for _ in range(2):
            with pytest.raises(TimeoutError, match=message):
                checkpointer.wait_until_finished()
        gate.open()
        checkpointer._save_under_way.join()


def test_a_process_that_ends_without_stop_ends_after_its_save(tmp_path):
    script = f"""
        import numpy as np
        from axlearn.common.checkpointer import Checkpointer
        checkpointer = Checkpointer.default_config().set(name="c", dir={str(tmp_path)!r}).instantiate(parent=None)
        checkpointer.save(step=1, state={{"x": np.zeros(3)}})
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, env=_env_of_a_script())
    verify_checkpoint(tmp_path / "step_00000001")


def test_a_checkpoint_whose_successor_cannot_have_its_name_keeps_it(tmp_path):
    save_steps(tmp_path, 1)
    refused = []

    def refuse_the_rename_from_tmp(kind: str, path: pathlib.Path) -> None:
        if kind == "rename" and ".tmp-" in path.name and not refused:
            refused.append(path)
            raise OSError(errno.EIO, "Input/output error", str(path))

    with opened(tmp_path, files=Hooked(refuse_the_rename_from_tmp)) as checkpointer:
        checkpointer.save(step=1, state=make_state(2))
        with pytest.raises(CheckpointSaveError, match="the newest is step_00000001"):
            checkpointer.wait_until_finished()
        assert_same(checkpointer.restore(state=specs_of(make_state(1))).state, make_state(1))


# One writer.


def test_a_second_writer_is_refused_and_a_reader_is_not(tmp_path):
    state = make_state(1)
    with opened(tmp_path) as first:
        first.save(step=1, state=state)
        first.wait_until_finished()
        with opened(tmp_path) as second:
            for use in (second.restore, lambda state: second.save(step=2, state=make_state(2))):
                with pytest.raises(DirectoryInUseError, match=rf"{os.getpid()}, this one"):
                    use(state=specs_of(state))
        with one_device():
            assert load_checkpoint(tmp_path, state=specs_of(state)).step == 1
    with opened(tmp_path) as third:
        assert third.restore(state=specs_of(state)).step == 1


def test_the_lease_of_a_process_that_was_killed_is_free(tmp_path):
    script = f"""
        import pathlib, sys, time
        from axlearn.common.checkpointer._lease import WriterLease
        WriterLease(pathlib.Path({str(tmp_path)!r})).acquire()
        print("held", flush=True)
        time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=_env_of_a_script()) as process:
        assert process.stdout.readline() == "held\n"
        with opened(tmp_path) as checkpointer:
            with pytest.raises(DirectoryInUseError, match=rf"\(process {process.pid} on .* since 20"):
                checkpointer.restore(state={})
            process.kill()
            process.wait()
            assert checkpointer.restore(state={}).step is None


def test_a_disk_that_has_no_room_for_the_holders_name_is_swept_all_the_same(tmp_path, monkeypatch, caplog):
    leftover = tmp_path / "step_00000002.tmp-00000000deadbeef"
    leftover.mkdir()

    def no_room(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", no_room)
    with opened(tmp_path) as first, opened(tmp_path) as second:
        assert first.restore(state={}).step is None
        with pytest.raises(DirectoryInUseError):
            second.restore(state={})
    assert not leftover.exists()
    assert "cannot say who holds it ([Errno 28] No space left on device)" in caplog.text


def test_leftovers_that_cannot_be_removed_are_an_error_until_they_can(tmp_path, monkeypatch):
    leftover = tmp_path / "step_00000002.tmp-00000000deadbeef"
    leftover.mkdir()

    def refuse(path, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with opened(tmp_path) as checkpointer:
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "rmtree", refuse)
            for _ in range(2):
                with pytest.raises(PermissionError, match="deadbeef"):
                    checkpointer.restore(state={})
        assert checkpointer.restore(state={}).step is None
    assert not leftover.exists()


def test_a_folder_that_cannot_be_made_is_an_error_in_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with opened(tmp_path / "file" / "checkpoints") as checkpointer, pytest.raises(OSError) as e:
        checkpointer.restore(state={})
    assert f"{tmp_path}/file/checkpoints: Checkpoints cannot be written here (Not a directory)" in str(
        e.value
    )


# Others' files.


def test_names_that_are_not_ours_are_left_alone(tmp_path):
    base_dir, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    save_steps(base_dir, 1)
    save_steps(elsewhere, 8)
    others = [
        "step_junk",
        "step_7",
        "step_00000009",
        "foo.tmp-00",
        "step_00000003.tmp-NOTHEX",
        "step_0000000\uff11",
    ]
    for name in others:
        (base_dir / name).mkdir()
    (base_dir / "step_junk/index").write_text("[]")
    (base_dir / "step_00000007").write_text("a file")
    (base_dir / "step_00000008").symlink_to(elsewhere / "step_00000008")
    (base_dir / "step_00000006.tmp-0123456789abcdef").symlink_to(elsewhere)
    (base_dir / "step_00000005.tmp-0123456789abcdef").mkdir()
    linked = {path: path.read_bytes() for path in all_files(elsewhere)}
    with opened(base_dir) as checkpointer:
        assert checkpointer.restore(state=specs_of(make_state(1))).step == 1
        assert not (base_dir / "step_00000005.tmp-0123456789abcdef").exists(), "this one is ours"
        for step in (7, 8, 9, 10):
            checkpointer.save(step=step, state=make_state(step))
        checkpointer.wait_until_finished()
        assert checkpointer.restore(state=specs_of(make_state(1))).step == 10
    assert {path: path.read_bytes() for path in all_files(elsewhere)} == linked
    assert all((base_dir / name).is_dir() for name in others if name != "step_00000009")
    names = sorted(path.name for path in base_dir.glob("step_????????") if path.name[5:].isascii())
    assert names == ["step_00000009", "step_00000010"]


def test_what_a_killed_attempt_on_another_mesh_left_is_swept_before_the_next(tmp_path):
    leftover = tmp_path / "step_00000002.tmp-00000000deadbeef" / "gda/model/w/c"
    leftover.mkdir(parents=True)
    (leftover / "0").write_bytes(b"another shape")
    with opened(tmp_path) as checkpointer:
        assert checkpointer.restore(state=specs_of(make_state(2))).step is None
        checkpointer.save(step=2, state=make_state(2))
        checkpointer.wait_until_finished()
        assert_same(checkpointer.restore(state=specs_of(make_state(2))).state, make_state(2))


def test_a_tree_of_nothing_is_a_checkpoint_too(tmp_path):
    with opened(tmp_path) as checkpointer:
        checkpointer.save(step=1, state={"a": {}, "b": None})
        checkpointer.wait_until_finished()
        assert checkpointer.restore(state={"a": {}, "b": None}) == (1, {"a": {}, "b": None})


def test_threads_and_files_do_not_pile_up(tmp_path):
    def num_open(checkpointer) -> tuple[int, int]:
        checkpointer.wait_until_finished()
        checkpointer._garbage.stop()
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    with opened(tmp_path) as checkpointer:
        state = {"x": np.zeros(3)}
        for step in range(2):
            checkpointer.save(step=step, state=state, force=True)
        before = num_open(checkpointer)
        for step in range(2, 12):
            checkpointer.save(step=step, state=state)
        assert num_open(checkpointer) == before
