"""Tests of axlearn.common.attention: sharding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from axlearn.common.attention import TransformerLayer, set_double_shard_weights_config
from axlearn.common.layers import Embedding, Linear
from axlearn.common.module import functional
from axlearn.common.utils import build_mesh, maybe_shard, use_mesh
from tests.common.attention.layer_configs import (
    DIM,
    llama_layer_config,
    llama_stack_config,
    normal,
    random_params,
)

# As in the recipes, with all three kinds of parallelism at once.
_MESH_AXIS_NAMES, _MESH_SHAPE = ("data", "expert", "fsdp", "seq", "model"), (2, 1, 2, 1, 2)
_AXES = {
    "batch_axis_names": ("data", "expert", "fsdp"),
    "fsdp_axis_names": ("expert", "fsdp", "seq"),
    "tp_axis_names": "model",
}


def test_double_sharding_prints_as_in_the_reference_dump(reference_dump):
    prefix = "model.decoder.transformer.layer."
    expected = [
        line.removeprefix(prefix)
        for line in reference_dump
        if line.startswith(prefix) and "partition_spec" in line
    ]
    cfg = llama_layer_config()
    set_double_shard_weights_config(cfg, **_AXES)
    assert [line for line in str(cfg).splitlines() if "partition_spec" in line] == expected


def test_several_layers_are_set_at_once_and_activations_of_attention_on_request():
    layers = [TransformerLayer.default_config(), llama_layer_config()]
    set_double_shard_weights_config(layers, set_attn_activation_specs=True)
    for cfg in layers:
        assert cfg.feed_forward.linear2.param_partition_spec == ("model", "fsdp")
        output_linear = cfg.self_attention.attention.output_linear
        assert output_linear.output_partition_spec == (("data", "fsdp"), "seq", "model")
    assert layers[0].self_attention.attention.input_linear.layer.param_partition_spec == (
        "fsdp",
        "model",
        None,
    )
    with pytest.raises(
        TypeError, match=r"(?s)RepeatedTransformerLayer.*pass the config of the layer in the stack"
    ):
        set_double_shard_weights_config(llama_stack_config())


def _check_product(layer, *, method, x_spec, x_dim):
    """Compares one product and its gradients on the mesh with those on one device."""
    params = random_params(layer)
    x = normal(4, 6, x_dim)

    def loss(params, x):
        outputs, _ = functional(layer, None, params, (x,), method=method, is_training=True)
        outputs = maybe_shard(outputs, (("data", "fsdp"), None, "model"))
        return jnp.sum(jnp.sin(outputs)), outputs

    step = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    expected = jax.jit(step)(params, x)
    mesh = build_mesh(mesh_shape=_MESH_SHAPE, mesh_axis_names=_MESH_AXIS_NAMES)
    with use_mesh(mesh):
        shardings = jax.tree.map(
            lambda spec: NamedSharding(mesh, spec.mesh_axes), layer.create_parameter_specs_recursively()
        )
        x = jax.device_put(x, NamedSharding(mesh, x_spec))
        actual = jax.jit(step)(jax.device_put(params, shardings), x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), actual, expected)


_SPLIT_TWICE = PartitionSpec(("data", "fsdp"), None, "model")


@pytest.mark.parametrize(
    ("param_spec", "x_spec"),
    [(("model", "fsdp"), _SPLIT_TWICE), (("fsdp", "model"), PartitionSpec(("data", "fsdp")))],
)
def test_products_with_weights_split_twice_are_right(param_spec, x_spec):
    """XLA's partitioner alone gets the first of them wrong; see `gather_weight`."""
    cfg = Linear.default_config().set(
        name="linear",
        input_dim=24,
        output_dim=16,
        param_partition_spec=param_spec,
        output_partition_spec=(("data", "fsdp"), None, "model"),
    )
    _check_product(cfg.instantiate(parent=None), method="forward", x_spec=x_spec, x_dim=24)


def test_tied_logits_with_a_table_split_twice_are_right():
    cfg = Embedding.default_config().set(
        name="emb", num_embeddings=32, dim=16, param_partition_spec=("fsdp", "model")
    )
    _check_product(cfg.instantiate(parent=None), method="attend", x_spec=_SPLIT_TWICE, x_dim=16)


def test_a_sharded_stack_equals_an_unsharded_one_in_values_and_gradients():
    cfg = llama_stack_config()
    set_double_shard_weights_config(cfg.layer, **_AXES, set_attn_activation_specs=True)
    layer = cfg.instantiate(parent=None)
    params = random_params(layer)
    x = normal(4, 6, DIM)

    def loss(params, x):
        outputs, _ = functional(layer, None, params, {"data": x}, is_training=True)
        return jnp.mean(jnp.square(outputs.data))

    expected = jax.jit(jax.value_and_grad(loss))(params, x)
    mesh = build_mesh(mesh_shape=_MESH_SHAPE, mesh_axis_names=_MESH_AXIS_NAMES)
    with use_mesh(mesh):
        shardings = jax.tree.map(
            lambda spec: NamedSharding(mesh, spec.mesh_axes), layer.create_parameter_specs_recursively()
        )
        sharded_params = jax.device_put(params, shardings)
        sharded_x = jax.device_put(x, NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
        step = jax.jit(jax.value_and_grad(loss), out_shardings=(None, shardings))
        compiled = step.lower(sharded_params, sharded_x).compile()
        actual = compiled(sharded_params, sharded_x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), actual, expected)
    weight = sharded_params["repeat"]["layer"]["feed_forward"]["linear1_0"]["weight"]
    assert weight.addressable_shards[0].data.size * 4 == weight.size
    # Weights are gathered over fsdp, heads and hidden units summed over model.
    text = compiled.as_text()
    assert "all-gather" in text
    assert "all-reduce" in text


def test_a_sharded_decoding_equals_an_unsharded_one():
    cfg = llama_stack_config()
    set_double_shard_weights_config(cfg.layer, **_AXES)
    cfg.layer.self_attention.attention.kv_cache.kv_partition_spec = (("data", "fsdp"), None, "model", None)
    layer = cfg.instantiate(parent=None)
    params = random_params(layer)
    x = normal(4, 6, DIM)

    @jax.jit
    def decode(params, x):
        states = layer.init_states(batch_size=4, max_len=8)
        inputs = {"cached_states": states, "data": x, "live_step_len": jnp.array([6, 1, 3, 0])}
        (states, output), _ = functional(layer, None, params, inputs, method="extend_step", is_training=False)
        return states, output.data

    expected = decode(params, x)
    mesh = build_mesh(mesh_shape=_MESH_SHAPE, mesh_axis_names=_MESH_AXIS_NAMES)
    with use_mesh(mesh):
        shardings = jax.tree.map(
            lambda spec: NamedSharding(mesh, spec.mesh_axes), layer.create_parameter_specs_recursively()
        )
        actual = decode(jax.device_put(params, shardings), x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), actual, expected)
