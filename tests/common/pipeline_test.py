"""Tests of axlearn.common.pipeline."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axlearn.common.base_layer import BaseLayer, ParameterNoise
from axlearn.common.config import config_class, config_for_function
from axlearn.common.layers import Dropout, Linear
from axlearn.common.metrics import WeightedSummary
from axlearn.common.module import functional
from axlearn.common.pipeline import GPipeSchedule, Pipeline, StreamSchedule
from axlearn.common.repeat import _drop_by_regex

_DIM, _STAGES, _MICROBATCHES, _ROWS = 4, 3, 9, 2
_X = np.random.default_rng(0).normal(size=[_MICROBATCHES, _ROWS, _DIM]).astype(np.float32)
_SCHEDULES = [GPipeSchedule, StreamSchedule]
_KEEP_ALL = config_for_function(_drop_by_regex).set(rules=[])


class _Block(BaseLayer):
    """A dense layer that reports on itself."""

    @config_class
    class Config(BaseLayer.Config):
        """Configures `_Block`."""

        # The rate of dropout.
        rate: float = 0.0

    def __init__(self, cfg, *, parent):
        super().__init__(cfg, parent=parent)
        self._add_child("linear", Linear.default_config().set(input_dim=_DIM, output_dim=_DIM))
        self._add_child("dropout", Dropout.default_config().set(rate=cfg.rate))

    def forward(self, x):
        y = self.dropout(jnp.tanh(self.linear(x)))
        # A weight that differs between micro-batches.
        self.add_summary("weighted", WeightedSummary(jnp.mean(y), jnp.abs(y[0, 0])))
        self.add_summary("plain", jnp.mean(y))
        self.add_module_output("hidden", y)
        self.add_state_update("average", jnp.sum(y))
        self.add_state_update("last", (1000 * y[0, 0]).astype(jnp.int32))
        return y


def _build(*, schedule=GPipeSchedule, num_microbatches=_MICROBATCHES, **kwargs):
    cfg = Pipeline.default_config().set(
        name="pipeline",
        layer=_Block.default_config(),
        num_layers=_STAGES,
        num_microbatches=num_microbatches,
        schedule=schedule.default_config(),
    )
    pipeline = cfg.set(**kwargs).instantiate(parent=None)
    params = jax.jit(pipeline.initialize_parameters_recursively)(jax.random.PRNGKey(0))
    return pipeline, jax.tree.map(lambda w: w + 0.1, params)


def _loop(params, x):
    """The outputs of each stage, [num_stages, ...], one stage after another."""
    outputs = []
    for i in range(_STAGES):
        linear = params["layer"]["linear"]
        x = jnp.tanh(x @ linear["weight"][i] + jnp.broadcast_to(linear["bias"][i], x.shape))
        outputs.append(x)
    return jnp.stack(outputs)


def _call(pipeline, params, x=_X, *, key=None, is_training=False):
    """Outputs and output collection of `forward`, compiled."""
    call = functools.partial(functional, pipeline, key, is_training=is_training, drop_output_collections=())
    return jax.jit(lambda params, x: call(params, (x,)))(params, x)


@pytest.mark.parametrize("schedule", _SCHEDULES)
@pytest.mark.parametrize("num_microbatches", [_STAGES, _MICROBATCHES])
def test_a_pipeline_equals_one_stage_after_another_in_values_and_gradients(schedule, num_microbatches):
    pipeline, params = _build(schedule=schedule, num_microbatches=num_microbatches)
    x = jnp.asarray(_X[:num_microbatches])

    def loss(params, x):
        y, _ = functional(pipeline, None, params, (x,), is_training=True)
        return jnp.sum(jnp.sin(y)), y

    def expected_loss(params, x):
        y = _loop(params, x)[-1]
        return jnp.sum(jnp.sin(y)), y

    grads, y = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, x)
    expected_grads, expected = jax.jit(jax.grad(expected_loss, argnums=(0, 1), has_aux=True))(params, x)
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        (dict(grads[0]), grads[1]),
        (dict(expected_grads[0]), expected_grads[1]),
    )


def test_gpipe_takes_fewer_micro_batches_than_stages():
    for num_microbatches in (1, 2):
        pipeline, params = _build(num_microbatches=num_microbatches)
        x = _X[:num_microbatches]
        y, _ = _call(pipeline, params, x)
        np.testing.assert_allclose(y, _loop(params, x)[-1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("schedule", _SCHEDULES)
def test_the_bubble_leaves_no_summaries_updates_or_outputs_behind(schedule):
    pipeline, params = _build(schedule=schedule, drop_output=_KEEP_ALL)
    _, collection = _call(pipeline, params)
    stages = np.asarray(_loop(params, _X))  # [stage, microbatch, row, dim]
    assert sorted(collection.summaries) == [f"layer{i}" for i in range(_STAGES)]
    for i, y in enumerate(stages):
        means, weights = y.mean((1, 2)), np.abs(y[:, 0, 0])
        summaries = collection.summaries[f"layer{i}"]
        np.testing.assert_allclose(summaries["plain"], means.mean(), rtol=1e-5)
        np.testing.assert_allclose(
            summaries["weighted"].mean, (means * weights).sum() / weights.sum(), rtol=1e-5
        )
        np.testing.assert_allclose(summaries["weighted"].weight, weights.sum(), rtol=1e-5)
    updates = collection.state_updates["layer"]
    np.testing.assert_allclose(updates["average"], stages.sum((2, 3)).mean(1), rtol=1e-5)
    np.testing.assert_allclose(updates["last"], 1000 * stages[:, -1, 0, 0], atol=1)
    np.testing.assert_allclose(collection.module_outputs["layer"]["hidden"], stages, rtol=1e-5, atol=1e-6)


def test_module_outputs_are_dropped_unless_a_rule_keeps_them():
    pipeline, params = _build()
    assert not jax.tree.leaves(_call(pipeline, params)[1].module_outputs)


def test_nothing_in_the_bubble_makes_gradients_nan():
    class _Log(BaseLayer):
        """Is NaN, as is its derivative, on anything but what the test puts in, and zeros most of all."""

        @config_class
        class Config(BaseLayer.Config):
            """Configures `_Log`."""

        def forward(self, x):
            return jnp.exp(jnp.log(x))

    for schedule in _SCHEDULES:
        pipeline, params = _build(schedule=schedule, layer=_Log.default_config())
        x = 1 + jnp.abs(_X)
        loss = lambda x, p=pipeline, w=params: jnp.sum(functional(p, None, w, (x,), is_training=True)[0])  # noqa: E731
        np.testing.assert_allclose(jax.jit(jax.grad(loss))(x), np.ones_like(x), rtol=1e-5)


def test_dropout_differs_between_stages_and_micro_batches_and_not_between_schedules():
    outputs = []
    for schedule in _SCHEDULES:
        pipeline, params = _build(
            schedule=schedule, drop_output=_KEEP_ALL, layer=_Block.default_config().set(rate=0.5)
        )
        ones = jax.tree.map(jnp.ones_like, params)
        _, collection = _call(pipeline, ones, jnp.ones_like(_X), key=jax.random.PRNGKey(3), is_training=True)
        outputs.append(np.asarray(collection.module_outputs["layer"]["hidden"]))
    kept = (outputs[0] != 0).reshape(_STAGES * _MICROBATCHES, -1)
    # Of 27 masks of eight bits, some are equal by chance.
    assert len({tuple(mask) for mask in kept}) > 20
    assert 0.3 < kept.mean() < 0.7
    np.testing.assert_array_equal(outputs[0] != 0, outputs[1] != 0)


def test_stages_begin_with_different_parameters_that_lie_on_different_devices():
    pipeline, params = _build()
    weights = np.asarray(params["layer"]["linear"]["weight"])
    assert weights.shape == (_STAGES, _DIM, _DIM)
    assert np.abs(weights[0] - weights[1]).max() > 1e-2
    spec = pipeline.create_parameter_specs_recursively()["layer"]["linear"]["weight"]
    assert (spec.shape, spec.mesh_axes[0]) == ((_STAGES, _DIM, _DIM), "pipeline")


def test_parameter_noise_differs_between_stages():
    class _Noise(ParameterNoise):
        """Adds one random number to each parameter."""

        @config_class
        class Config(ParameterNoise.Config):
            """Configures `_Noise`."""

        def apply(self, prng_key, params):
            return jax.tree.map(lambda w: w + jax.random.normal(prng_key), params)

    layer = _Block.default_config()
    pipeline, params = _build(layer=layer.set(param_noise=_Noise.default_config()))
    noisy = pipeline.apply_parameter_noise_recursively(jax.random.PRNGKey(0), params)
    added = noisy["layer"]["linear"]["weight"] - params["layer"]["linear"]["weight"]
    np.testing.assert_allclose(added, jnp.broadcast_to(added[:, :1, :1], added.shape), atol=1e-6)
    assert len({round(float(x), 4) for x in added[:, 0, 0]}) == _STAGES


def test_a_second_call_does_not_trace_again():
    pipeline, params = _build(schedule=StreamSchedule)
    traces = []

    @jax.jit
    def forward(params, x):
        traces.append(1)
        return functional(pipeline, None, params, (x,), is_training=False)[0]

    forward(params, _X)
    forward(params, 2 * _X)
    assert len(traces) == 1


def test_schedules_know_their_bubble():
    cfg = GPipeSchedule.default_config().set(num_stages=2, num_microbatches=16)
    assert cfg.instantiate().num_steps == 17
    assert cfg.instantiate().bubble_fraction == 1 / 17


def test_a_stream_needs_as_many_micro_batches_for_each_stage():
    with pytest.raises(ValueError) as e:
        _build(schedule=StreamSchedule, num_microbatches=4)
    assert str(e.value).startswith(
        "StreamSchedule: num_microbatches=4 for num_stages=3.\n  Expected a multiple of the number of stages: each "
        "holds the same number of micro-batches. Did you mean 3 or 6? Or use GPipeSchedule, which takes any number."
    )
    with pytest.raises(ValueError, match="num_microbatches=0"):
        _build(num_microbatches=0)
