"""Processes on this machine: their places and devices, their lines, their ends. The children are shells."""

import io
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from axlearn.launch.local import child_environments, gpu_ids, run_local

ROOT = pathlib.Path(__file__).resolve().parents[2]


def _run(script: str, *, num_processes: int = 3) -> tuple[int, list[str], float]:
    out, started_at = io.StringIO(), time.monotonic()
    status = run_local(["sh", "-c", script], num_processes=num_processes, out=out)
    return status, out.getvalue().splitlines(), time.monotonic() - started_at


def test_each_has_its_place_and_its_lines_carry_its_number():
    status, lines, _ = _run("echo $PROCESS_ID of $NUM_PROCESSES at $DISTRIBUTED_COORDINATOR; printf end >&2")
    assert status == 0
    assert sorted(line for line in lines if "end" in line) == ["[0] end", "[1] end", "[2] end"]
    places = sorted(line for line in lines if " of " in line)
    addresses = {line.rpartition(" at ")[2] for line in places}
    assert [line.rpartition(" at ")[0] for line in places] == ["[0] 0 of 3", "[1] 1 of 3", "[2] 2 of 3"]
    assert len(addresses) == 1
    assert next(iter(addresses)).startswith("localhost:")


def test_when_one_fails_all_end_with_its_status_and_its_last_lines_are_shown_again(capfd):
    status, lines, seconds = _run('[ $PROCESS_ID = 1 ] && echo bad >&2 && exit 7; sleep 0.5; echo "I saw"')
    assert (status, sorted(lines)) == (7, ["[0] I saw", "[1] bad", "[2] I saw"])
    assert capfd.readouterr().err == "Process 1 of 3 ended first, with status 7. Its last lines:\n  bad\n"
    assert seconds < 4


def test_those_that_do_not_end_by_themselves_are_ended(capfd, monkeypatch):
    monkeypatch.setattr("axlearn.launch.local._PATIENCE_SECONDS", 0.5)
    # Process 2 does not listen to SIGTERM either.
    status, _, seconds = _run(
        "[ $PROCESS_ID = 1 ] && kill -9 $$; [ $PROCESS_ID = 2 ] && trap '' TERM; sleep 60 & wait; sleep 60"
    )
    assert status == 137
    assert "Process 1 of 3 ended first, with signal 9 (SIGKILL)." in capfd.readouterr().err
    assert seconds < 5


def _is_running(pid: int) -> bool:
    """Whether there is such a process, and not only its entry for a parent that has not asked for its end."""
    try:
        return (
            pathlib.Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
        )
    except OSError:
        return False


