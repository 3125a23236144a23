"""Tests of axlearn.common.repeat."""

import jax
import jax.numpy as jnp
import numpy as np

from axlearn.common.base_layer import BaseLayer
from axlearn.common.config import config_class
from axlearn.common.layers import Dropout, Linear
from axlearn.common.module import functional
from axlearn.common.repeat import Repeat, _drop_by_regex

_DIM, _LAYERS = 4, 3
_X = jnp.asarray(np.random.default_rng(0).normal(size=[2, _DIM]), jnp.float32)


class _Block(BaseLayer):
    """A dense layer that reports on itself."""

    @config_class
    class Config(BaseLayer.Config):
        """Configures `_Block`."""

    def __init__(self, cfg, *, parent):
        super().__init__(cfg, parent=parent)
        self._add_child("linear", Linear.default_config().set(input_dim=_DIM, output_dim=_DIM))

    def forward(self, x):
        y = jnp.tanh(self.linear(x))
        self.add_summary("mean", jnp.mean(y))
        self.add_module_output("hidden", y)
        self.add_state_update("count", jnp.sum(y))
        return y


def _build(**kwargs):
    cfg = Repeat.default_config().set(
        name="repeat", layer=_Block.default_config(), num_layers=_LAYERS, **kwargs
    )
    repeat = cfg.instantiate(parent=None)
    return repeat, jax.jit(repeat.initialize_parameters_recursively)(jax.random.PRNGKey(0))


def _loop(params):
    values, x = [], np.asarray(_X)
    for i in range(_LAYERS):
        linear = params["layer"]["linear"]
        x = np.tanh(x @ np.asarray(linear["weight"][i]) + np.asarray(linear["bias"][i]))
        values.append(x)
    return values


def test_repeat_equals_a_loop_with_summaries_and_updates_of_each_layer():
    repeat, params = _build()
    output, collection = functional(repeat, None, params, (_X,), is_training=True, drop_output_collections=())
    expected = _loop(params)
    np.testing.assert_allclose(output, expected[-1], rtol=1e-5, atol=1e-6)
    assert sorted(collection.summaries) == [f"layer{i}" for i in range(_LAYERS)]
    for i in range(_LAYERS):
        np.testing.assert_allclose(collection.summaries[f"layer{i}"]["mean"], expected[i].mean(), rtol=1e-4)
    sums = [x.sum() for x in expected]
    np.testing.assert_allclose(collection.state_updates["layer"]["count"], sums, rtol=1e-4)
    assert jax.tree.leaves(collection.module_outputs) == []


def test_module_outputs_are_stacked_when_they_are_not_dropped():
    repeat, params = _build(drop_output=None)
    _, collection = functional(repeat, None, params, (_X,), is_training=True, drop_output_collections=())
    np.testing.assert_allclose(
        collection.module_outputs["layer"]["hidden"], np.stack(_loop(params)), rtol=1e-5, atol=1e-6
    )


def test_unrolling_changes_nothing():
    repeat, params = _build(unroll=_LAYERS)
    output, _ = functional(repeat, None, params, (_X,), is_training=True)
    np.testing.assert_allclose(output, _loop(params)[-1], rtol=1e-5, atol=1e-6)


def test_layers_without_parameters_repeat_with_keys_of_their_own():
    cfg = Repeat.default_config().set(
        name="repeat", layer=Dropout.default_config().set(rate=0.5), num_layers=_LAYERS
    )
    repeat = cfg.instantiate(parent=None)
    x = jnp.ones([1000])
    output, _ = functional(repeat, jax.random.PRNGKey(0), {}, (x,), is_training=True)
    # With one mask for all, half would survive.
    assert abs(float(jnp.mean(output > 0)) - 0.5**_LAYERS) < 0.05
    assert set(np.unique(output)) == {0.0, 2.0**_LAYERS}


def test_drop_by_regex_matches_whole_paths():
    drop = _drop_by_regex(["module_outputs.*", "summaries/mean"])
    assert drop("module_outputs/a/b")
    assert drop("summaries/mean")
    assert not drop("summaries/mean/x")
    assert not drop("state_updates/module_outputs")
