"""Training in float8: close to float32, the same on a mesh and in micro-batches, saved and continued.

Rounding to three bits of mantissa lets differences of 1e-7 grow: two runs that differ in nothing else are 5e-3 apart in
their losses after three steps. So what must agree exactly is compared over single steps from the same state.
"""

import contextlib
import functools
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axlearn.common.attention import build_remat_spec
from axlearn.common.checkpointer import CheckpointMismatchError, drop_paths
from axlearn.common.config import config_for_function
from axlearn.common.input_base import Batch, DataIterator
from axlearn.common.input_fake import FakeLmInput
from axlearn.common.module import nowrap
from axlearn.common.optimizers import param_ema
from axlearn.common.quantized_dot_general import get_all_fp8_param_names
from axlearn.common.trainer import SpmdTrainer
from axlearn.common.trainer_config_modifier import FP8ConfigModifier, GradientAccumulationModifier
from axlearn.common.utils import flatten_items, host_to_global_array
from axlearn.experiments.text.gpt import common, fuji_tiny
from tests.compiling import compiling_anew

_ROOT = pathlib.Path(__file__).resolve().parents[3]
_NUM_STEPS, _HISTORY_LENGTH = 50, 16
_BATCH_SIZE, _SEQ_LEN, _VOCAB_SIZE = 8, 32, 32
_MESH = {"data": 2, "fsdp": 2, "model": 2}


class _RepetitiveInput(FakeLmInput):
    """Made-up ids of which the next is the last one plus one, mostly: something to learn."""

    @nowrap
    def batches(self) -> DataIterator:
        drawn = super().batches()

        def repetitive(first: int) -> Iterator[Batch]:
            drawn.set_state({**drawn.get_state(), "next_step": first})
            for batch in drawn:
                start, noise = batch["input_ids"][:, :1], batch["target_labels"]
                ids = ((start + np.arange(_SEQ_LEN + 1)) % _VOCAB_SIZE).astype(np.int32)
                labels = np.where(noise % 4 == 0, noise, ids[:, 1:])
                yield {**batch, "input_ids": ids[:, :-1], "target_labels": labels}

        return DataIterator(batches_from=repetitive, fingerprint=drawn.get_state()["fingerprint"])


def _config(
    *, fp8: bool = True, mesh: dict[str, int] | None = None, grad_acc_steps: int = 1, **fields: Any
) -> SpmdTrainer.Config:
    """Two layers of width 64, rematerialized."""
    cfg = fuji_tiny.trainer_config()
    mesh_shape = common.mesh_shape_from_axes(**mesh or {})
    cfg.set(**{"dir": "unused", "evalers": {}, "mesh_shape": mesh_shape, **fields})
    cfg.model.decoder.set(dim=64, vocab_size=_VOCAB_SIZE)
    stack = cfg.model.decoder.transformer
    stack.num_layers = 2
    stack.layer.remat_spec = build_remat_spec(stack)
    cfg.learner = common.learner_config(peak_lr=3e-3, max_step=100, warmup_steps=10, weight_decay=1e-4)
    cfg.input = _RepetitiveInput.default_config().set(
        global_batch_size=_BATCH_SIZE, source_length=_SEQ_LEN, vocab_size=_VOCAB_SIZE
    )
    if fp8:
        FP8ConfigModifier.default_config().set(fp8_amax_history_length=_HISTORY_LENGTH).instantiate()(cfg)
    if grad_acc_steps > 1:
        GradientAccumulationModifier.default_config().set(grad_acc_steps=grad_acc_steps).instantiate()(cfg)
    return cfg


def _trainer(cfg: SpmdTrainer.Config) -> SpmdTrainer:
    devices = np.array(jax.devices()[: np.prod(cfg.mesh_shape)]).reshape(cfg.mesh_shape)
    return cfg.klass(cfg.clone(), parent=None, devices=devices)


class _Run:
    """A trainer whose steps can be taken one by one, from any state."""

    def __init__(self, cfg: SpmdTrainer.Config):
        self.trainer = _trainer(cfg)
        self.trainer.init(jax.random.PRNGKey(3))
        self._first = self.trainer.trainer_state
        is_alone = np.prod(cfg.mesh_shape) == 1
        with self.trainer.mesh(), contextlib.nullcontext() if is_alone else compiling_anew():
            self.step_fn = self.trainer.compile_train_step()

    def step(self, state, batch):
        """From a state as numbers to the loss and the state after it."""
        with self.trainer.mesh():
            placed = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), state, self._like())
            batch = host_to_global_array(batch, partition=self.trainer.input.partition_spec)
            new, outputs = self.step_fn(placed, batch)
        summaries = outputs["summaries"]["learner"]
        return float(outputs["loss"]), jax.tree.map(np.asarray, new), summaries

    @functools.cached_property
    def first(self):
        return jax.tree.map(np.asarray, self._first)

    def _like(self):
        with self.trainer.mesh():
            return self.trainer.trainer_state_specs

    def steps(self, num_steps: int):
        """The losses, and the states before each step and behind the last."""
        states, losses = [self.first], []
        batches = self.trainer.input.batches()
        for _ in range(num_steps):
            loss, state, _ = self.step(states[-1], next(batches))
            losses.append(loss)
            states.append(state)
        return np.array(losses), states


