"""Statistics of a layer's intermediate values, to log."""

import abc

import jax.numpy as jnp

from axlearn.common.config import Configurable, config_class
from axlearn.common.metrics import WeightedSummary
from axlearn.common.module import current_context
from axlearn.common.utils import Tensor


class TensorStats(Configurable):
    """Adds statistics of a tensor to the summaries of the layer that runs."""

    @abc.abstractmethod
    def add_stats(self, name: str, value: Tensor) -> None:
        """Adds the statistics.

        Args:
            name: Goes before the names of the statistics: `<name>/<statistic>`.
            value: The tensor.
        """


def _add_summary(name: str, value: Tensor) -> None:
    context = current_context()
    assert context is not None, "Tensor statistics are added by a layer that runs."
    context.add_summary(name, WeightedSummary(mean=value, weight=jnp.ones((), jnp.float32)))


class TensorRMSNorm(TensorStats):
    """The root mean square of all elements, as `rms_norm`."""

    def add_stats(self, name: str, value: Tensor) -> None:
        _add_summary(f"{name}/rms_norm", jnp.sqrt(jnp.mean(jnp.square(value.astype(jnp.float32)))))


class TensorMaxAbs(TensorStats):
    """The largest absolute value, as `max_abs`."""

    def add_stats(self, name: str, value: Tensor) -> None:
        _add_summary(f"{name}/max_abs", jnp.max(jnp.abs(value)).astype(jnp.float32))


class CompositeTensorStats(TensorStats):
    """Several statistics."""

    @config_class
    class Config(TensorStats.Config):
        """Configures CompositeTensorStats."""

        # The statistics by name.
        tensor_stats: dict[str, TensorStats.Config] = {}
        # Whether the names of this dict are left out of the names of summaries.
        inline_child_summaries: bool = False

    def __init__(self, cfg: "CompositeTensorStats.Config"):
        super().__init__(cfg)
        self._stats: dict[str, TensorStats] = {k: v.instantiate() for k, v in cfg.tensor_stats.items()}

    def add_stats(self, name: str, value: Tensor) -> None:
        for child_name, stats in self._stats.items():
            stats.add_stats(name if self.config.inline_child_summaries else f"{name}/{child_name}", value)


class DefaultTensorStats(CompositeTensorStats):
    """The root mean square and the largest absolute value."""

    @config_class
    class Config(CompositeTensorStats.Config):
        """Configures DefaultTensorStats."""

        tensor_stats: dict[str, TensorStats.Config] = {
            "norm": TensorRMSNorm.default_config(),
            "max": TensorMaxAbs.default_config(),
        }
        inline_child_summaries: bool = True
