"""Metrics of a whole evaluation set, against numpy over all of its rows at once."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from axlearn.common.config import config_class
from axlearn.common.evaler import (
    CompositeMetricCalculator,
    Dependency,
    GlobalMetricCalculator,
    ModelSummaryAccumulator,
)
from axlearn.common.metrics import MetricAccumulator, WeightedSummary
from axlearn.common.module import nowrap
from tests.common.evaler.rows import NUM_ROWS, evaluate, live_log_probs_and_hits, model_and_params, rows


def test_the_numbers_are_those_of_all_rows_however_they_are_cut_into_batches(tmp_path):
    summaries = evaluate(ModelSummaryAccumulator.default_config(), dir=str(tmp_path))
    log_probs, hits = live_log_probs_and_hits()
    num_bytes = rows()["target_num_bytes"].sum()
    expected = {
        "cross_entropy_loss": -log_probs.mean(),
        "loss": -log_probs.mean(),
        "perplexity": math.exp(-log_probs.mean()),
        "accuracy": hits.mean(),
        "bits_per_byte": -log_probs.sum() / math.log(2) / num_bytes,
        "nats_per_byte": -log_probs.sum() / num_bytes,
    }
    for name, value in expected.items():
        assert float(summaries[name].value()) == pytest.approx(value, rel=1e-6), name
    assert summaries["cross_entropy_loss"].weight == len(log_probs)
    assert summaries["bits_per_byte"].weight == num_bytes
    # The batches are so uneven that neither a mean of means nor a mean over rows comes near.
    per_row = np.split(log_probs, np.cumsum((rows()["target_labels"] >= 0).sum(-1))[:-1])
    mean_of_rows = -np.mean([row.mean() for row in per_row if row.size])
    assert abs(mean_of_rows + log_probs.mean()) > 1e-2


def test_more_targets_than_float32_can_count_are_counted():
    accumulator = MetricAccumulator.default_config().instantiate()
    for mean in (1.0, 0.0, 0.0):
        accumulator.update({"x": WeightedSummary(np.float32(mean), np.float32(2**24 if mean else 1))})
    total = accumulator.summaries()["x"]
    assert total.weight == 2**24 + 2
    assert total.mean == 2**24 / (2**24 + 2)


class _RankOfLabels(GlobalMetricCalculator):
    """Which share of the set's live targets has a log probability below the set's median."""

    @config_class
    class Config(GlobalMetricCalculator.Config):
        pass

    @nowrap
    def calculate_metrics(self, *, input_batch, predict_outputs):
        labels = input_batch["target_labels"]
        x = predict_outputs["logits"].astype(np.float64)
        log_probs = x - np.log(np.exp(x).sum(-1, keepdims=True))
        live = np.take_along_axis(log_probs, np.maximum(labels, 0)[..., None], -1)[..., 0][labels >= 0]
        return {"median": np.median(live), "num_rows": float(len(labels))}


def test_a_global_metric_sees_all_rows_at_once(tmp_path):
    summaries = evaluate(_RankOfLabels.default_config().set(prefix="rank"), dir=str(tmp_path))
    log_probs, _ = live_log_probs_and_hits()
    assert summaries["rank"]["median"] == pytest.approx(np.median(log_probs), rel=1e-6)
    # The last batch was filled up.
    assert summaries["rank"]["num_rows"] == -(-NUM_ROWS // 8) * 8


def test_a_global_metric_of_a_method_without_rows_is_refused(tmp_path):
    cfg = _RankOfLabels.default_config().set(predict_method="score")
    with pytest.raises(
        ValueError, match=r"metric_calculator\.predict_method: 'score' returned a number at '1/loss'"
    ):
        evaluate(cfg, dir=str(tmp_path))


class _CountsScores(ModelSummaryAccumulator):
    """Compares what two other calculators made of each batch, in the place of running the model."""

    @config_class
    class Config(ModelSummaryAccumulator.Config):
        pass

    def _call_model(self, model_params, prng_key, input_batch, extra_inputs, *, method, method_kwargs):
        del model_params, prng_key, method, method_kwargs
        per_target, logits = extra_inputs["scores"]["per_target_loss"], extra_inputs["logits"]
        batch = self.input.dispatch_global_batch(input_batch)
        live = (batch["target_labels"] >= 0).astype(jnp.float32)
        confident = (jnp.max(logits, axis=-1) > 1).astype(jnp.float32) * live
        mean = jnp.sum(per_target * confident) / jnp.maximum(jnp.sum(confident), 1)
        return batch, (), {"confident_loss": WeightedSummary(mean, jnp.sum(confident))}


def _composite(*dependencies):
    return CompositeMetricCalculator.default_config().set(
        metric_calculators={
            "compare": _CountsScores.default_config().set(prefix=""),
            "score": ModelSummaryAccumulator.default_config().set(model_method="score"),
            "predict": ModelSummaryAccumulator.default_config().set(model_method="extract_logits"),
            "rank": _RankOfLabels.default_config(),
            "lm": ModelSummaryAccumulator.default_config(),
        },
        dependencies=dependencies,
    )


def test_a_composite_runs_calculators_behind_those_that_they_depend_on(tmp_path):
    cfg = _composite(Dependency("score", "compare", "scores"), Dependency("predict", "compare", "logits"))
    summaries = evaluate(cfg, dir=str(tmp_path))
    log_probs, _ = live_log_probs_and_hits()
    assert set(summaries) == {"confident_loss", "score", "predict", "rank", "lm", "eval_time_secs"}
    assert float(summaries["lm"]["loss"].mean) == pytest.approx(-log_probs.mean(), rel=1e-6)
    assert summaries["rank"]["median"] == pytest.approx(np.median(log_probs), rel=1e-6)
    assert 0 < summaries["confident_loss"].weight <= len(log_probs)
    assert np.isfinite(summaries["confident_loss"].mean)


@pytest.mark.parametrize(
    ("dependencies", "message"),
    [
        ([Dependency("scores", "rank")], r"dependencies\[0\]\.src: there is no calculator 'scores'"),
        (
            [Dependency("lm", "rank"), Dependency("rank", "lm")],
            r"dependencies: they go in a circle: .*lm -> rank|rank -> lm",
        ),
    ],
)
def test_dependencies_that_cannot_be_are_refused(dependencies, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        _composite(*dependencies).set(name="composite").instantiate(parent=None, model=model_and_params()[0])


def test_two_calculators_that_write_the_same_name_are_refused(tmp_path):
    lm = ModelSummaryAccumulator.default_config().set(prefix="")
    cfg = CompositeMetricCalculator.default_config().set(metric_calculators={"a": lm, "b": lm})
    with pytest.raises(ValueError, match=r"metric_calculator\.b: another calculator has summaries below"):
        evaluate(cfg, dir=str(tmp_path))


def test_an_entry_of_the_batch_is_not_replaced(tmp_path):
    cfg = CompositeMetricCalculator.default_config().set(
        metric_calculators={name: ModelSummaryAccumulator.default_config() for name in ("a", "b")},
        dependencies=[Dependency("a", "b", "input_ids")],
    )
    with pytest.raises(ValueError, match=r"metric_calculator\.b: the batch has an entry 'input_ids' already"):
        evaluate(cfg, dir=str(tmp_path))