@functools.cache
def _fp8_run():
    run = _Run(_config())
    return run, *run.steps(_NUM_STEPS)


def _is_new_value(path: str) -> bool:
    return path.rsplit("/", 1)[-1] in get_all_fp8_param_names()


def _params(state) -> dict[str, np.ndarray]:
    return dict(flatten_items(state.model))


@pytest.mark.scale
def test_fifty_steps_in_float8_stay_close_to_float32_and_the_scales_move():
    _, losses, states = _fp8_run()
    expected, _ = _Run(_config(fp8=False)).steps(_NUM_STEPS)
    # Measured: 0.027 at most (in step 8, where the loss falls fastest), 0.003 in the mean of the last ten.
    assert np.abs(losses - expected).max() < 0.06
    assert abs(np.mean(losses[-10:]) - np.mean(expected[-10:])) < 0.02
    assert losses[-1] < losses[0] - 1
    first, last = _params(states[0]), _params(states[-1])
    for path in filter(_is_new_value, first):
        assert np.isfinite(last[path]).all()
        assert (last[path] != first[path]).all(), path
        assert (last[path] > 0).all(), path


def test_the_compiled_step_multiplies_float8():
    run, *_ = _fp8_run()
    text = run.step_fn.as_text()
    assert "f8e4m3fn" in text
    assert "f8e5m2" in text


def test_the_history_holds_what_was_seen_and_the_optimizer_sees_none_of_it():
    _, _, states = _fp8_run()
    path = "decoder/transformer/repeat/layer/feed_forward/linear2"
    kernels = [np.abs(_params(state)[f"{path}/weight"]).max(axis=(1, 2)) for state in states]
    history = _params(states[-1])[f"{path}/quantized_dot_general/kernel_amax_history"]
    seen = np.stack(kernels[-1 - _HISTORY_LENGTH : -1], axis=1)
    np.testing.assert_array_equal(np.sort(history), np.sort(seen))
    np.testing.assert_array_equal(history[:, 0], seen[:, -1])
    scale = _params(states[-1])[f"{path}/quantized_dot_general/kernel_scale"][:, 0]
    before = np.stack(kernels[-2 - _HISTORY_LENGTH : -2], axis=1).max(axis=1)
    np.testing.assert_allclose(scale, before / 448, rtol=1e-6)
    assert not any(_is_new_value(path) for path, x in flatten_items(states[-1].learner) if x is not None)


def _relative_error(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-30))


# A number on the edge between two of float8 may fall to the other side. Of the 200,000 that a step rounds, none does as
# a rule, sometimes one or two. One moves the loss by 1e-4.
_EDGE_LOSS, _NO_EDGE_LOSS = 1e-3, 2e-6


def test_each_step_on_a_mesh_is_that_of_one_device():
    run, losses, states = _fp8_run()
    on_mesh = _Run(_config(mesh=_MESH))
    batches, errors = run.trainer.input.batches(), []
    for i in range(12):
        loss, state, _ = on_mesh.step(states[i], next(batches))
        errors.append(abs(loss - losses[i]))
        for path, expected in _params(states[i + 1]).items():
            assert _relative_error(_params(state)[path], expected) < 1e-2, path
    assert max(errors) < _EDGE_LOSS
    assert np.median(errors) < _NO_EDGE_LOSS
    on_their_own, _ = on_mesh.steps(_NUM_STEPS)
    # Measured: 0.016.
    assert np.abs(on_their_own - losses).max() < 0.06


