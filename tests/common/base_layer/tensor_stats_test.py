"""Statistics of intermediate values, against numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

from axlearn.common.base_layer import (
    BaseLayer,
    CompositeTensorStats,
    DefaultTensorStats,
    TensorMaxAbs,
    TensorRMSNorm,
)
from axlearn.common.module import functional


class Layer(BaseLayer):
    """Names two values."""

    def forward(self, x):
        self._add_tensor_stats("inputs", x)
        self._add_tensor_stats("outputs", 2 * x)
        return x


X = jnp.array([[1.0, -4.0], [2.0, 2.0]])


def summaries(tensor_stats):
    layer = Layer.default_config().set(name="layer", tensor_stats=tensor_stats).instantiate(parent=None)
    _, outputs = functional(layer, None, {}, (X,), is_training=False)
    return {path: float(value.mean) for path, value in outputs.summaries.items()}


def test_nothing_is_added_by_default():
    assert summaries(None) == {}


def test_the_default_is_the_norm_and_the_largest_value():
    rms = np.sqrt(np.mean(np.square(X)))
    assert summaries(DefaultTensorStats.default_config()) == pytest.approx(
        {
            "tensor_stats/inputs/rms_norm": rms,
            "tensor_stats/inputs/max_abs": 4.0,
            "tensor_stats/outputs/rms_norm": 2 * rms,
            "tensor_stats/outputs/max_abs": 8.0,
        }
    )


def test_a_composite_keeps_the_names_of_its_children():
    stats = CompositeTensorStats.default_config().set(
        tensor_stats={"a": TensorRMSNorm.default_config(), "b": TensorMaxAbs.default_config()}
    )
    assert set(summaries(stats)) == {
        f"tensor_stats/{name}/{stat}"
        for name in ("inputs", "outputs")
        for stat in ("a/rms_norm", "b/max_abs")
    }
