"""Where a run begins: parameters alone, checkpoints without a position in the data, and AXLearn's."""

import json

import jax
import numpy as np
import pytest

from axlearn.common.checkpointer import (
    CheckpointMismatchError,
    CheckpointWriter,
    checkpoint_steps,
    drop_learner_optimizer_cfg,
    drop_paths,
    export_axlearn,
    open_checkpoint,
)
from axlearn.common.config import config_for_function
from axlearn.common.optimizers import param_ema
from axlearn.common.trainer import SpmdTrainer, read_metrics
from axlearn.common.trainer._position import DataPosition
from axlearn.common.utils import flatten_items
from tests.common.trainer.tiny_recipe import VOCAB_SIZE, trainer_config

_WEIGHT = np.random.default_rng(0).normal(size=(VOCAB_SIZE, VOCAB_SIZE)).astype(np.float32)
_PARAMS = {"model/weight": _WEIGHT, "model/bias": np.linspace(0, 1, VOCAB_SIZE, dtype=np.float32)}


def _write(run, arrays, *, step: int = 0) -> None:
    with CheckpointWriter(run / "checkpoints", step=step) as writer:
        for path, value in arrays.items():
            whole = tuple(slice(0, n) for n in value.shape)
            writer.add_array(path, shape=value.shape, dtype=value.dtype, parts=[(whole, value)])


def _run(cfg: SpmdTrainer.Config, *, seed: int = 0):
    trainer = cfg.instantiate(parent=None)
    return trainer, trainer.run(jax.random.PRNGKey(seed))


def _losses(run) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in read_metrics(str(run / "metrics.jsonl")) if "loss" in r}


