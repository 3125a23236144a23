"""Moving averages of the parameters: what is evaluated, and that a run that continues goes on averaging."""

import jax
import numpy as np
import pytest

from axlearn.common.checkpointer import load_checkpoint
from axlearn.common.config import config_for_function
from axlearn.common.evaler import every_n_steps_policy
from axlearn.common.optimizers import param_ema
from axlearn.common.schedule import decay_bias_correction
from axlearn.common.trainer import read_metrics
from tests.common.trainer.tiny_recipe import trainer_config

DECAY, NUM_STEPS = 0.6, 6


def _config(folder, *, decay, max_step=NUM_STEPS):
    """Two evalers of the same rows: one as it comes, one that asks for the parameters themselves."""
    cfg = trainer_config(dir=str(folder), max_step=max_step, save_every_n_steps=1)
    cfg.checkpointer.keep_last_n = 100
    cfg.checkpointer.save_policy.min_step = 0
    cfg.learner.ema = config_for_function(param_ema).set(decay=decay)
    heldout = cfg.evalers["heldout"].set(
        eval_policy=config_for_function(every_n_steps_policy).set(n=2, min_step=0)
    )
    cfg.evalers = {"heldout": heldout, "raw": heldout.clone(use_ema=False)}
    return cfg


def _run(cfg):
    trainer = cfg.instantiate(parent=None)
    trainer.run(jax.random.PRNGKey(0))
    return trainer


def _evals(folder):
    """The losses and what they are of, by evaler and step."""
    return {
        (record["evaler"], record["step"]): (record["summaries"]["cross_entropy_loss"], record.get("weights"))
        for record in read_metrics(str(folder / "metrics.jsonl"))
        if "evaler" in record
    }


@pytest.fixture(scope="module", params=["constant", "corrected"])
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    decay = DECAY
    if request.param == "corrected":
        decay = config_for_function(decay_bias_correction).set(decay=DECAY)
    return request.param, folder, _run(_config(folder, decay=decay))


def _params(folder, trainer, step):
    with trainer.mesh():
        restored = load_checkpoint(
            str(folder / "checkpoints"), state={"model": trainer.trainer_state_specs.model}, step=step
        )
    return {name: np.asarray(value, np.float64) for name, value in restored.state["model"].items()}


def _loss(trainer, params):
    """The cross entropy of the rows, in numpy."""
    nats = []
    for batch in trainer.evalers["heldout"].input.batches():
        logits = params["weight"][batch["input_ids"]] + params["bias"]
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        nats.append(-np.take_along_axis(log_probs, batch["target_labels"][..., None], -1))
    return np.mean(nats)


def test_the_evaluation_is_of_the_average_of_the_parameters_of_all_steps(run):
    kind, folder, trainer = run
    history = [_params(folder, trainer, step) for step in range(NUM_STEPS + 1)]
    evals = _evals(folder)
    for step in (2, 4, 6):
        weights = np.array([(1 - DECAY) * DECAY ** (step - i) for i in range(1, step + 1)])
        # A constant decay leaves the average short of 1 - DECAY ** step: that part of it is the zeros of the
        # beginning.
        assert weights.sum() == pytest.approx(1 - DECAY**step)
        if kind == "corrected":
            weights /= weights.sum()
        average = {
            name: sum(w * params[name] for w, params in zip(weights, history[1 : step + 1], strict=True))
            for name in history[0]
        }
        assert evals["heldout", step] == (pytest.approx(_loss(trainer, average), rel=1e-5), "ema")
        assert evals["raw", step] == (pytest.approx(_loss(trainer, history[step]), rel=1e-5), None)
        assert evals["heldout", step] != evals["raw", step]


def test_before_the_first_step_there_is_nothing_to_average(run):
    _, folder, trainer = run
    evals = _evals(folder)
    assert evals["heldout", 0] == evals["raw", 0]
    assert evals["heldout", 0][0] == pytest.approx(_loss(trainer, _params(folder, trainer, 0)), rel=1e-5)


def test_a_run_that_continues_averages_on_bit_for_bit(run, tmp_path):
    kind, folder, trainer = run
    decay = DECAY if kind == "constant" else config_for_function(decay_bias_correction).set(decay=DECAY)
    _run(_config(tmp_path, decay=decay, max_step=3))
    continued = _run(_config(tmp_path, decay=decay))
    assert continued.restored_step == 3
    for once, twice in zip(
        jax.tree.leaves(trainer.trainer_state.learner["ema"]),
        jax.tree.leaves(continued.trainer_state.learner["ema"]),
        strict=True,
    ):
        np.testing.assert_array_equal(once, twice)
    assert {key: value for key, value in _evals(tmp_path).items() if key[1] != 3} == _evals(folder)


def test_averages_that_nobody_keeps_cannot_be_evaluated(tmp_path):
    cfg = trainer_config(dir=str(tmp_path))
    cfg.evalers["heldout"].use_ema = True
    with pytest.raises(ValueError, match=r"tiny\.heldout\.use_ema: True, but the learner keeps no averages"):
        cfg.instantiate(parent=None)
    cfg.learner.ema.decay = 0.9
    cfg.instantiate(parent=None)
