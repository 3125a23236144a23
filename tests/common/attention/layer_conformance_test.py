"""Tests of axlearn.common.attention: the laws that every kind of transformer layer keeps.

A new kind is covered by adding its config to `layer_configs.LAYERS`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from axlearn.common.attention import set_double_shard_weights_config
from axlearn.common.module import functional
from axlearn.common.utils import build_mesh, use_mesh
from tests.common.attention.layer_configs import DIM, LAYERS, SOURCE_DIM, normal, random_params

_BATCH, _SEQ, _CHUNK = 4, 8, 4
_X = np.asarray(normal(_BATCH, _SEQ, DIM))
_SOURCE = normal(_BATCH, 5, SOURCE_DIM, seed=1)
_MESH_AXIS_NAMES, _MESH_SHAPE = ("pipeline", "data", "fsdp", "model"), (1, 2, 2, 2)


class _Case:
    """A layer with parameters and with compiled functions that are shared by the tests."""

    def __init__(self, name: str):
        cfg = LAYERS[name]().set(name="layer", input_dim=DIM)
        layers = cfg
        while not isinstance(layers, list) and "layer" in layers:
            layers = layers.layer
        set_double_shard_weights_config(layers)
        self.layer = cfg.instantiate(parent=None)
        self.params = random_params(self.layer)
        self.inputs = {"cross_attention_data": _SOURCE} if "cross-attention" in name else {}
        self.num_traces = 0
        self.forward = jax.jit(self._forward)
        self.extend = jax.jit(functools.partial(self._call, method="extend_step"))

    def _call(self, params, inputs, *, method="forward"):
        self.num_traces += 1
        outputs, _ = functional(
            self.layer, None, params, inputs | self.inputs, method=method, is_training=False
        )
        return outputs

    def _forward(self, params, data):
        return self._call(params, {"data": data}).data


@functools.cache
def _case(name: str) -> _Case:
    return _Case(name)


@functools.cache
def _outputs(name: str) -> np.ndarray:
    return np.asarray(_case(name).forward(_case(name).params, _X))


@pytest.mark.parametrize("name", LAYERS)
def test_a_token_influences_no_output_before_it(name):
    case, rows = _case(name), np.repeat(_X[:1], _BATCH, 0)
    first_changed = [1, 3, 6, _SEQ - 1]
    before = np.asarray(case.forward(case.params, rows))
    for row, t in enumerate(first_changed):
        rows[row, t:] = normal(_SEQ - t, DIM, seed=7)
    after = np.asarray(case.forward(case.params, rows))
    for row, t in enumerate(first_changed):
        np.testing.assert_array_equal(after[row, :t], before[row, :t])
        assert np.abs(after[row, t] - before[row, t]).max() > 1e-2


@pytest.mark.parametrize("name", LAYERS)
@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 1000))
def test_ragged_steps_equal_the_whole_sequence(name, seed):
    case, rng = _case(name), np.random.default_rng(seed)
    states = case.layer.init_states(batch_size=_BATCH, max_len=_SEQ)
    outputs, times = np.full(_X.shape, np.nan, np.float32), np.zeros([_BATCH], int)
    while times.min() < _SEQ:
        live = np.minimum(rng.integers(0, _CHUNK + 1, _BATCH), _SEQ - times)
        chunk = np.full([_BATCH, _CHUNK, DIM], 77.0, np.float32)
        for row, (time, num) in enumerate(zip(times, live, strict=True)):
            chunk[row, :num] = _X[row, time : time + num]
        inputs = {"cached_states": states, "data": chunk, "live_step_len": live.astype(np.int32)}
        states, step = case.extend(case.params, inputs)
        for row, (time, num) in enumerate(zip(times, live, strict=True)):
            outputs[row, time : time + num] = step.data[row, :num]
        times += live
    np.testing.assert_allclose(outputs, _outputs(name), rtol=1e-4, atol=1e-4)


# Half a minute of compiling.
_SLOW_SHARDED = ("pipelined-cross-attention", "repeated-cross-attention")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.scale if name in _SLOW_SHARDED else ()) for name in LAYERS],
)
def test_a_sharded_layer_equals_an_unsharded_one_in_values_and_gradients(name):
    case = _case(name)

    def loss(params, x):
        outputs = case._forward(params, x)
        return jnp.mean(jnp.sin(outputs)), outputs

    step = jax.value_and_grad(loss, has_aux=True)
    (_, expected), expected_grads = jax.jit(step)(case.params, _X)
    mesh = build_mesh(mesh_shape=_MESH_SHAPE, mesh_axis_names=_MESH_AXIS_NAMES)
    with use_mesh(mesh):
        shardings = jax.tree.map(
            lambda spec: NamedSharding(mesh, spec.mesh_axes), case.layer.create_parameter_specs_recursively()
        )
        params = jax.device_put(case.params, shardings)
        x = jax.device_put(_X, NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
        (_, outputs), grads = jax.jit(step)(params, x)
    split = [leaf for leaf in jax.tree.leaves(params) if not leaf.sharding.is_fully_replicated]
    assert len(split) >= 4
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), grads, expected_grads)


@pytest.mark.parametrize("name", LAYERS)
def test_a_second_call_does_not_trace_again(name):
    case = _case(name)
    case.forward(case.params, _X)
    num_traces = case.num_traces
    case.forward(jax.tree.map(lambda w: w + 1, case.params), 2 * _X)
    assert case.num_traces == num_traces
