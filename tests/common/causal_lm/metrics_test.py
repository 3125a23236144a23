"""Losses and summaries: against numpy, exact when batches are added up, and what their configs mean."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axlearn.common.causal_lm import (
    AuxLossMetrics,
    BaseLossMetrics,
    CompositeLossMetrics,
    CrossEntropyLossMetrics,
    LossOutputs,
    metrics_config,
)
from axlearn.common.config import config_class
from axlearn.common.metrics import MetricAccumulator, WeightedSummary
from axlearn.common.module import functional

VOCAB_SIZE = 9


def _batch(seed: int, *, num_rows: int = 2):
    """A batch with its logits; every third batch has no live target at all."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(-4, VOCAB_SIZE, size=(num_rows, 6)).astype(np.int32)
    if seed % 3 == 2:
        labels[:] = -1
    num_bytes = ((labels >= 0).sum(1) * rng.integers(1, 5, size=num_rows)).astype(np.int32)
    logits = (2 * rng.normal(size=(num_rows, 6, VOCAB_SIZE))).astype(np.float32)
    return {"target_labels": labels, "target_num_bytes": num_bytes}, logits


def _jit_metrics(cfg: BaseLossMetrics.Config, *, is_training=False):
    metrics = cfg.clone(name="metrics").instantiate(parent=None)
    return jax.jit(lambda inputs: functional(metrics, None, {}, inputs, is_training=is_training)[0])


def _evaluate(cfg: BaseLossMetrics.Config, batch, *, logits, module_outputs=None, is_training=False):
    inputs = {
        "input_batch": batch,
        "predict_outputs": {"logits": logits},
        "module_outputs": module_outputs or {},
    }
    return _jit_metrics(cfg, is_training=is_training)(inputs)


def _cross_entropies(batch, logits) -> np.ndarray:
    """[num_live] float64."""
    x = logits.astype(np.float64)
    log_probs = x - np.log(np.exp(x).sum(-1, keepdims=True))
    labels = batch["target_labels"]
    live = batch.get("live_targets", labels >= 0)
    return -np.take_along_axis(log_probs, np.maximum(labels, 0)[..., None], -1)[..., 0][live]


def test_summaries_of_many_batches_add_up_to_those_of_one():
    evaluate = _jit_metrics(metrics_config())
    accumulator = MetricAccumulator.default_config().instantiate()
    all_ce, all_bytes = [], 0
    for seed in range(7):
        batch, logits = _batch(seed)
        inputs = {"input_batch": batch, "predict_outputs": {"logits": logits}, "module_outputs": {}}
        outputs = evaluate(inputs)
        accumulator.update({"loss": outputs.loss, **outputs.summaries})
        all_ce.append(_cross_entropies(batch, logits))
        all_bytes += batch["target_num_bytes"].sum()
    ce = np.concatenate(all_ce)
    expected = {
        "loss": ce.mean(),
        "cross_entropy_loss": ce.mean(),
        "perplexity": math.exp(ce.mean()),
        "nats_per_byte": ce.sum() / all_bytes,
        "bits_per_byte": ce.sum() / all_bytes / math.log(2),
    }
    summaries = accumulator.summaries()
    for name, value in expected.items():
        assert float(summaries[name].value()) == pytest.approx(value, rel=1e-6), name
    assert summaries["nats_per_byte"].weight == all_bytes
    assert summaries["loss"].weight == len(ce)


def test_bytes_are_left_out_where_the_batch_does_not_count_them():
    batch, logits = _batch(0)
    del batch["target_num_bytes"]
    assert set(_evaluate(metrics_config(), batch, logits=logits).summaries) == {
        "cross_entropy_loss",
        "perplexity",
        "accuracy",
        "z_loss",
    }


def test_live_targets_are_counted_per_row_while_training_only():
    batch, logits = _batch(0)
    outputs = _evaluate(metrics_config(), batch, logits=logits, is_training=True)
    live = outputs.summaries["train_live_targets"]
    assert live.mean * live.weight == (batch["target_labels"] >= 0).sum()
    assert live.weight == 2


def test_explicit_live_targets_decide():
    batch, logits = _batch(1)
    batch["live_targets"] = np.random.default_rng(0).integers(0, 2, size=(2, 6)).astype(bool)
    outputs = _evaluate(metrics_config(), batch, logits=logits)
    assert float(outputs.loss.mean) == pytest.approx(_cross_entropies(batch, logits).mean(), rel=1e-6)
    np.testing.assert_array_equal(outputs.live_targets, batch["live_targets"])


