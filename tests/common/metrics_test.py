"""Summaries that add up, against numpy over all values at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axlearn.common.metrics import MaxSummary, MetricAccumulator, MinSummary, SumSummary, WeightedSummary
from axlearn.common.summary import ImageSummary, accumulate_summaries

numbers = st.floats(-100, 100, width=32)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(numbers, st.floats(0, 10, width=32)), min_size=1, max_size=6))
def test_weighted_summaries_add_up_to_the_weighted_mean(pairs):
    total = sum((WeightedSummary(mean, weight) for mean, weight in pairs[1:]), WeightedSummary(*pairs[0]))
    means, weights = np.array(pairs, np.float64).T
    np.testing.assert_allclose(total.weight, weights.sum(), rtol=1e-4)
    if len(pairs) > 1 and weights.sum() > 1e-3:
        np.testing.assert_allclose(total.value(), np.average(means, weights=weights), rtol=1e-3, atol=1e-3)


def test_a_mean_of_weight_zero_does_not_count():
    total = WeightedSummary(np.float32("nan"), 0.0) + WeightedSummary(2.0, 3.0)
    assert (float(total.mean), total.weight) == (2.0, 3.0)
    assert float((WeightedSummary(5.0, 0.0) + WeightedSummary(7.0, 0.0)).mean) == 0.0


def test_extremes_and_sums():
    values = [3.0, -1.0, 2.0]
    for cls, expected in ((MinSummary, -1.0), (MaxSummary, 3.0), (SumSummary, 4.0)):
        total = cls(values[0])
        for value in values[1:]:
            total = total.accumulate(cls(value))
        assert float(total.value()) == expected


def test_summaries_pass_through_jit_and_scan():
    def body(carry, x):
        return carry + WeightedSummary(mean=x, weight=jnp.float32(1)), MaxSummary(x)

    start = WeightedSummary(mean=jnp.float32(0), weight=jnp.float32(0))
    total, maxima = jax.jit(lambda xs: jax.lax.scan(body, start, xs))(jnp.arange(5, dtype=jnp.float32))
    assert (float(total.mean), float(total.weight)) == (2.0, 5.0)
    assert isinstance(maxima, MaxSummary)
    assert maxima.max.tolist() == [0, 1, 2, 3, 4]


def test_the_accumulator_adds_summaries_and_leaves_out_the_rest():
    accumulator = MetricAccumulator.default_config().instantiate()
    assert accumulator.summaries() == {}
    for mean in (1.0, 3.0):
        accumulator.update({"lm": {"loss": WeightedSummary(mean, 1.0)}, "lr": 0.1, "empty": {"x": 1.0}})
    summaries = accumulator.summaries()
    assert set(summaries) == {"lm"}
    assert float(summaries["lm"]["loss"].mean) == 2.0
    with pytest.raises(ValueError, match=r"differ from those before in \['lm/accuracy', 'lm/loss'\]"):
        accumulator.update({"lm": {"accuracy": WeightedSummary(1.0, 1.0)}})


def test_the_accumulator_prints_under_its_public_name():
    assert str(MetricAccumulator.default_config()) == "klass: 'axlearn.common.metrics.MetricAccumulator'"


def test_images_are_checked_and_the_first_ones_kept():
    image = ImageSummary(np.zeros((1, 2, 2, 3)))
    image.validate()
    assert (
        accumulate_summaries({"a": image, "n": 1}, {"a": ImageSummary(np.ones((1, 2, 2, 3))), "n": 2})["a"]
        is image
    )
    with pytest.raises(ValueError, match=r"images have shape \(2, 2\)"):
        ImageSummary(np.zeros((2, 2))).validate()
