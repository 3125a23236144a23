"""Layers: parameter specs, initialization, inherited settings, noise, summaries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from axlearn.common.base_layer import BaseLayer, FactorizationSpec, ParameterNoise, ParameterSpec
from axlearn.common.config import REQUIRED, Required, config_class
from axlearn.common.module import Module, functional
from axlearn.common.param_init import (
    ConstantInitializer,
    DefaultInitializer,
    FanAxes,
    GaussianInitializer,
)
from axlearn.common.utils import build_mesh, flatten_items, use_mesh


class Linear(BaseLayer):
    """x @ weight + bias."""

    @config_class
    class Config(BaseLayer.Config):
        input_dim: Required[int] = REQUIRED
        output_dim: Required[int] = REQUIRED

    def _create_layer_parameter_specs(self):
        cfg = self.config
        return {
            "weight": ParameterSpec(
                shape=(cfg.input_dim, cfg.output_dim),
                mesh_axes=cfg.param_partition_spec,
                factorization=FactorizationSpec(axes=("row", "col")),
            ),
            "bias": ParameterSpec(shape=[cfg.output_dim], dtype=jnp.float32, weight_decay_scale=0.0),
        }

    def forward(self, x):
        y = x @ self.parameters["weight"] + self.parameters["bias"][None]
        self._add_activation_summary(name="y", activations=y)
        return y


class Silent(BaseLayer):
    """Has no parameters."""

    def forward(self, x):
        return x


class Net(BaseLayer):
    """A linear map, a layer without parameters, a linear map."""

    @config_class
    class Config(BaseLayer.Config):
        dim: int = 4
        first: Linear.Config = Linear.default_config()
        second: Linear.Config = Linear.default_config()

    def __init__(self, cfg, *, parent):
        super().__init__(cfg, parent=parent)
        self._add_child("first", cfg.first.clone(input_dim=cfg.dim, output_dim=2 * cfg.dim))
        self._add_child("silent", Silent.default_config())
        self._add_child("second", cfg.second.clone(input_dim=2 * cfg.dim, output_dim=cfg.dim))

    def forward(self, x):
        return self.second(self.silent(self.first(x)))


def net(**kwargs):
    return Net.default_config().set(name="net", **kwargs).instantiate(parent=None)


def test_specs_are_completed_and_nested_by_child():
    cfg = Net.default_config().set(name="net", dtype=jnp.bfloat16)
    cfg.first.param_partition_spec = (["data", "fsdp"], "model")
    specs = cfg.instantiate(parent=None).create_parameter_specs_recursively()
    assert specs["silent"] == {}
    assert specs["first"]["weight"] == ParameterSpec(
        shape=(4, 8),
        dtype=jnp.bfloat16,
        mesh_axes=P(("data", "fsdp"), "model"),
        factorization=FactorizationSpec(axes=("row", "col")),
        fan_axes=FanAxes(in_axis=-2, out_axis=-1),
    )
    assert specs["first"]["weight"].fans() == {"fan_in": 4, "fan_out": 8, "fan_avg": 6}
    assert specs["second"]["bias"] == ParameterSpec(
        shape=[4], dtype=jnp.float32, mesh_axes=P(None), weight_decay_scale=0.0
    )
    with pytest.raises(ValueError, match="has no fan_axes"):
        specs["second"]["bias"].fans()


def test_a_partition_spec_of_the_wrong_length_is_refused_with_the_path():
    cfg = Net.default_config().set(name="net")
    cfg.second.param_partition_spec = ("model",)
    with pytest.raises(ValueError) as error:
        cfg.instantiate(parent=None).create_parameter_specs_recursively()
    assert str(error.value) == (
        "net.second.weight: the partition spec ('model',) has 1 entries, but the parameter has shape (8, "
        "4), of rank 2. "
        "Expected one entry per dimension, such as (None, None); see param_partition_spec."
    )


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_each_parameter_and_each_child_takes_one_split(impl):
    cfg = Net.default_config().set(name="net")
    cfg.param_init = DefaultInitializer.default_config().set(
        init_by_param_name={".*": GaussianInitializer.default_config().set(std=1.0)}
    )
    key = jax.random.key(0, impl=impl)
    params = cfg.instantiate(parent=None).initialize_parameters_recursively(key)

    def chain(key, num):
        keys = []
        for _ in range(num):
            key, key_i = jax.random.split(key)
            keys.append(key_i)
        return keys

    # Children: first, silent (which takes a split although it has no parameters), second.
    second_key = chain(key, 3)[2]
    weight_key, bias_key = chain(second_key, 2)
    # The keys are the matter here; the last bit of a normal sample is that of `param_init`.
    np.testing.assert_allclose(params["second"]["weight"], jax.random.normal(weight_key, (8, 4)), rtol=1e-6)
    np.testing.assert_allclose(params["second"]["bias"], jax.random.normal(bias_key, (4,)), rtol=1e-6)
    assert params["silent"] == {}


def test_parameters_do_not_depend_on_the_mesh():
    cfg = Net.default_config().set(name="net")
    cfg.first.param_partition_spec = ("data", "model")
    layer = cfg.instantiate(parent=None)
    key = jax.random.PRNGKey(0)
    # Outside of jit the last bit of a product may differ.
    expected = jax.jit(layer.initialize_parameters_recursively)(key)
    with use_mesh(build_mesh(mesh_shape=(4, 2), mesh_axis_names=("data", "model"))):
        shardings = jax.tree.map(lambda spec: spec.sharding, layer.create_parameter_specs_recursively())
        init = jax.jit(layer.initialize_parameters_recursively, out_shardings=shardings)
        params = init(key)
    assert params["first"]["weight"].sharding.spec == P("data", "model")
    for (path, got), (_, want) in zip(flatten_items(params), flatten_items(expected), strict=True):
        assert np.array_equal(got, want), path


def test_prebuilt_parameters_stay_out_and_do_not_move_the_others():
    layer = net()
    key = jax.random.PRNGKey(0)
    everything = layer.initialize_parameters_recursively(key)
    rest = layer.initialize_parameters_recursively(key, prebuilt={"first": {"weight": 1, "bias": None}})
    assert rest["first"]["weight"] is None
    assert np.array_equal(rest["first"]["bias"], everything["first"]["bias"])
    assert np.array_equal(rest["second"]["weight"], everything["second"]["weight"])


def test_type_and_initializer_come_from_the_nearest_layer_that_sets_them():
    ones = DefaultInitializer.default_config().set(
        init_by_param_name={".*weight": ConstantInitializer.default_config().set(value=1.0)}
    )
    cfg = Net.default_config().set(name="net", dtype=jnp.bfloat16, param_init=ones)
    cfg.second.dtype = jnp.float32
    cfg.second.param_init = DefaultInitializer.default_config()
    layer = cfg.instantiate(parent=None)
    assert layer.first.dtype() == jnp.bfloat16
    assert layer.second.dtype() == jnp.float32
    assert (
        Linear.default_config().set(name="x", input_dim=1, output_dim=1).instantiate(parent=None).dtype()
        == jnp.float32
    )
    params = layer.initialize_parameters_recursively(jax.random.PRNGKey(0))
    assert params["first"]["weight"].dtype == jnp.bfloat16
    assert params["first"]["bias"].dtype == jnp.float32
    assert np.all(np.asarray(params["first"]["weight"]) == 1)
    assert len(np.unique(params["second"]["weight"])) > 1


def test_the_parent_of_a_layer_may_be_another_kind_of_module():
    class Trainer(Module):
        def __init__(self, cfg, *, parent):
            super().__init__(cfg, parent=parent)
            self._add_child("model", Net.default_config())

    model = Trainer.default_config().set(name="trainer").instantiate(parent=None).model
    assert model.dtype() == jnp.float32
    assert model.param_init() is model.first.param_init()


def test_the_forward_pass_uses_the_parameters_and_adds_summaries():
    layer = net()
    params = layer.initialize_parameters_recursively(jax.random.PRNGKey(0))
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    y, outputs = functional(layer, None, params, (x,), is_training=False)
    hidden = x @ np.asarray(params["first"]["weight"]) + np.asarray(params["first"]["bias"])
    np.testing.assert_allclose(y, hidden @ np.asarray(params["second"]["weight"]), rtol=1e-5, atol=1e-6)
    summaries = outputs.summaries["first"]
    np.testing.assert_allclose(summaries["activations/y_mean"].mean, hidden.mean(), rtol=1e-4)
    np.testing.assert_allclose(
        summaries["activations/y_norm"].mean, np.linalg.norm(hidden, axis=-1).mean(), rtol=1e-5
    )
    assert summaries["activations/y_norm"].weight == 3


def test_padding_does_not_count_in_activation_summaries():
    class Layer(BaseLayer):
        def forward(self, x, paddings):
            self._add_activation_summary(name="x", activations=x, activation_paddings=paddings)

    layer = Layer.default_config().set(name="layer").instantiate(parent=None)
    x = jnp.array([[[1.0, 3.0], [100.0, 100.0]]])
    _, outputs = functional(layer, None, {}, (x, jnp.array([[0, 1]])), is_training=False)
    assert outputs.summaries["activations/x_mean"].mean == 2.0
    assert outputs.summaries["activations/x_mean"].weight == 1.0


class AddOne(ParameterNoise):
    """Adds one to everything below."""

    def apply(self, prng_key, params):
        return jax.tree.map(lambda x: x + 1, params)


def test_noise_is_applied_to_children_before_parents():
    cfg = Net.default_config().set(name="net", param_noise=AddOne.default_config())
    cfg.first.param_noise = AddOne.default_config()
    layer = cfg.instantiate(parent=None)
    params = jax.tree.map(jnp.zeros_like, layer.initialize_parameters_recursively(jax.random.PRNGKey(0)))
    noisy = layer.apply_parameter_noise_recursively(jax.random.PRNGKey(0), params)
    assert noisy["first"]["bias"].tolist() == [2.0] * 8
    assert noisy["second"]["bias"].tolist() == [1.0] * 4
    assert params["first"]["bias"].tolist() == [0.0] * 8