def test_the_z_loss_enters_the_loss_by_its_scale_and_its_summary_without():
    batch, logits = _batch(0)
    cfg = CrossEntropyLossMetrics.default_config().set(z_loss_scale=0.5)
    outputs = _evaluate(cfg, batch, logits=logits)
    ce, z = outputs.summaries["cross_entropy_loss"].mean, outputs.summaries["z_loss"].mean
    assert float(outputs.loss.mean) == pytest.approx(float(ce + 0.5 * z), rel=1e-6)
    assert "z_loss_scale: 0.5" in cfg.debug_string()
    assert "z_loss_scale" not in CrossEntropyLossMetrics.default_config().debug_string()


# Layer outputs: a scanned layer's values are stacked.
_OUTPUTS = {
    "decoder": {"moe": {"aux_loss": jnp.asarray([1.0, 3.0])}, "dense": {"aux_loss": jnp.asarray(6.0)}},
    "other": jnp.asarray(100.0),
}


def test_auxiliary_losses_are_the_mean_of_what_the_pattern_matches():
    batch, logits = _batch(0)
    cfg = AuxLossMetrics.default_config().set(aux_loss_regex=".*/aux_loss")
    outputs = _evaluate(cfg, batch, logits=logits, module_outputs=_OUTPUTS)
    assert outputs.loss.mean == (2 + 6) / 2
    assert outputs.summaries["aux_loss"].mean == 4


def test_a_pattern_that_matches_nothing_is_refused():
    batch, logits = _batch(0)
    cfg = AuxLossMetrics.default_config().set(aux_loss_regex=".*/aux_los")
    with pytest.raises(ValueError, match=r"(?s)metrics\.aux_loss_regex.*decoder/dense/aux_loss"):
        _evaluate(cfg, batch, logits=logits, module_outputs=_OUTPUTS)


def _two_losses(**settings) -> CompositeLossMetrics.Config:
    cfg = metrics_config().set(**settings)
    cfg.metrics["aux"].aux_loss_regex = ".*/aux_loss"
    return cfg


@pytest.mark.parametrize(
    ("loss_weights", "of_lm", "of_aux"),
    [(None, 1, 1), ({"lm": 1.0, "aux": 0.25}, 1, 0.25), ({"aux": 2.0}, 0, 2)],
)
def test_the_composite_loss_is_the_weighted_sum(loss_weights, of_lm, of_aux):
    batch, logits = _batch(0)
    cfg = _two_losses(loss_weights=loss_weights)
    outputs = _evaluate(cfg, batch, logits=logits, module_outputs=_OUTPUTS)
    expected = of_lm * _cross_entropies(batch, logits).mean() + of_aux * 4
    assert float(outputs.loss.mean) == pytest.approx(expected, rel=1e-6)


def test_summaries_go_under_their_metric_unless_flattened():
    batch, logits = _batch(0)
    cfg = _two_losses(flatten_metrics=["lm"])
    outputs = _evaluate(cfg, batch, logits=logits, module_outputs=_OUTPUTS)
    assert set(outputs.summaries["aux"]) == {"aux_loss"}
    assert "accuracy" in outputs.summaries


def test_two_summaries_of_one_name_are_refused():
    batch, logits = _batch(0)
    cfg = _two_losses()
    cfg.metrics["again"] = CrossEntropyLossMetrics.default_config()
    with pytest.raises(ValueError, match=r"metrics\.again: two metrics have a summary 'cross_entropy_loss'"):
        _evaluate(cfg, batch, logits=logits, module_outputs=_OUTPUTS)


@pytest.mark.parametrize("settings", [{"loss_weights": {"ml": 1.0}}, {"flatten_metrics": ["ml"]}])
def test_an_unknown_metric_is_refused(settings):
    with pytest.raises(ValueError, match=r"(?s)no metric 'ml'.*aux, lm"):
        metrics_config().set(name="metrics", **settings).instantiate(parent=None)


def test_a_metric_of_one_s_own_takes_part():
    class Constant(BaseLossMetrics):
        @config_class
        class Config(BaseLossMetrics.Config):
            value: float = 2.5

        def forward(self, input_batch, *, predict_outputs, module_outputs):
            del input_batch, predict_outputs, module_outputs
            return LossOutputs(loss=WeightedSummary(self.config.value, 1.0), summaries={})

    batch, logits = _batch(0)
    cfg = metrics_config()
    cfg.metrics["constant"] = Constant.default_config()
    outputs = _evaluate(cfg, batch, logits=logits)
    assert float(outputs.loss.mean) == pytest.approx(_cross_entropies(batch, logits).mean() + 2.5, rel=1e-6)
