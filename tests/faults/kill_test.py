"""SIGKILL at any moment, restart, and nothing differs from the run that was never disturbed.

One run is killed again and again, at least half the times while a save is being written, and started again each
time. Afterwards every loss that any attempt printed, every array of the last checkpoint and the data position are
compared bit for bit with an undisturbed run of the same recipe.
"""

import json
import os
import pathlib
import random
import signal
import subprocess
import time

import pytest

from tests.launcher import command, environment

SAVE_EVERY = 2


def _command(run: pathlib.Path, *, max_step: int) -> list[str]:
    return command(
        *("--module=kill_recipe", "--config=kill-test", f"--trainer_dir={run}"),
        *("--set", f"max_step={max_step}", "--set", f"checkpointer.save_policy.n={SAVE_EVERY}"),
    )


def _environment(work: pathlib.Path) -> dict[str, str]:
    return environment(
        num_devices=2, paths=(pathlib.Path(__file__).parent,), KILL_TEST_TEXT=str(work / "text")
    )


def _write_text(folder: pathlib.Path) -> None:
    """Forty small documents, the same on every machine."""
    rng, words = random.Random(7), ["def", "return", "self", "value", "for", "in", "if", "x", "y", "z"]
    folder.mkdir(parents=True)
    for i in range(40):
        lines = [" ".join(rng.choices(words, k=8)) for _ in range(12)]
        (folder / f"doc_{i:02d}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _losses(run: pathlib.Path) -> list[tuple[int, str]]:
    """(step, loss as written) of every whole line; the last may have been cut off by a kill."""
    losses = []
    path = run / "metrics.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if "loss" in record:
            losses.append((record["step"], repr(record["loss"])))
    return losses


def _steps(run: pathlib.Path) -> list[int]:
    return sorted(int(p.name[5:]) for p in (run / "checkpoints").glob("step_????????"))


def _saves_in_flight(run: pathlib.Path) -> list[str]:
    return sorted(p.name for p in (run / "checkpoints").glob("step_*.tmp-*"))


def _run_to_end(run: pathlib.Path, env: dict[str, str], *, max_step: int) -> None:
    done = subprocess.run(
        _command(run, max_step=max_step),
        env=env,
        cwd=run.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def _kill_once(
    run: pathlib.Path, env: dict[str, str], rng: random.Random, *, max_step: int, in_save: bool
) -> bool:
    """Starts the run, kills it at a random moment, and says whether that was inside a save."""
    log = (run.parent / "attempts.log").open("a")
    process = subprocess.Popen(
        _command(run, max_step=max_step), env=env, cwd=run.parent, stdout=log, stderr=log
    )
    seen_before, saves_to_pass = set(_saves_in_flight(run)), rng.randint(1, 3)
    deadline = time.monotonic() + 120
    try:
        start = len(_losses(run))
        while process.poll() is None and time.monotonic() < deadline and len(_losses(run)) == start:
            time.sleep(0.002)  # Nothing to interrupt before the first step.
        if not in_save:
            time.sleep(rng.uniform(0, 0.6))
        while in_save and process.poll() is None and time.monotonic() < deadline:
            new = set(_saves_in_flight(run)) - seen_before
            if new:
                seen_before |= new
                saves_to_pass -= 1
                if saves_to_pass == 0:
                    time.sleep(rng.uniform(0, 0.03))
                    break
            time.sleep(0.0005)
        assert time.monotonic() < deadline, "the run made no step within two minutes"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        log.close()
    return bool(_saves_in_flight(run))


def _checkpoint_content(run: pathlib.Path, step: int) -> dict[str, str]:
    """Digests of all files of one step, by path, as its manifest states and its files hold them."""
    manifest = json.loads(
        (run / "checkpoints" / f"step_{step:08d}" / "MANIFEST.json").read_text(encoding="utf-8")
    )
    return {name: entry["sha256"] for name, entry in manifest["files"].items()}


def _storm(work: pathlib.Path, *, num_kills: int, max_step: int, seed: int) -> None:
    env = _environment(work)
    _write_text(work / "text")
    truth, run = work / "truth", work / "run0"
    _run_to_end(truth, env, max_step=max_step)
    assert [step for step, _ in _losses(truth)] == list(range(1, max_step + 1))

    rng, num_in_save, committed = random.Random(seed), 0, []
    for i in range(num_kills):
        num_in_save += _kill_once(run, env, rng, max_step=max_step, in_save=i % 4 != 3)
        now = _steps(run)
        assert not committed or (now and now[-1] >= committed[-1]), f"seed {seed}: a committed step was lost"
        committed = now
        if _losses(run)[-1][0] >= max_step - 2 * SAVE_EVERY and i + 1 < num_kills:
            # The chain has nearly reached its end: begin another one, so that every kill hits a live run.
            _finish_and_compare(truth, run, env, max_step=max_step)
            run, committed = work / f"run{i + 1}", []
    _finish_and_compare(truth, run, env, max_step=max_step)
    assert num_in_save >= num_kills / 2, f"only {num_in_save} of {num_kills} kills hit a save (seed {seed})"


def _finish_and_compare(
    truth: pathlib.Path, run: pathlib.Path, env: dict[str, str], *, max_step: int
) -> None:
    """Lets a killed run come to its end, and compares all that it wrote with the undisturbed one."""
    _run_to_end(run, env, max_step=max_step)
    expected = dict(_losses(truth))
    assert {step for step, _ in _losses(run)} == set(expected)
    for step, loss in _losses(run):
        assert loss == expected[step], f"{run.name}: step {step}"
    assert max_step in _steps(run)
    assert _steps(run) == _steps(truth)
    for step in _steps(run):
        assert _checkpoint_content(run, step) == _checkpoint_content(truth, step), f"{run.name}: step {step}"
    assert not _saves_in_flight(run)


def test_a_run_killed_twice_ends_bit_equal(tmp_path):
    _storm(tmp_path, num_kills=2, max_step=20, seed=20261120)


@pytest.mark.slow
def test_a_run_killed_twenty_times_ends_bit_equal(tmp_path):
    _storm(tmp_path, num_kills=20, max_step=60, seed=int(os.environ.get("KILL_SEED", "1")))
