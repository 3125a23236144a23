"""A run that loads its step: the same losses as one that compiles it, in a process that compiles no step."""

import json
import os
import subprocess
import sys

import pytest

from axlearn.common.saved_program import SavedProgramError
from tests.common.trainer.tiny_recipe import trainer_config

# Trains three steps on one device; prints the losses, and how often a step was compiled.
_SCRIPT = """
import json, os, sys
import jax
from axlearn.common.trainer import read_metrics, save_train_step
from tests.common.trainer.tiny_recipe import trainer_config

compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, _, **facts: compiled.append(str(facts.get("fun_name"))) if "backend_compile" in event else None
)
run_dir, save_dir, load_dir = sys.argv[1:]
cfg = trainer_config(dir=run_dir).set(max_step=3, log_every_n_steps=1, executable_dir=load_dir or None)
trainer = cfg.instantiate(parent=None)
trainer.run(jax.random.PRNGKey(0))
if save_dir:
    save_train_step(trainer.compile_train_step(), trainer=trainer, folder=save_dir)
losses = [x["loss"] for x in read_metrics(os.path.join(run_dir, "metrics.jsonl")) if "loss" in x]
print(json.dumps([losses, sum("train_step" in name for name in compiled), len(compiled)]))
"""


def _train(run_dir, *, save_dir="", load_dir=""):
    env = {**os.environ, "XLA_FLAGS": "", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    argv = [sys.executable, "-c", _SCRIPT, str(run_dir), str(save_dir), str(load_dir)]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_run_that_loads_its_step_has_the_same_losses_and_compiles_none(tmp_path):
    losses, num_steps_compiled, _ = _train(tmp_path / "first", save_dir=tmp_path / "step")
    assert num_steps_compiled == 2  # Its own, and the one that it saves.
    loaded, num_steps_compiled, num_compiled = _train(tmp_path / "second", load_dir=tmp_path / "step")
    assert len(losses) == 3
    assert loaded == losses
    assert num_steps_compiled == 0
    assert num_compiled > 0  # What makes the state and evaluates it is compiled: the count counts.


def test_a_step_that_is_not_there_is_an_error_unless_compiling_is_allowed(tmp_path, caplog):
    cfg = trainer_config(dir=str(tmp_path)).set(executable_dir=str(tmp_path / "step"))
    with pytest.raises(SavedProgramError, match=r"there is no saved program here[\s\S]*executable_fallback"):
        cfg.instantiate(parent=None)._compile()
    cfg.executable_fallback = True
    assert callable(cfg.instantiate(parent=None)._compile())
    assert "The step is compiled, as executable_fallback says" in caplog.text


def test_fields_that_make_no_sense_together_are_refused(tmp_path):
    cfg = trainer_config(dir=str(tmp_path)).set(executable_fallback=True)
    with pytest.raises(ValueError, match="there is nothing to fall back from"):
        cfg.instantiate(parent=None)
    cfg.set(executable_dir=str(tmp_path), cache_compiled_train_step=False)
    with pytest.raises(ValueError, match="a saved step is for one shape of a batch"):
        cfg.instantiate(parent=None)
