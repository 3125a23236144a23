"""The command that starts runs: what it changes, writes, refuses, and with which status it ends."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from axlearn.common import launch
from axlearn.common.config import UnknownConfigNameError, config_from_json
from axlearn.common.launch_trainer import (
    LaunchOptions,
    get_trainer_config,
    redacted,
    write_run_files,
)
from axlearn.common.run_record import redacted_overrides
from axlearn.common.trainer import read_metrics
from tests.launcher import ROOT, as_text, command, environment, run_cases

RECIPE = "tests.common.trainer.tiny_recipe"


def test_each_mistake_is_a_short_message_and_a_status(tmp_path, golden):
    (tmp_path / "broken_recipe.py").write_text("import no_such_library\n")
    (tmp_path / "empty_recipe.py").write_text("")
    (tmp_path / "file").write_text("")
    run = f"--trainer_dir={tmp_path}/run"
    cases = {
        "an unknown flag": ["--config=tiny", "--trainer_prng_sed=3"],
        "no config": [],
        "a word too many": ["--config=tiny", "tiny"],
        "steps that are no numbers": ["--config=tiny", "--trace_at_steps=1,x"],
        "an unknown backend": ["--config=tiny", "--jax_backend=abacus"],
        "an unknown kind of dry run": ["--config=tiny", "--dry_run=maybe"],
        "a value for a flag that takes none": ["--config=tiny", "--nodry_run=3"],
        "no micro-batches": ["--config=tiny", "--grad_acc_steps=0"],
        "micro-batches that do not divide": ["--config=tiny", run, "--grad_acc_steps=3"],
        "neither a config nor a run": [run],
        "an unknown config": ["--config=tinny", run],
        "an unknown config of a module": ["--config=tinny", f"--module={RECIPE}", run],
        "an unknown module": ["--config=tiny", "--module=no.such.recipe", run],
        "a module that cannot be imported": ["--config=tiny", "--module=broken_recipe", run],
        "a module without configs": ["--config=tiny", "--module=empty_recipe", run],
        "a file where the run should be": ["--config=tiny", f"--trainer_dir={tmp_path}/file"],
        "a place that cannot be written": ["--config=tiny", "--trainer_dir=/proc/run"],
        "wrong overrides": ["--config=tiny", run, "--set=model.vocab=3", "--set=max_step=many", "--set=seed"],
        "a mesh that does not divide": ["--config=tiny", run, "--set=mesh_shape=(4, 3)"],
        "a mesh of other axes": ["--config=tiny", run, "--set=mesh_shape=(8,)"],
        "a mesh that is no shape": ["--config=tiny", run, "--set=mesh_shape=8"],
        "a machine without a rule": ["--config=tiny", run, "--mesh_selector=tpu-v5p-128"],
        "an id outside the vocabulary": ["--config=tiny", run, "--set=input.vocab_size=2000"],
    }
    results = run_cases(cases, cwd=tmp_path, env=environment(num_devices=8, paths=(tmp_path,)))
    golden("errors/launch_trainer.txt", as_text(results, replaced={tmp_path: "TMP", ROOT: "ROOT"}))
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir() and p.name != "__pycache__") == ["run"]


def _command(run: pathlib.Path, config: str, *more: str) -> list[str]:
    return command(f"--module={RECIPE}", f"--config={config}", f"--trainer_dir={run}", *more)


def test_sigterm_saves_and_ends_with_143_and_the_next_start_continues(tmp_path):
    run = tmp_path / "run"
    process = subprocess.Popen(
        _command(run, "tiny-long"),
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 143, out + errors
    (path,) = (run / "checkpoints").glob("step_????????")
    step = int(path.name[5:])
    assert errors.strip().splitlines()[-1] == f"Stopped by SIGTERM after step {step}, which is saved."
    again = subprocess.run(
        _command(run, "tiny-long", f"--set=max_step={step + 3}"),
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert again.returncode == 0, again.stderr
    assert f"Continuing from step {step}." in again.stdout
    assert [r["step"] for r in read_metrics(str(run / "metrics.jsonl")) if "loss" in r][-3:] == [
        step + 1,
        step + 2,
        step + 3,
    ]
    starts = json.loads((run / "overrides.json").read_text())
    assert [[(o["path"], o["new"]) for o in start["overrides"]] for start in starts] == [
        [],
        [("max_step", step + 3)],
    ]
    flags = json.loads((run / "launch_trainer_flags").read_text())
    assert flags["config"] == "tiny-long"
    assert "verbosity" not in flags  # Which is absl's, not ours.
    assert f"max_step: {step + 3}" in (run / "trainer_config").read_text().splitlines()


def _options(**fields) -> LaunchOptions:
    return LaunchOptions(**{"config": "tiny", "module": RECIPE, **fields})


def test_options_change_the_config_and_overrides_come_last():
    launched = get_trainer_config(
        _options(
            trace_at_steps=[3],
            n_steps_for_each_trace=2,
            eval_trace_at_iters=[1],
            log_every_n_steps=7,
            watchdog_timeout_seconds=60,
            vlog=1,
            overrides=["log_every_n_steps=9", "learner.optimizer.learning_rate=1e-3"],
        )
    )
    cfg = launched.trainer_config
    assert cfg.dir == "runs/tiny"
    assert (cfg.start_trace_steps, cfg.n_steps_for_each_trace) == ([3], 2)
    assert cfg.evalers["heldout"].trace_at_iters == [1]
    assert cfg.log_every_n_steps == 9
    assert cfg.watchdog_timeout_seconds == 60
    assert cfg.crash_on_hang_timeout_seconds is None
    assert cfg.vlog == 1
    assert cfg.learner.optimizer.learning_rate == 1e-3
    assert tuple(cfg.mesh_shape) == (8, 1)
    assert [o["path"] for o in launched.overrides] == ["log_every_n_steps", "learner.optimizer.learning_rate"]


def test_a_run_is_continued_without_the_name_of_its_recipe(tmp_path):
    first = get_trainer_config(_options(trainer_dir=str(tmp_path / "run"), overrides=["max_step=3"]))
    write_run_files(first, flags={}, write_assets=lambda folder: None)
    (tmp_path / "run").rename(tmp_path / "moved")
    options = _options(config=None, trainer_dir=str(tmp_path / "moved"), log_every_n_steps=5)
    again = get_trainer_config(dataclasses.replace(options, overrides=["evalers={}"])).trainer_config
    expected = first.trainer_config.clone(dir=str(tmp_path / "moved"), log_every_n_steps=5, evalers={})
    assert again == expected
    # Only classes of this package and of a module that the user names are ever resolved.
    with pytest.raises(ValueError, match="tests"):
        get_trainer_config(dataclasses.replace(options, module=None))
    with pytest.raises(ValueError, match="--data_dir: is for a recipe"):
        get_trainer_config(dataclasses.replace(options, data_dir="FAKE"))


def test_micro_batches_are_set_on_top_of_the_recipe_and_below_overrides():
    path = "learner.forward_fn_transformation.steps"
    cfg = get_trainer_config(_options(grad_acc_steps=4)).trainer_config
    assert cfg.learner.forward_fn_transformation.steps == 4
    cfg = get_trainer_config(_options(grad_acc_steps=4, overrides=[f"{path}=2"])).trainer_config
    assert cfg.learner.forward_fn_transformation.steps == 2


def test_a_dry_run_tells_by_its_status_whether_the_run_fits_and_leaves_nothing_behind(tmp_path):
    run = f"--trainer_dir={tmp_path}/run"
    cases = {
        "fits": ["--config=tiny", run, "--dry_run"],
        "does not fit": ["--config=tiny", run, "--dry_run", "--set=model.vocab_size=10_000_000"],
        "compiled": ["--config=tiny", run, "--dry_run=compile"],
    }
    cache = tmp_path / "cache"
    results = run_cases(cases, cwd=tmp_path, env=environment(num_devices=8, AXLEARN_CACHE_DIR=str(cache)))
    assert {name: status for name, (status, _) in results.items()} == {
        "fits": 0,
        "does not fit": 2,
        "compiled": 0,
    }
    assert not list(tmp_path.iterdir())


def test_a_model_of_seventy_billion_parameters_is_refused_at_once_and_takes_no_memory(tmp_path):
    layer = "model.decoder.transformer.layer"
    overrides = [
        "model.decoder.dim=8192",
        "model.decoder.vocab_size=128256",
        "model.decoder.transformer.num_layers=80",
        f"{layer}.self_attention.attention.num_heads=64",
        f"{layer}.self_attention.attention.input_linear.input_linear.num_kv_heads=8",
        f"{layer}.feed_forward.hidden_dim=28672",
    ]
    sets = [f"--set={override}" for override in overrides]
    arguments = command("--config=fuji-tiny", f"--trainer_dir={tmp_path}/run", *sets)
    started = time.monotonic()
    # A fresh interpreter measures it, so that no other child of this process counts.
    code = (
        "import resource, subprocess, sys\n"
        "done = subprocess.run(sys.argv[1:])\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)\n"
        "sys.exit(done.returncode)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=tmp_path,
        env=environment(AXLEARN_CACHE_DIR=str(tmp_path / "cache")),
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.monotonic() - started
    assert done.returncode == 2, done.stderr
    first, _, hint = done.stderr.splitlines()
    # Sixteen bytes for each of 69.5 billion parameters.
    assert first.startswith(
        "gpt_trainer: does not fit: its one device needs 1.0 TiB without activations (optimizer 517.8 GiB, "
        "parameters 258.9 GiB, gradients 258.9 GiB), and "
    )
    assert hint.startswith("The largest listed recipe that fits here is fuji-tiny, which needs ")
    # Importing jax takes 130 MB and 0.6 s; the benchmark of the start measures how many times that this is.
    assert int(done.stdout) * 1024 < 500e6
    assert seconds < 60
    # No run was begun, no corpus read and no tokenizer trained: of the cache there is only the compiler's part.
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["jax"]


def test_a_name_that_no_recipe_has_is_answered_with_the_nearest():
    with pytest.raises(UnknownConfigNameError, match="'tiny'"):
        get_trainer_config(_options(config="tinny"))


def test_the_files_of_a_run_say_what_it_is(tmp_path):
    launched = get_trainer_config(_options(trainer_dir=str(tmp_path), overrides=["max_step=3"]))
    assets = []
    write_run_files(launched, flags={"set": ["max_step=3"]}, write_assets=assets.append)
    cfg = launched.trainer_config
    assert (tmp_path / "trainer_config").read_text() == cfg.debug_string()
    text = (tmp_path / "trainer_config.json").read_text()
    assert config_from_json(text, import_prefixes=("axlearn.", "tests.")) == cfg
    assert assets == [str(tmp_path / "tokenizer")]


def test_what_looks_like_a_secret_stays_out_of_the_files():
    canary = "hf_abcdefghijklmnopqrstuvwx"
    flags = {
        "set": [f"input.hf_token={canary}", "model.eos_token_id=1", "password=x y"],
        "data_dir": "https://me:hunter2@host/data",
        "trainer_prng_seed": 3,
        "mesh_selector": None,
        "trainer_dir": "runs/token",
    }
    assert redacted(flags) == {
        "set": ["<redacted>", "model.eos_token_id=1", "<redacted>"],
        "data_dir": "<redacted>",
        "trainer_prng_seed": 3,
        "mesh_selector": None,
        "trainer_dir": "runs/token",
    }
    override = {"path": "input.api_key", "old": None, "new": "x", "text": f"input.api_key={canary}"}
    assert redacted_overrides([override]) == [
        {"path": "input.api_key", "old": None, "new": "<redacted>", "text": "<redacted>"}
    ]


def test_a_backend_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="'abacus' is not a backend"):
        launch.setup(jax_backend="abacus")


def test_a_tpu_that_is_not_there_is_refused_in_a_sentence(tmp_path):
    env = {**environment(), "JAX_PLATFORMS": ""}
    arguments = ("--config=fuji-tiny", f"--trainer_dir={tmp_path}/run", "--dry_run", "--jax_backend=tpu")
    done = subprocess.run(command(*arguments), env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("--jax_backend: 'tpu' cannot be used here: ")
    assert "Traceback" not in done.stderr


def test_a_compilation_cache_that_others_can_write_to_is_refused(tmp_path, monkeypatch):
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax").chmod(0o777)
    monkeypatch.setenv("AXLEARN_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    # Programs for several CPU devices, as this process has, are not kept at all.
    monkeypatch.setenv("XLA_FLAGS", "")
    with pytest.raises(PermissionError, match="others may write to it"):
        launch.setup()


def test_programs_for_several_cpu_devices_of_a_process_are_not_kept(tmp_path):
    code = (
        "import jax; from axlearn.common import launch; launch.setup(); "
        "print(jax.config.jax_enable_compilation_cache, jax.device_count())"
    )
    for num_devices, is_kept in ((1, True), (2, False)):
        env = environment(num_devices=num_devices, AXLEARN_CACHE_DIR=str(tmp_path))
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
        )
        assert done.stdout.split() == [str(is_kept), str(num_devices)]


def test_a_checkout_without_links_is_told_in_one_sentence(tmp_path):
    (tmp_path / "axlearn").mkdir()
    for name in ("__init__.py", "common"):
        os.symlink(ROOT / "axlearn" / name, tmp_path / "axlearn" / name)
    # A zip download turns links into files that hold their targets.
    (tmp_path / "axlearn" / "experiments").write_text("../experiments")
    code = (
        "import axlearn, sys\n"
        f"axlearn.__file__ = {str(tmp_path / 'axlearn' / '__init__.py')!r}\n"
        "from axlearn.common import launch_trainer_main\n"
        "sys.exit(launch_trainer_main.main(['x', '--config=tiny']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == (
        f"{tmp_path}/axlearn/experiments is not a folder: this checkout lost its links, as a zip "
        "download does. Use `git clone`, or make it a link to ../experiments."
    )


_COUNTING = """
import json, sys
import jax
counts = {"cache_hits": 0, "cache_misses": 0}
def count(event, **kwargs):
    name = event.rpartition("/")[2]
    if name in counts:
        counts[name] += 1
