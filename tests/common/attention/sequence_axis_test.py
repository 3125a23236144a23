"""Attention over sequences that are split between devices: the same numbers, and only keys and values travel."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from axlearn.common.attention import (
    FusedGroupedQKVLinear,
    FusedQKVLinear,
    GroupedQKVLinear,
    GroupedQueryAttention,
    QKVLinear,
    RoFormerQKVLinear,
)
from axlearn.common.module import functional
from axlearn.common.utils import build_mesh, use_mesh

_BATCH, _SEQ, _DIM, _HEADS, _KV_HEADS = 4, 32, 16, 4, 2
_AXES = ("fsdp", "seq", "model")
_WEIGHT = (("fsdp", "seq"), "model", None)
_QKV = {
    "separate": QKVLinear.default_config(),
    "fused": FusedQKVLinear.default_config(),
    "grouped": GroupedQKVLinear.default_config().set(num_kv_heads=_KV_HEADS),
    "fused grouped": FusedGroupedQKVLinear.default_config().set(num_kv_heads=_KV_HEADS),
}


def _layer(kind: str) -> GroupedQueryAttention:
    qkv = _QKV[kind].clone()
    qkv.layer.param_partition_spec = _WEIGHT
    cfg = GroupedQueryAttention.default_config().set(
        name="attention", query_dim=_DIM, key_dim=_DIM, value_dim=_DIM, num_heads=_HEADS, causal=True
    )
    cfg.input_linear = RoFormerQKVLinear.default_config().set(input_linear=qkv, rotary_value=False)
    cfg.output_linear.param_partition_spec = _WEIGHT
    return cfg.instantiate(parent=None)


def _loss_and_grads(layer):
    def loss(params, inputs):
        output, _ = functional(layer, None, params, inputs, is_training=True)
        return jnp.sum(jnp.sin(output.data)), output.data

    return jax.value_and_grad(loss, has_aux=True)


def _inputs() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    segment_ids = np.ones((_BATCH, _SEQ), np.int32)
    # A boundary of segments within the part of one device.
    segment_ids[1, 13:] = 2
    return {
        "query": rng.standard_normal((_BATCH, _SEQ, _DIM)).astype(np.float32),
        "segment_ids": segment_ids,
        "query_positions": np.tile(np.arange(_SEQ, dtype=np.int32), (_BATCH, 1)),
    }


def _compiled_on(mesh_shape: tuple[int, ...], kind: str):
    """Returns the compiled gradients with sequences split over "seq", and what they give."""
    layer = _layer(kind)
    params = layer.initialize_parameters_recursively(jax.random.PRNGKey(0))
    with use_mesh(build_mesh(mesh_shape=mesh_shape, mesh_axis_names=_AXES)) as mesh:
        specs = layer.create_parameter_specs_recursively()
        params = jax.device_put(params, jax.tree.map(lambda spec: spec.sharding, specs))
        inputs = jax.device_put(_inputs(), NamedSharding(mesh, P("fsdp", "seq")))
        compiled = jax.jit(_loss_and_grads(layer)).lower(params, inputs).compile()
        return compiled.as_text(), jax.tree.map(np.asarray, compiled(params, inputs))


@pytest.mark.parametrize("kind", _QKV)
@pytest.mark.parametrize("mesh_shape", [(1, 8, 1), (1, 2, 4), (2, 2, 2)])
def test_outputs_and_gradients_do_not_depend_on_how_sequences_are_split(kind, mesh_shape):
    layer = _layer(kind)
    params = layer.initialize_parameters_recursively(jax.random.PRNGKey(0))
    expected = jax.jit(_loss_and_grads(layer))(params, _inputs())
    _, found = _compiled_on(mesh_shape, kind)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())


def _gathered_shapes(program: str) -> set[tuple[int, ...]]:
    """The shapes that all-gathers make, without dims of size 1."""
    shapes = set()
    for line in program.splitlines():
        if re.search(r" all-gather(-start)?\(", line):
            for dims in re.findall(r"f32\[([0-9,]*)\]", line.split(" all-gather")[0]):
                shapes.add(tuple(int(dim) for dim in dims.split(",") if dim != "1"))
    return shapes


@pytest.mark.parametrize("kind", ["fused grouped", "grouped"])
def test_only_keys_values_and_weights_are_gathered_over_the_sequence(kind):
    program, _ = _compiled_on((1, 8, 1), kind)
    per_head_dim = _DIM // _HEADS
    num_weight_heads = _HEADS + 2 * _KV_HEADS if kind == "fused grouped" else _KV_HEADS
    keys_or_values = (_BATCH, _SEQ, _KV_HEADS, per_head_dim)
    weights = [(_DIM, num_heads, per_head_dim) for num_heads in (num_weight_heads, _HEADS)]
    bias = (_DIM,)
    gathered = {tuple(sorted(shape)) for shape in _gathered_shapes(program)}
    assert tuple(sorted(keys_or_values)) in gathered
    # Logits [batch, heads, target, source] and probabilities never are, nor hidden states or queries.
    assert gathered <= {tuple(sorted(shape)) for shape in (keys_or_values, *weights, bias)}