def _first_loss() -> float:
    """The loss of the parameters on the first batch, without noise."""
    batch = next(
        trainer_config().input.set(name="input", is_training=True).instantiate(parent=None).batches()
    )
    logits = (_WEIGHT[batch["input_ids"]] + _PARAMS["model/bias"]).astype(np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    labels = batch["target_labels"]
    losses = -np.take_along_axis(log_probs, np.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    return float(losses[labels >= 0].mean())


def _with_ema(cfg: SpmdTrainer.Config) -> SpmdTrainer.Config:
    cfg.learner.ema = config_for_function(param_ema).set(decay=0.9)
    return cfg


def _state_of(trainer: SpmdTrainer) -> dict[str, np.ndarray]:
    return {path: np.asarray(x) for path, x in flatten_items(trainer.trainer_state._asdict())}


@pytest.mark.parametrize("layout", ["ours", "AXLearn's"])
def test_a_run_begins_from_parameters_alone(tmp_path, capsys, layout):
    _write(tmp_path if layout == "ours" else tmp_path / "source", _PARAMS)
    if layout != "ours":
        source = open_checkpoint(tmp_path / "source" / "checkpoints")
        export_axlearn(source, output_dir=tmp_path / "checkpoints")
    cfg = _with_ema(trainer_config(dir=str(tmp_path)))
    trainer = cfg.instantiate(parent=None)
    with trainer.mesh():
        iterator = trainer._open_input()
        trainer.restore_or_init(jax.random.PRNGKey(3))
        trainer.checkpointer.stop()
    assert "Starting from the parameters in the checkpoint of step 0" in capsys.readouterr().out
    assert (trainer.step, iterator.get_state()["next_step"]) == (0, 0)
    begun = _state_of(trainer)
    scratch = _with_ema(trainer_config(dir=str(tmp_path / "scratch"))).instantiate(parent=None)
    scratch.init(jax.random.PRNGKey(3))
    expected = _state_of(scratch)
    assert sorted(begun) == sorted(expected)
    for path, value in begun.items():
        np.testing.assert_array_equal(value, _PARAMS.get(path, expected[path]), err_msg=path)
    for (path, x), (_, y) in zip(
        flatten_items(trainer.trainer_state._asdict()),
        flatten_items(scratch.trainer_state._asdict()),
        strict=True,
    ):
        assert x.sharding == y.sharding, path


def test_it_trains_saves_and_continues(tmp_path, capsys):
    _write(tmp_path, _PARAMS)
    _, outputs = _run(trainer_config(dir=str(tmp_path)))
    assert checkpoint_steps(tmp_path / "checkpoints") == [0, 4, 8]
    assert float(outputs["loss"]) < _losses(tmp_path)[1]
    # The model's noise of 0.1 moves the loss of these parameters by less than a hundredth.
    np.testing.assert_allclose(_losses(tmp_path)[1], _first_loss(), rtol=1e-2)
    other = tmp_path / "other"
    _write(other, _PARAMS)
    _run(trainer_config(dir=str(other)).set(max_step=4))
    _run(trainer_config(dir=str(other)))
    assert _losses(other) == _losses(tmp_path)
    assert "Continuing from step 4." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("extra", "step"),
    [({}, 2), ({"prng_key": np.zeros(2, np.uint32)}, 0), ({"learner/optimizer/0/count": np.int32(0)}, 0)],
)
def test_moments_are_never_dropped_in_silence(tmp_path, extra, step):
    _write(tmp_path, {**_PARAMS, **{path: np.asarray(value) for path, value in extra.items()}}, step=step)
    with pytest.raises(CheckpointMismatchError, match="learner/optimizer"):
        _run(trainer_config(dir=str(tmp_path)))


def test_parameters_of_another_model_are_refused(tmp_path):
    _write(tmp_path, {**_PARAMS, "model/bias": np.zeros(VOCAB_SIZE + 1, np.float32)})
    with pytest.raises(
        CheckpointMismatchError, match=r"model/bias: \(17,\) in the checkpoint, \(16,\) asked for"
    ):
        _run(trainer_config(dir=str(tmp_path)))


def test_a_damaged_checkpoint_falls_back_to_the_parameters_that_the_run_began_from(tmp_path, capsys):
    _write(tmp_path, _PARAMS)
    _run(trainer_config(dir=str(tmp_path)).set(max_step=4))
    before = _losses(tmp_path)
    (chunk,) = (tmp_path / "checkpoints/step_00000004/gda/model/bias/c").iterdir()
    chunk.write_bytes(b"")
    capsys.readouterr()
    _run(trainer_config(dir=str(tmp_path)).set(max_step=4))
    assert "Starting from the parameters" in capsys.readouterr().out
    assert _losses(tmp_path) == before


def test_a_run_continues_from_an_export_of_itself_behind_the_same_batch(tmp_path, capsys):
    """The export has no position in the data; it follows from the step."""
    _run(trainer_config(dir=str(tmp_path / "a")))
    source = open_checkpoint(tmp_path / "a" / "checkpoints", step=4)
    export_axlearn(source, output_dir=tmp_path / "b" / "checkpoints")
    capsys.readouterr()
    _run(trainer_config(dir=str(tmp_path / "b")))
    assert "Continuing from step 4. Its checkpoint holds no position" in capsys.readouterr().out
    assert {step: _losses(tmp_path / "a")[step] for step in range(5, 9)} == _losses(tmp_path / "b")
    manifests = [
        json.loads((tmp_path / name / "checkpoints/step_00000008/MANIFEST.json").read_text())
        for name in ("a", "b")
    ]
    assert manifests[0] == manifests[1]


class _Unstepped:
    """An iterator that knows its position, but not that of a step."""

    def get_state(self):
        return {"record": 0}

    def set_state(self, state):
        raise AssertionError("not reached")


def test_data_without_steps_are_refused_unless_the_run_is_at_its_beginning():
    position = DataPosition(_Unstepped())
    position.set_step(0)
    assert position.get_state() == {"record": 0}
    with pytest.raises(ValueError, match="the batches of _Unstepped are no function of the step") as e:
        position.set_step(7)
    assert "Use such an input, or begin a new run" in str(e.value)


def test_what_a_filter_leaves_out_begins_anew_and_says_so(tmp_path, capsys):
    _run(trainer_config(dir=str(tmp_path)).set(max_step=4))
    saved = open_checkpoint(tmp_path / "checkpoints", step=4)
    cfg = trainer_config(dir=str(tmp_path))
    cfg.checkpointer.restore_state_filter = drop_learner_optimizer_cfg()
    trainer = cfg.instantiate(parent=None)
    with trainer.mesh():
        trainer._open_input()
        with pytest.raises(ValueError, match=r"leaves out learner/optimizer/.* must begin anew"):
            trainer.restore_checkpoint()
        trainer.restore_or_init(jax.random.PRNGKey(7))
        trainer.checkpointer.stop()
    assert trainer.step == 4
    text = capsys.readouterr().out
    assert (
        "Continuing from step 4. What checkpointer.restore_state_filter leaves out begins anew: lear" in text
    )
    scratch = trainer_config(dir=str(tmp_path / "scratch")).instantiate(parent=None)
    scratch.init(jax.random.PRNGKey(7))
    first = _state_of(scratch)
    for path, value in _state_of(trainer).items():
        expected = first[path] if path.startswith("learner/optimizer/") else saved.read(path)
        np.testing.assert_array_equal(value, expected, err_msg=path)
    assert not np.array_equal(first["model/weight"], saved.read("model/weight"))


def test_parameters_that_a_filter_leaves_out_are_those_of_a_new_run(tmp_path):
    """A new head on a trained body; averages begin with what the parameters are."""
    _run(trainer_config(dir=str(tmp_path)).set(max_step=4))
    saved = open_checkpoint(tmp_path / "checkpoints", step=4)
    cfg = _with_ema(trainer_config(dir=str(tmp_path)))
    patterns = ["model/bias", "prng_key", "learner/.*"]
    cfg.checkpointer.restore_state_filter = config_for_function(drop_paths).set(patterns=patterns)
    trainer, _ = _run(cfg.set(max_step=4), seed=9)
    scratch = _with_ema(trainer_config(dir=str(tmp_path / "scratch"))).instantiate(parent=None)
    scratch.init(jax.random.PRNGKey(9))
    expected = {**_state_of(scratch), "model/weight": saved.read("model/weight")}
    assert all(np.array_equal(value, expected[path]) for path, value in _state_of(trainer).items())
