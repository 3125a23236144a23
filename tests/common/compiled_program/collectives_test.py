"""Collectives, counted in programs of which it is known what they move."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from axlearn.common.compiled_program import (
    UnknownTripCountError,
    collectives_of,
    executions_of,
    parse_groups,
    parse_program,
)

_MESH_SHAPE = {"data": 2, "model": 4}


@pytest.fixture(scope="module")
def mesh():
    devices = np.array(jax.devices()).reshape(2, 4)
    return Mesh(devices, tuple(_MESH_SHAPE), axis_types=(AxisType.Auto,) * 2)


def _text(fn, mesh, *specs, shape=(8, 16)):
    """The text of a compiled function of one array, run by each device on its part."""
    mapped = jax.shard_map(fn, mesh=mesh, in_specs=specs[0], out_specs=specs[1], check_vma=False)
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, specs[0]))
    return jax.jit(mapped).lower(x).compile().as_text()


_SPLIT = PartitionSpec("data", "model")
# The function of a device's part [4, 4] of [8, 16], the kind, the axis, devices a group, bytes of the whole.
_CASES = {
    "all-gather": (
        lambda x: jax.lax.all_gather(x, "model", axis=1, tiled=True).sum(axis=1, keepdims=True) + x,
        ("all-gather", ("model",), 4, 4 * 16 * 4),
    ),
    "all-reduce": (lambda x: x * jax.lax.psum(x, "data"), ("all-reduce", ("data",), 2, 4 * 4 * 4)),
    "reduce-scatter": (
        lambda x: x + jax.lax.psum_scatter(x, "model", scatter_dimension=0, tiled=True),
        ("reduce-scatter", ("model",), 4, 4 * 4 * 4),
    ),
    "collective-permute": (
        lambda x: jax.lax.ppermute(x, "model", [(i, (i + 1) % 4) for i in range(4)]),
        ("collective-permute", ("model",), 8, 4 * 4 * 4),
    ),
    "all-to-all": (
        lambda x: jax.lax.all_to_all(x, "model", split_axis=0, concat_axis=0, tiled=True),
        ("all-to-all", ("model",), 4, 4 * 4 * 4),
    ),
}


@pytest.mark.parametrize("name", _CASES)
def test_a_collective_is_found_with_its_kind_axis_and_size(name, mesh):
    fn, expected = _CASES[name]
    (found,) = collectives_of(_text(fn, mesh, _SPLIT, _SPLIT), mesh_shape=_MESH_SHAPE)
    assert found[:4] == expected
    assert found.num_runs == 1


def test_what_a_device_sends_is_that_of_a_ring():
    def sent(name):
        fn, _ = _CASES[name]
        devices = np.array(jax.devices()).reshape(2, 4)
        mesh = Mesh(devices, tuple(_MESH_SHAPE), axis_types=(AxisType.Auto,) * 2)
        return collectives_of(_text(fn, mesh, _SPLIT, _SPLIT), mesh_shape=_MESH_SHAPE)[0].sent_bytes

    assert sent("all-gather") == 256 * 3 / 4
    assert sent("all-reduce") == 64 * 2 * 1 / 2
    assert sent("reduce-scatter") == 64 * 3 / 4
    assert sent("collective-permute") == 64


def test_loops_multiply_also_when_nested(mesh):
    def body(x, _):
        return jax.lax.psum(x, "data") / 2, None

    def outer(x, _):
        return jax.lax.scan(body, x, length=5)[0], None

    text = _text(lambda x: jax.lax.scan(outer, x, length=7)[0], mesh, _SPLIT, _SPLIT)
    (found,) = collectives_of(text, mesh_shape=_MESH_SHAPE)
    assert found.num_runs == 35


def test_what_the_partitioner_inserts_is_found_under_the_name_of_its_operation(mesh):
    x = jax.ShapeDtypeStruct(
        (8, 16), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data", "model"))
    )
    w = jax.ShapeDtypeStruct(
        (16, 32), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("model", None))
    )
    out = NamedSharding(mesh, PartitionSpec("data", None))
    text = jax.jit(jnp.dot, out_shardings=out).lower(x, w).compile().as_text()
    (found,) = collectives_of(text, mesh_shape=_MESH_SHAPE)
    assert found[:4] == ("all-reduce", ("model",), 4, 4 * 32 * 4)
    assert "dot" in found.op_name


def test_a_program_on_one_device_moves_nothing():
    text = jax.jit(jnp.sum).lower(jnp.ones(4)).compile().as_text()
    assert collectives_of(text, mesh_shape={"data": 1}) == []


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ("replica_groups={{0,1},{2,3}}, use_global_device_ids=true", [(0, 1), (2, 3)]),
        ("replica_groups={}", [(0, 1, 2, 3)]),
        ("replica_groups=[2,2]<=[4]", [(0, 1), (2, 3)]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), dimensions={1}", [(0, 2), (1, 3)]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}, x=1", [(0, 1), (2, 3)]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [(0, 2), (1, 3)]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", [(0, 1, 2, 3)]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}, x=1", [(0, 1), (2, 3)]),
        ("replica_groups=mesh['a'=2,'b'=1,'c'=2], device_ids=([4]) {'a'}", [(0, 2), (1, 3)]),
        ("source_target_pairs={{0,1},{1,0}}", [(0, 1), (1, 0)]),
        ("dimensions={0}", None),
    ],
)
def test_each_way_to_write_groups_is_read(attributes, expected):
    assert parse_groups(attributes, num_devices=4) == expected


def test_a_program_of_the_tpu_compiler_is_read_with_its_loops(tpu_text):
    """Its loops note no trip count, a reduce-scatter is a fusion, and groups are written in three ways."""
    found = collectives_of(tpu_text, mesh_shape={"fsdp": 2, "model": 2})
    kinds = [(x.kind, x.axes, x.num_runs) for x in found]
    assert kinds.count(("all-gather", ("fsdp",), 6)) == 2
    assert ("reduce-scatter", ("model",), 6) in kinds
    assert ("all-reduce", ("fsdp",), 6) in kinds
    assert ("all-reduce", ("fsdp", "model"), 1) in kinds
    weights = [x for x in found if x.axes == ("fsdp",) and x.kind == "all-gather"]
    # A layer's weight [512, 512] in bfloat16, split over model.
    assert {x.whole_bytes for x in weights} == {512 * 256 * 2}


@pytest.fixture
def tpu_text(request):
    return (request.config.rootpath / "tests" / "fixtures" / "tpu_v5p_scan.hlo").read_text(encoding="utf-8")


def test_what_goes_to_other_slices_is_listed_as_what_it_stands_for():
    """As XLA for TPU writes it (libtpu 0.0.42.1, two slices of v5p:2x2x1), without what does not matter."""
    handler = '_xla_host_transfer_handler_name="xla_megascale_runtime"'
    text = f"""HloModule step