jax.monitoring.register_event_listener(count)
from axlearn.common import launch_trainer_main
status = launch_trainer_main.main(["launch_trainer_main", *sys.argv[1:]])
print(json.dumps(counts))
sys.exit(status)
"""


@pytest.mark.scale
def test_a_second_start_on_one_device_compiles_nothing_again(tmp_path):
    sizes = {
        "model.decoder.dim": 16,
        "model.decoder.vocab_size": 64,
        "input.vocab_size": 64,
        "input.source_length": 16,
        "input.global_batch_size": 2,
        "max_step": 1,
        "evalers": "{}",
    }
    changes = [f"--set={path}={value}" for path, value in sizes.items()]
    counts = []
    for run in ("first", "second"):
        done = subprocess.run(
            [
                *(sys.executable, "-c", _COUNTING, "--config=fuji-tiny", "--data_dir=FAKE"),
                *(f"--trainer_dir={tmp_path / run}", *changes),
            ],
            env=environment(AXLEARN_CACHE_DIR=str(tmp_path / "cache")),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        counts.append(json.loads(done.stdout.splitlines()[-1]))
    first, second = counts
    # The step and what initialises the state are among them.
    assert first["cache_misses"] >= 2
    assert second["cache_misses"] == 0
    assert second["cache_hits"] >= first["cache_misses"]
