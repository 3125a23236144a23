"""Tests of axlearn.common.flash_attention on meshes: each device runs a kernel on its part."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from axlearn.common.attention_kernels import collect_attention_choices
from axlearn.common.flash_attention._placement import num_kv_repeats
from axlearn.common.module import functional
from axlearn.common.utils import build_mesh, flatten_items, use_mesh
from axlearn.experiments.text.gpt.common import flash_attention_config
from tests.common.flash_attention.kernel_cases import (
    CASES,
    NUM_HEADS,
    NUM_KV_HEADS,
    PER_HEAD_DIM,
    SEQ,
    build,
    forward_and_grads,
    inputs_of,
)

_AXES = ("data", "expert", "fsdp", "seq", "model")
_BATCH_AXES = ("data", "expert", "fsdp")
_BATCH = 4

# What recipes use: whole sequences, and heads split over two axes, one of which splits sequences elsewhere.
_RECIPES = dict(flash_attention_config().mha_dim_to_partition_spec)
# Queries split, and all keys on every device.
_CONTEXT = {
    "btnh": P(_BATCH_AXES, "seq", "model", None),
    "bsnh": P(_BATCH_AXES, None, "model", None),
}
# Queries and keys split alike: keys travel.
_RING = {name: P(_BATCH_AXES, "seq", "model", None) for name in ("btnh", "bsnh")}
# What every kernel computes that looks at indices and segments and at no array of biases.
_RING_CASES = [name for name, case in CASES.items() if "tpu_splash" in case.accepted_by]
_TOLERANCES = {jnp.float32: 2e-5, jnp.bfloat16: 2e-2}


pytestmark = pytest.mark.usefixtures("compiling_anew")


def _mesh(**sizes: int):
    shape = tuple(sizes.get(axis, 1) for axis in _AXES)
    return use_mesh(build_mesh(mesh_shape=shape, mesh_axis_names=_AXES))


@functools.cache
def _expected(name: str):
    """By the plain layer in float32, from what the case rounds to its dtype."""
    case = CASES[name]
    inputs = jax.tree.map(
        lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, inputs_of(case, batch=_BATCH)
    )
    return forward_and_grads(build(dataclasses.replace(case, dtype=jnp.float32)), inputs)


def _assert_equal(found, name: str):
    for (path, actual), (_, expected) in zip(
        flatten_items(found), flatten_items(_expected(name)), strict=True
    ):
        # Softmax does not see what is added to all keys: the gradient of that is rounding errors of zero.
        if not path.endswith("k_proj/bias"):
            actual, expected = np.asarray(actual, np.float32), np.asarray(expected)
            error = np.abs(actual - expected).max() / np.abs(expected).max()
            assert error < _TOLERANCES[CASES[name].dtype], f"{path}: {error}"


@pytest.mark.parametrize(
    ("name", "kernel", "specs", "sizes"),
    [
        pytest.param(
            "causal, packed",
            "tpu_splash",
            _RECIPES,
            {"data": 2, "seq": 2, "model": 2},
            marks=pytest.mark.scale,
        ),
        ("causal, ALiBi, packed", "tpu_flash", _RECIPES, {"fsdp": 2, "seq": 2, "model": 2}),
        # The same placement code runs every kernel; each of these takes seconds to compile.
        pytest.param(
            "causal, packed", "gpu_pallas", _RECIPES, {"data": 4, "model": 2}, marks=pytest.mark.scale
        ),
        ("two-sided window, cap, sink", "tpu_splash", _CONTEXT, {"data": 2, "seq": 2, "model": 2}),
        pytest.param(
            "prefix, sink, packed", "tpu_splash", _CONTEXT, {"data": 4, "seq": 2}, marks=pytest.mark.scale
        ),
        pytest.param(
            "window, packed",
            "tpu_flash",
            _CONTEXT,
            {"data": 2, "seq": 2, "model": 2},
            marks=pytest.mark.scale,
        ),
        ("causal, packed", "xla", _RECIPES, {"data": 2, "seq": 2, "model": 2}),
        ("causal, packed", "xla", _CONTEXT, {"data": 2, "seq": 2, "model": 2}),
    ],
)
def test_a_kernel_on_a_mesh_computes_what_the_plain_layer_does_on_one_device(name, kernel, specs, sizes):
    layer = build(CASES[name], implementation=kernel, mha_dim_to_partition_spec=specs)
    inputs = inputs_of(CASES[name], batch=_BATCH)
    with _mesh(**sizes), collect_attention_choices() as choices:
        found = jax.tree.map(np.asarray, forward_and_grads(layer, inputs))
    assert [choice.name for choice in choices] == [kernel]
    assert choices[0].task.num_target_shards == (2 if specs is _CONTEXT else 1)
    _assert_equal(found, name)


_RING_MESHES = ({"data": 2, "seq": 4}, {"data": 4, "seq": 2}, {"data": 2, "seq": 2, "model": 2})
# Each takes some five seconds to compile: all that is asked for is among these, and all pairs among the slow tests.
_RING_ALWAYS = {
    "causal, packed": _RING_MESHES[0],
    "two-sided window, cap, sink": _RING_MESHES[2],
}


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        pytest.param(
            name,
            sizes,
            marks=[] if _RING_ALWAYS.get(name) == sizes else pytest.mark.scale,
            id=f"{name}-{sizes}",
        )
        for name in _RING_CASES
        for sizes in _RING_MESHES
    ],
)
def test_ring_attention_computes_what_the_plain_layer_does_on_one_device(name, sizes):
    forced = build(CASES[name], implementation="ring", mha_dim_to_partition_spec=_RING)
    layer = forced.config.clone(backend_overrides=None).instantiate(parent=None)
    with _mesh(**sizes), collect_attention_choices() as choices:
        found = forward_and_grads(layer, inputs_of(CASES[name], batch=_BATCH))
    assert [(choice.name, choice.task.num_source_shards) for choice in choices] == [("ring", sizes["seq"])]
    _assert_equal(found, name)


@pytest.mark.parametrize("name", [name for name in CASES if name not in _RING_CASES])
def test_ring_attention_refuses_arrays_of_biases(name):
    layer = build(CASES[name], implementation="ring", mha_dim_to_partition_spec=_RING)
    with (
        _mesh(data=2, seq=4),
        pytest.raises(ValueError, match="'ring', which takes no array of biases, as needed for"),
    ):
        jax.eval_shape(lambda x: forward_and_grads(layer, x), inputs_of(CASES[name], batch=_BATCH))


def test_queries_stay_where_they_are_and_only_keys_and_values_are_gathered():
    case = CASES["causal, packed"]
    layer = build(case, implementation="tpu_splash", mha_dim_to_partition_spec=_CONTEXT)
    inputs = inputs_of(case, batch=_BATCH)
    with _mesh(data=4, seq=2) as mesh:
        places = {"query": P("data", "seq"), "segment_ids": P("data", "seq"), "params": P()}
        shardings = {name: jax.sharding.NamedSharding(mesh, spec) for name, spec in places.items()}

        def forward(inputs):
            arguments = {name: inputs[name] for name in ("query", "segment_ids")}
            return functional(layer, None, inputs["params"], arguments, is_training=False)[0].data

        program = jax.jit(forward, in_shardings=(shardings,)).lower(inputs).compile().as_text()
    gathered = {
        tuple(sorted(int(dim) for dim in dims.split(",") if dim != "1"))
        for dims in re.findall(r"\w+\[([\d,]+)\]\S* all-gather\(", program)
    }
    # Keys or values of a row, and segment ids.
    assert gathered == {(NUM_KV_HEADS, PER_HEAD_DIM, SEQ), (SEQ,)}
    assert not re.findall(r" (all-to-all|reduce-scatter|all-reduce|collective-permute)\(", program)


def test_a_mesh_without_placement_and_keys_that_are_split_otherwise_are_left_to_xla():
    case = CASES["causal, packed"]
    reasons = []
    for specs in ({}, {"btnh": _CONTEXT["bsnh"], "bsnh": _CONTEXT["btnh"]}):
        forced = build(case, implementation="xla", mha_dim_to_partition_spec=specs)
        layer = forced.config.clone(backend_overrides=None).instantiate(parent=None)
        with _mesh(data=4, seq=2), collect_attention_choices(platform="tpu") as choices:
            jax.eval_shape(lambda x, layer=layer: forward_and_grads(layer, x), inputs_of(case, batch=_BATCH))
        assert [choice.name for choice in choices] == ["xla"]
        reasons.append(dict(choices[0].refused))
    assert reasons[0]["tpu_splash"] == "needs mha_dim_to_partition_spec on a mesh of several devices"
    assert reasons[1]["tpu_splash"] == "needs all keys of a sequence on each device"
    assert reasons[1]["ring"] == (
        "needs queries and keys that are split over the same axes, not over () and ('seq',)"
    )


@pytest.mark.parametrize(
    ("num_kv_heads", "num_head_shards", "expected"), [(2, 1, 1), (2, 2, 1), (2, 4, 2), (1, 4, 4), (4, 4, 1)]
)
def test_key_heads_are_repeated_until_each_device_has_those_of_its_query_heads(
    num_kv_heads, num_head_shards, expected
):
    found = num_kv_repeats(num_heads=NUM_HEADS, num_kv_heads=num_kv_heads, num_head_shards=num_head_shards)
    assert found == expected