def test_micro_batches_make_the_gradients_of_the_whole_and_the_largest_values_count():
    run, losses, states = _fp8_run()
    in_parts = _Run(_config(mesh=_MESH, grad_acc_steps=2))
    batches, errors = run.trainer.input.batches(), []
    for i in range(8):
        batch = next(batches)
        loss, state, summaries = in_parts.step(states[i], batch)
        _, _, whole = run.step(states[i], batch)
        errors.append(abs(loss - losses[i]))
        norms = [float(x["optimizer"]["transformation"]["gradient_norm"]) for x in (summaries, whole)]
        np.testing.assert_allclose(norms[0], norms[1], rtol=1e-2)
        ours, theirs = _params(state), _params(states[i + 1])
        for path in filter(_is_new_value, ours):
            # Forward, the largest of all rows is that of the whole batch; backward, a row's gradient is rounded to
            # what its own micro-batch makes of it.
            rtol = 0.1 if "output_grad" in path else 1e-2
            np.testing.assert_allclose(ours[path], theirs[path], rtol=rtol, err_msg=path)
    assert max(errors) < _EDGE_LOSS
    assert np.median(errors) < _NO_EDGE_LOSS


def test_in_bfloat16_what_is_remembered_is_what_was_seen():
    cfg = _config(train_dtype=jnp.bfloat16)
    losses, states = _Run(cfg).steps(3)
    assert np.isfinite(losses).all()
    path = "decoder/transformer/repeat/layer/feed_forward/linear2"
    history = _params(states[-1])[f"{path}/quantized_dot_general/kernel_amax_history"]
    assert history.dtype == np.float32
    seen = [np.abs(_params(state)[f"{path}/weight"]).max(axis=(1, 2)) for state in states[:3]]
    # The largest of bfloat16 numbers is one itself: it survives any number of casts.
    rounded = np.asarray(jnp.asarray(np.stack(seen, axis=1), jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_array_equal(np.sort(history)[:, -3:], np.sort(rounded))


def test_a_run_that_continues_is_bitwise_the_run_that_was_not_interrupted(tmp_path):
    def config(name: str, *, max_step: int, **fields: Any) -> SpmdTrainer.Config:
        cfg = _config(dir=str(tmp_path / name), max_step=max_step, **fields)
        cfg.checkpointer.save_policy.set(n=2)
        cfg.learner.ema = config_for_function(param_ema).set(decay=0.9)
        return cfg

    def trained(name: str, *max_steps: int):
        for max_step in max_steps:
            trainer = _trainer(config(name, max_step=max_step))
            trainer.run(jax.random.PRNGKey(0))
        return jax.tree.map(np.asarray, trainer.trainer_state)

    whole, parts = trained("whole", 4), trained("parts", 2, 4)
    jax.tree.map(np.testing.assert_array_equal, parts, whole)
    # Averages that evaluation uses: of scales and histories the latest, not a mean that lags behind.
    averages = dict(flatten_items(whole.learner["ema"].ema))
    for path, value in _params(whole).items():
        assert np.array_equal(averages[path], value) == _is_new_value(path), path
    # What was saved in float8 is not taken for something else.
    with pytest.raises(CheckpointMismatchError, match=r"(?s)Unexpected:.*kernel_amax_history"):
        _trainer(config("parts", max_step=6, fp8=False)).run(jax.random.PRNGKey(0))


def test_a_run_goes_on_in_float8_as_the_guide_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = _config(fp8=False, dir="runs/wide", max_step=2)
    cfg.checkpointer.save_policy.set(n=2)
    wide = _trainer(cfg)
    wide.run(jax.random.PRNGKey(0))
    before = {path: np.asarray(x) for path, x in flatten_items(wide.trainer_state.learner)}
    guide = (_ROOT / "docs" / "quantization.md").read_text(encoding="utf-8")
    (snippet,) = [x for x in re.findall(r"```python\n(.*?)```", guide, re.DOTALL) if "open_checkpoint(" in x]
    exec(compile(snippet, "quantization.md", "exec"), {})
    cfg = _config(dir="runs/fp8", max_step=3)
    refused = _trainer(cfg)
    with pytest.raises(CheckpointMismatchError, match=r"(?s)Missing:.*kernel_amax_history"):
        refused.restore_or_init(jax.random.PRNGKey(0))
    refused.checkpointer.stop()
    cfg.checkpointer.restore_state_filter = config_for_function(drop_paths).set(
        patterns=[".*/quantized_dot_general/.*"]
    )
    trainer = _trainer(cfg)
    trainer.restore_or_init(jax.random.PRNGKey(0))
    assert trainer.restored_step == 2
    for path, value in flatten_items(trainer.trainer_state.learner):
        np.testing.assert_array_equal(value, before[path.replace("optimizer/transformation/", "optimizer/")])
    scale = trainer.trainer_state.model["decoder"]["transformer"]["repeat"]["layer"]["feed_forward"][
        "linear2"
    ]
    np.testing.assert_array_equal(scale["quantized_dot_general"]["input_scale"], 1)
