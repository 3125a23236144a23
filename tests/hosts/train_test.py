"""Real processes train one model: another number of them goes on from their checkpoint, and nothing differs.

They are started by `axlearn launch local`, each with CPU devices of its own, and talk through gloo.
"""

import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

from axlearn.common.checkpointer import open_checkpoint
from tests.launcher import QUICK_COMPILES, command, environment

HALF, END = 4, 8


def _environment(work: pathlib.Path, **more: str) -> dict[str, str]:
    env = environment(
        paths=(pathlib.Path(__file__).parent,),
        HOSTS_TEST_TEXT=str(work / "text"),
        JAX_PLATFORMS="cpu",
        **more,
    )
    # The launcher says how many devices.
    env["XLA_FLAGS"] = QUICK_COMPILES
    return env


def _start(
    run: pathlib.Path, *, recipe: str, processes: int, devices: int, max_step: int = END, **more: str
) -> subprocess.Popen[str]:
    rows = run.parent / f"{run.name}-rows"
    rows.mkdir(exist_ok=True)
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "axlearn.cli.main", "launch", "local"),
            *(f"--num_processes={processes}", f"--devices_per_process={devices}", "--"),
            *command("--module=hosts_recipe", f"--config={recipe}", f"--trainer_dir={run}"),
            *("--set", f"max_step={max_step}", "--set", f"checkpointer.save_policy.n={HALF}"),
            *("--heartbeat_timeout=10", "--trainer_log_every_n_steps=100"),
        ],
        env=_environment(run.parent, HOSTS_TEST_ROWS=str(rows), **more),
        cwd=run.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _train(run: pathlib.Path, **kwargs: Any) -> str:
    process = _start(run, **kwargs)
    output = _rest_of(process)
    assert process.returncode == 0, output
    return output


def _losses(run: pathlib.Path) -> dict[int, float]:
    records = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def _batches(run: pathlib.Path) -> dict[int, dict[int, str]]:
    """The digest of each row of each batch, by step and place; who read the same row must have read the same."""
    batches: dict[int, dict[int, str]] = {}
    for path in sorted((run.parent / f"{run.name}-rows").iterdir()):
        for record in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            batch = batches.setdefault(record["step"], {})
            for i, digest in enumerate(record["rows"], start=record["first_row"]):
                assert batch.setdefault(i, digest) == digest, (path, record["step"], i)
    return batches


def _arrays(run: pathlib.Path, step: int) -> dict[str, bytes]:
    reader = open_checkpoint(run / "checkpoints", step=step)
    return {path: reader.read(path).tobytes() for path in reader.arrays}


def _check_that_two_processes_continue_what_four_began(work: pathlib.Path, *, recipe: str) -> None:
    four, two = work / "four", work / "two"
    _train(four, recipe=recipe, processes=4, devices=2)
    assert [p.name for p in sorted((four / "checkpoints").glob("step_*"))] == [
        "step_00000004",
        "step_00000008",
    ]
    shutil.copytree(four, two)
    shutil.rmtree(two / "checkpoints" / f"step_{END:08d}")
    (two / "metrics.jsonl").unlink()
    output = _train(two, recipe=recipe, processes=2, devices=4)
    # One process speaks for all.
    assert output.count(f"Continuing from step {HALF}.") == 1
    assert sorted(_losses(two)) == list(range(HALF + 1, END + 1))
    whole = {i for batch in _batches(four).values() for i in batch}
    for step, loss in _losses(two).items():
        assert loss == pytest.approx(_losses(four)[step], rel=1e-6), step
        assert _batches(two)[step] == _batches(four)[step]
        assert set(_batches(two)[step]) == whole == set(range(8))
    _check_equal(_arrays(two, END), _arrays(four, END))


def _check_equal(these: dict[str, bytes], those: dict[str, bytes]) -> None:
    assert these.keys() == those.keys()
    different = [path for path in these if these[path] != those[path]]
    assert not different


def test_two_processes_of_four_devices_continue_what_four_of_two_began(tmp_path):
    _check_that_two_processes_continue_what_four_began(tmp_path, recipe="hosts-tiny")


@pytest.mark.slow
def test_two_processes_of_four_devices_continue_fuji_on_text_that_four_of_two_began(tmp_path):
    texts = tmp_path / "text"
    texts.mkdir()
    rng, words = random.Random(7), ["def", "return", "self", "value", "for", "in", "if", "x", "y", "z"]
    for i in range(40):
        lines = [" ".join(rng.choices(words, k=8)) for _ in range(12)]
        (texts / f"doc_{i:02d}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _check_that_two_processes_continue_what_four_began(tmp_path, recipe="hosts-fuji")


def _wait_for(process: subprocess.Popen[str], text: str) -> str:
    """Reads the output up to a line with `text`, and returns it."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return "".join(lines)
    raise AssertionError("".join(lines))


def _rest_of(process: subprocess.Popen[str]) -> str:
    """Reads the output to its end, and waits. (`communicate` would miss what is read ahead.)"""
    assert process.stdout is not None
    rest = process.stdout.read()
    process.wait()
    return rest


def _pid_of(process_id: int, run: pathlib.Path) -> int:
    """The process of a run that has this place in it."""
    for path in pathlib.Path("/proc").iterdir():
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
            env = (path / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"--trainer_dir={run}".encode() in words and f"PROCESS_ID={process_id}".encode() in env:
            return int(path.name)
    raise AssertionError(f"process {process_id} is not there")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_sigterm_to_one_process_saves_one_step_in_all(tmp_path, victim):
    run = tmp_path / "run"
    process = _start(run, recipe="hosts-tiny", processes=2, devices=4, max_step=100_000)
    output = _wait_for(process, "step 5/")
    os.kill(_pid_of(victim, run), signal.SIGTERM)
    output += _rest_of(process)
    assert process.returncode == 143, output
    newest = sorted((run / "checkpoints").glob("step_????????"))[-1]
    said = f"Stopped by SIGTERM after step {int(newest.name[5:])}, which is saved."
    assert re.findall(r"Stopped by SIGTERM.*", output) == [said, said], output
    # That is no failure that would have to be explained.
    assert "ended first" not in output


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_failure_of_one_process_ends_all_with_its_words(tmp_path, victim):
    process = _start(
        tmp_path / "run", recipe="hosts-tiny", processes=2, devices=4, HOSTS_TEST_FAIL=f"{victim}:6"
    )
    output = _rest_of(process)
    assert process.returncode == 1, output
    assert f"[{victim}] cannot read the batch of step 6" in output
    assert f"[{1 - victim}] Process {victim} of 2 failed, and all end with it. It said:" in output


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others_within_the_heartbeat(tmp_path, victim):
    run = tmp_path / "run"
    process = _start(run, recipe="hosts-tiny", processes=2, devices=4, max_step=100_000)
    output = _wait_for(process, "step 5/")
    survivor = _pid_of(1 - victim, run)
    # Nobody but its peer may end it: the launcher would, too.
    process.send_signal(signal.SIGSTOP)
    started_at = time.monotonic()
    os.kill(_pid_of(victim, run), signal.SIGKILL)
    while pathlib.Path(f"/proc/{survivor}/status").exists() and time.monotonic() < started_at + 60:
        if "State:\tZ" in pathlib.Path(f"/proc/{survivor}/status").read_text(encoding="utf-8"):
            break
        time.sleep(0.1)
    seconds = time.monotonic() - started_at
    process.send_signal(signal.SIGCONT)
    output += _rest_of(process)
    assert process.returncode in (137, 134, 1), output
    assert seconds < 30, output
