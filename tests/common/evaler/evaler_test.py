"""Evaluation over a whole finite input, weighted by what each batch holds."""

import jax
import numpy as np
import pytest

from axlearn.common.config import config_for_function
from axlearn.common.evaler import SpmdEvaler, every_n_steps_policy, maybe_set_fields
from axlearn.common.input_base import DataIterator
from axlearn.common.input_fake import FakeLmInput
from axlearn.common.module import nowrap
from tests.common.trainer.tiny_recipe import BigramModel, trainer_config


class _RaggedInput(FakeLmInput):
    """The batches of FakeLmInput, with more and more labels dead."""

    @nowrap
    def batches(self) -> DataIterator:
        whole = super().batches()

        def ragged(first):
            for i, batch in enumerate(whole):
                labels = batch["target_labels"].copy()
                labels[:, : 3 * i] = -1
                yield {**batch, "target_labels": labels}

        return DataIterator(batches_from=ragged, fingerprint={})


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    cfg = trainer_config(dir=str(tmp_path_factory.mktemp("run")))
    evaler = cfg.evalers["heldout"]
    data = {name: value for name, value in evaler.input.items() if name not in ("klass", "name")}
    cfg.evalers = {
        "heldout": evaler.set(
            input=_RaggedInput.default_config().set(**data),
            eval_policy=config_for_function(every_n_steps_policy).set(n=5, min_step=6, max_step=17),
        )
    }
    trainer = cfg.instantiate(parent=None)
    trainer.init(jax.random.PRNGKey(0))
    return trainer


def _eval(trainer, step=10, **kwargs):
    with trainer.mesh():
        return trainer.evalers["heldout"].eval_step(
            step, prng_key=jax.random.PRNGKey(1), model_params=trainer.trainer_state.model, **kwargs
        )


def test_the_result_is_the_mean_over_all_live_targets(trainer):
    model = {name: np.asarray(value, np.float64) for name, value in trainer.trainer_state.model.items()}
    nats, num_targets = 0.0, 0
    for batch in trainer.evalers["heldout"].input.batches():
        logits = model["weight"][batch["input_ids"]] + model["bias"]
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        live = batch["target_labels"] >= 0
        picked = np.take_along_axis(log_probs, np.maximum(batch["target_labels"], 0)[..., None], -1)[..., 0]
        nats -= picked[live].sum()
        num_targets += live.sum()
    key, summaries, _ = _eval(trainer)
    assert float(summaries["cross_entropy_loss"].mean) == pytest.approx(nats / num_targets, rel=1e-6)
    assert float(summaries["cross_entropy_loss"].weight) == num_targets == 8 * (12 + 9 + 6)
    assert summaries["eval_time_secs"] > 0
    np.testing.assert_array_equal(key, jax.random.PRNGKey(1))


def test_a_second_evaluation_compiles_nothing_and_says_the_same(trainer):
    _, first, _ = _eval(trainer)
    traces = BigramModel.num_traces
    _, second, _ = _eval(trainer)
    assert BigramModel.num_traces == traces
    assert float(first["cross_entropy_loss"].mean) == float(second["cross_entropy_loss"].mean)


@pytest.mark.parametrize(("step", "due"), [(5, False), (6, False), (10, True), (17, True), (18, False)])
def test_the_policy_decides_unless_it_is_forced(trainer, step, due):
    assert trainer.evalers["heldout"].is_due(step=step) == due
    if not due:
        assert _eval(trainer, step)[1] is None
    assert (step == 18) == (_eval(trainer, step, force_run=step == 18)[1] is not None and not due)


def test_an_id_outside_the_vocabulary_is_refused(trainer):
    cfg = trainer.config.clone(dir="unused")
    cfg.evalers["heldout"].input.vocab_size = 99
    other = cfg.instantiate(parent=None)
    other.init(jax.random.PRNGKey(0))
    with pytest.raises(ValueError, match="outside the vocabulary"):
        _eval(other)


def test_an_input_without_batches_is_an_error(trainer):
    cfg = trainer.config.clone(dir="unused")
    cfg.evalers["heldout"].input.total_num_batches = 0
    other = cfg.instantiate(parent=None)
    other.init(jax.random.PRNGKey(0))
    with pytest.raises(ValueError, match=r"heldout\.input: has no batches"):
        _eval(other)


def test_a_distance_below_one_is_refused():
    with pytest.raises(ValueError, match="n=0"):
        every_n_steps_policy(0)


def test_what_an_owner_knows_is_set_only_where_nobody_has_set_it():
    cfg = SpmdEvaler.default_config().summary_writer
    assert maybe_set_fields(cfg, dir="a", no_such_field=1).dir == "a"
    assert maybe_set_fields(cfg.set(dir="b"), dir="a").dir == "b"
    data = FakeLmInput.default_config().set(is_training=False)
    assert maybe_set_fields(data, is_training=True).is_training is False
