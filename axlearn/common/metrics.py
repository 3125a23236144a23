"""Metrics that add up correctly over batches of different weight, and what adds them up."""

import dataclasses
from typing import Any, Union

import jax
import jax.numpy as jnp
import numpy as np

from axlearn.common.config import Configurable
from axlearn.common.summary import Summary, accumulate_summaries, is_summary
from axlearn.common.utils import Nested, Tensor, flatten_items, prune_tree

_Scalar = Union[Tensor, float, int]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WeightedSummary(Summary):
    """A mean together with the weight it stands for. `a + b` is the mean over both.

    Attributes:
        mean: The mean.
        weight: The weight, at least 0; where it is 0 the mean does not count.
    """

    mean: _Scalar
    weight: _Scalar

    def value(self) -> _Scalar:
        return self.mean

    def __add__(self, other: "WeightedSummary") -> "WeightedSummary":
        xp, (mean, weight, other_mean, other_weight) = _widest(
            self.mean, self.weight, other.mean, other.weight
        )
        total_weight = weight + other_weight
        # Weights of zero: the means do not count, not even if they are NaN.
        total = (
            xp.where(weight > 0, mean, 0) * weight + xp.where(other_weight > 0, other_mean, 0) * other_weight
        )
        return WeightedSummary(mean=total / xp.where(total_weight > 0, total_weight, 1), weight=total_weight)

    def accumulate(self, other: Summary) -> "WeightedSummary":
        assert isinstance(other, WeightedSummary), type(other)
        return self + other


def _widest(*values: _Scalar) -> tuple[Any, list[Any]]:
    """The library to compute with, and the values as its arrays.

    That is jax's for arrays of a device and under jit. Values of the host are float64 of numpy: an evaluation
    may have more targets than the 2**24 up to which float32 counts.
    """
    if any(isinstance(value, jax.Array) for value in values):
        return jnp, [jnp.asarray(value) for value in values]
    return np, [np.asarray(value, np.float64) for value in values]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MinSummary(Summary):
    """The smallest of the values seen.

    Attributes:
        min: The value.
    """

    min: _Scalar

    def value(self) -> _Scalar:
        return self.min

    def accumulate(self, other: Summary) -> "MinSummary":
        assert isinstance(other, MinSummary), type(other)
        return MinSummary(jnp.minimum(self.min, other.min))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MaxSummary(Summary):
    """The largest of the values seen.

    Attributes:
        max: The value.
    """

    max: _Scalar

    def value(self) -> _Scalar:
        return self.max

    def accumulate(self, other: Summary) -> "MaxSummary":
        assert isinstance(other, MaxSummary), type(other)
        return MaxSummary(jnp.maximum(self.max, other.max))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SumSummary(Summary):
    """The sum of the values seen.

    Attributes:
        sum: The value.
    """

    sum: _Scalar

    def value(self) -> _Scalar:
        return self.sum

    def accumulate(self, other: Summary) -> "SumSummary":
        assert isinstance(other, SumSummary), type(other)
        _, (value, other_value) = _widest(self.sum, other.sum)
        return SumSummary(value + other_value)


class MetricAccumulator(Configurable):
    """Adds up the summaries of the batches of an evaluation.

    What is no Summary says nothing about how to combine it, and is left out. Values that were fetched from the
    device add up in float64.
    """

    def __init__(self, cfg: "MetricAccumulator.Config"):
        super().__init__(cfg)
        self._summaries: Any = None

    def update(self, summaries: Nested[Any]) -> None:
        """Adds the summaries of a batch.

        Args:
            summaries: Nested dicts of summaries, alike for every batch.

        Raises:
            ValueError: If the names differ from those of the batches before.
        """
        new = prune_tree(
            summaries, lambda _, node: not (is_summary(node) or (isinstance(node, dict) and node))
        )
        if self._summaries is None:
            self._summaries = new
            return
        before, now = (
            {path for path, _ in flatten_items(tree, is_leaf=is_summary)} for tree in (self._summaries, new)
        )
        if before != now:
            raise ValueError(
                f"Summaries of this batch differ from those before in {sorted(before ^ now)}. Expected the "
                "same names."
            )
        self._summaries = accumulate_summaries(self._summaries, new)

    def summaries(self) -> Nested[Summary]:
        """The summaries added up so far: nested dicts, empty before the first batch."""
        return {} if self._summaries is None else self._summaries