def test_what_an_ended_process_left_behind_is_ended(capfd):
    status, lines, _ = _run("sleep 60 & echo $!; [ $PROCESS_ID = 1 ] && exit 7; sleep 0.2", num_processes=2)
    assert status == 7
    pids = [int(line.split()[1]) for line in lines]
    assert len(pids) == 2
    deadline = time.monotonic() + 5
    while any(map(_is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(_is_running, pids))
    capfd.readouterr()


class _FullAfterALine(io.StringIO):
    """Takes one line, as `head -1` does."""

    def write(self, text: str) -> int:
        if self.getvalue():
            raise BrokenPipeError("nobody reads this")
        return super().write(text)


def test_when_nobody_reads_their_lines_all_are_asked_once_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr("axlearn.launch.local._PATIENCE_SECONDS", 0.3)
    # More lines than a pipe holds: who is not read waits, here not for ever. Process 1 saves for longer than 0.
    script = (
        "(sleep 20; kill -9 $$) & "
        f"trap 'echo asked >> {tmp_path}/$PROCESS_ID; sleep $PROCESS_ID; "
        f"echo saved >> {tmp_path}/$PROCESS_ID; exit 143' TERM; "
        f"cd {tmp_path}; touch ready$PROCESS_ID; until [ -e ready0 ] && [ -e ready1 ]; do sleep 0.02; done; "
        "i=0; while [ $i -lt 9000 ]; do i=$((i+1)); echo line $i; done; "
        "while :; do sleep 0.05; done"
    )
    with pytest.raises(BrokenPipeError, match="nobody reads this"):
        run_local(["sh", "-c", script], num_processes=2, out=_FullAfterALine())
    said = [(tmp_path / f"{i}").read_text(encoding="utf-8") for i in range(2)]
    assert said == ["asked\nsaved\n"] * 2


@pytest.fixture
def hangup_ends() -> Iterator[None]:
    """What is started meanwhile is not started as by nohup, even where the tests are."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_passed_on_to_all(signum, hangup_ends):
    script = "trap 'echo $PROCESS_ID saves; exit 143' TERM INT; echo ready; while :; do sleep 0.05; done"
    launcher = subprocess.Popen(
        [
            *(sys.executable, "-m", "axlearn.cli.main", "launch", "local", "--num_processes=2", "--"),
            *("sh", "-c", script),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert launcher.stdout is not None
    assert sorted(launcher.stdout.readline() for _ in range(2)) == ["[0] ready\n", "[1] ready\n"]
    launcher.send_signal(signum)
    out, err = launcher.communicate(timeout=30)
    assert sorted(out.splitlines()) == ["[0] 0 saves", "[1] 1 saves"]
    # Nothing went wrong that would have to be explained.
    assert (launcher.returncode, err) == (143, "")


def test_cpu_devices_are_those_that_are_asked_for():
    env = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_foo=1"}
    children = child_environments(env, num_processes=2, devices_per_process=3, gpus=[], port=9)
    patience = "--xla_cpu_collective_call_terminate_timeout_seconds=600"
    assert {child["XLA_FLAGS"] for child in children} == {
        f"--xla_foo=1 --xla_force_host_platform_device_count=3 {patience}"
    }
    (child,) = child_environments(env, num_processes=1, devices_per_process=None, gpus=[], port=9)
    assert child["XLA_FLAGS"] == f"{env['XLA_FLAGS']} {patience}"
    assert child["DISTRIBUTED_COORDINATOR"] == "localhost:9"


def test_gpus_are_shared_out(tmp_path):
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidia1", "nvidia10", "nvidia2", "nvidiactl"):
        (tmp_path / "dev" / name).touch()
    assert gpu_ids({}, root=tmp_path) == ["0", "1", "2", "10"]
    assert gpu_ids({"CUDA_VISIBLE_DEVICES": "3,1"}, root=tmp_path) == ["3", "1"]
    assert gpu_ids({"CUDA_VISIBLE_DEVICES": "GPU-8f2, MIG-1c0"}, root=tmp_path) == ["GPU-8f2", "MIG-1c0"]
    for none in ("", "-1", "NoDevFiles", "none"):
        assert gpu_ids({"CUDA_VISIBLE_DEVICES": none}, root=tmp_path) == []
    assert gpu_ids({"CUDA_VISIBLE_DEVICES": "2,-1,3"}, root=tmp_path) == ["2"]
    assert gpu_ids({"JAX_PLATFORMS": "cpu"}, root=tmp_path) == []
    gpus = ["0", "1", "2", "3"]
    shared = child_environments({}, num_processes=2, devices_per_process=None, gpus=gpus, port=9)
    assert [child["CUDA_VISIBLE_DEVICES"] for child in shared] == ["0,1", "2,3"]
    single = child_environments({}, num_processes=2, devices_per_process=1, gpus=gpus, port=9)
    assert [child["CUDA_VISIBLE_DEVICES"] for child in single] == ["0", "1"]
    with pytest.raises(ValueError, match=r"5 processes of 1 need more than the 4 GPUs here"):
        child_environments({}, num_processes=5, devices_per_process=None, gpus=gpus, port=9)


def test_numbers_that_are_none_are_refused():
    with pytest.raises(ValueError, match=r"--num_processes: 0\.\n  Expected at least 1"):
        run_local(["true"], num_processes=0)
    with pytest.raises(ValueError, match=r"--devices_per_process: -1"):
        run_local(["true"], num_processes=1, devices_per_process=-1)
    with pytest.raises(FileNotFoundError):
        run_local(["no-such-command"], num_processes=2)