ENTRY %main (x: f32[8,16]) -> f32[8,16] {{
  %x = f32[8,16]{{1,0:T(8,128)}} parameter(0)
  %t = token[] after-all()
  %send.1 = (f32[8,16]{{1,0}}, u32[], token[]) send(%x, %t), channel_id=1, is_host_transfer=true, frontend_attributes={{{handler},_xla_megascale_target="{{1,2,3}}x{{0:3}}",_xla_megascale_transfer_type="ALL_REDUCE"}}
  %send-done.1 = token[] send-done(%send.1), channel_id=1, frontend_attributes={{{handler}}}
  %send.2 = (f32[8,16]{{1,0}}, u32[], token[]) send(%x, %t), channel_id=2, frontend_attributes={{{handler},_xla_megascale_target={{{{100000->200000}}}},_xla_megascale_transfer_type="ONE_TO_ONE"}}
  ROOT %y = f32[8,16]{{1,0}} copy(%x)
}}
"""  # noqa: E501
    first, second = collectives_of(text, mesh_shape={"data": 12}, slice_axes=("data",))
    assert first[:6] == ("all-reduce", ("data",), 3, 512, 1, True)
    assert second[:6] == ("collective-permute", ("data",), 2, 512, 1, True)


def test_what_a_kernel_notes_of_itself_in_several_lines_ends_no_computation():
    """As splash attention's notes stand in programs of libtpu 0.0.42.1; behind them a layer's traffic follows."""
    text = """HloModule step

ENTRY %main (x: f32[8,16]) -> f32[8,16] {
  %x = f32[8,16]{1,0:T(8,128)} parameter(0)
  %kernel = f32[8,16]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, metadata={op_name="jit(step)/pallas_call"}
  ROOT %sum = f32[8,16]{1,0} all-reduce(%kernel), replica_groups={{0,1}}, to_apply=%add
}, execution_thread="main"
"""
    (found,) = collectives_of(text, mesh_shape={"data": 2})
    assert found[:4] == ("all-reduce", ("data",), 2, 512)
    kernel = parse_program(text)["main"].instructions["kernel"]
    assert 'op_name="jit(step)/pallas_call"' in kernel.attributes


def test_what_a_program_waits_for_is_told_apart_from_what_it_starts():
    text = """HloModule step

%fused_computation (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %inner = f32[8]{0} all-reduce(%p), replica_groups={{0,1}}, to_apply=%add
}

%async_collective_fusion.1 (q: f32[8]) -> f32[16] {
  %q = f32[8]{0} parameter(0)
  ROOT %gather = f32[16]{0} all-gather(%q), replica_groups={{0,1}}, dimensions={0}
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %start = (f32[8]{0}, f32[16]{0}) all-gather-start(%x), replica_groups={{0,1}}, dimensions={0}
  %fused = f32[16]{0} fusion(%x), kind=kCustom, calls=%async_collective_fusion.1
  %begun = ((f32[8]{0}), f32[8]{0}, u32[]) async-start(%x), calls=%fused_computation
  %reduced = f32[8]{0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%add
  ROOT %done = f32[8]{0} async-done(%begun), calls=%fused_computation
}
"""
    found = collectives_of(text, mesh_shape={"data": 2})
    assert [(x.kind, x.is_async, x.num_runs) for x in found] == [
        ("all-reduce", True, 1),
        ("all-gather", True, 1),
        ("all-gather", True, 1),
        ("all-reduce", False, 1),
    ]


def test_a_loop_of_unknown_length_is_an_error_that_names_it():
    def search(x):
        return jax.lax.while_loop(lambda y: jnp.sum(y) < 100, lambda y: y * 2, x)

    computations = parse_program(jax.jit(search).lower(jnp.ones(3)).compile().as_text())
    with pytest.raises(UnknownTripCountError, match="how often this loop runs"):
        executions_of(computations)


def test_a_text_that_is_no_module_is_refused():
    with pytest.raises(ValueError, match="no compiled module"):
        parse_program("hello")


def test_computations_that_are_called_twice_count_twice():
    @functools.partial(jax.jit, inline=False)
    def inner(x):
        return jax.lax.fori_loop(0, 3, lambda _, y: jnp.sin(y) * y, x)

    text = jax.jit(lambda x: inner(x) + inner(x * 2)).lower(jnp.ones(3)).compile().as_text()
    computations = parse_program(text)
    counts = executions_of(computations)
    sines = sum(
        counts[computation.name]
        for computation in computations.values()
        for instruction in computation.instructions.values()
        if instruction.operation == "sine"
    )
    assert sines == 6
