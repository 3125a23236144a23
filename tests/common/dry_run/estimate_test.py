"""The estimate of a program's memory: programs small enough to count by hand, and to ask the compiler about."""

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from axlearn.common.dry_run._liveness import peak_bytes
from axlearn.common.dry_run._placement import _axes_after_reshape, place
from axlearn.common.dry_run._program import Value, flatten
from axlearn.common.utils import build_mesh, use_mesh, with_sharding_constraint

SIZES = {"data": 4, "model": 2}


def _struct(*shape: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _program(fn, *args, axes=None):
    program = flatten(jax.make_jaxpr(fn)(*args))
    axes = [None] * len(program.inputs) if axes is None else axes
    place(program, inputs=axes, outputs=[None] * len(program.outputs))
    return program


def _peak(fn, *args, axes=None) -> int:
    return peak_bytes(_program(fn, *args, axes=axes), axis_sizes=SIZES)


def test_a_chain_of_products_holds_two_at_a_time():
    x, w = _struct(32, 16), _struct(16, 16)
    assert _peak(lambda x, w: x @ w @ w @ w @ w, x, w) == 2 * 32 * 16 * 4


def test_what_is_computed_where_it_is_read_takes_nothing():
    x = _struct(1024, 8)
    assert _peak(lambda x: jnp.sum(jnp.tanh(x * 2 + 1) - x), x) == 4
    # A product needs its operand in memory.
    assert _peak(lambda x: jnp.sum((x * 2 + 1).T @ (x * 2 + 1)), x) >= 1024 * 8 * 4


def test_what_nobody_reads_takes_nothing():
    def fn(x):
        _ = x @ x.T
        return jnp.sum(x)

    assert _peak(fn, _struct(256, 8)) == 4


def test_a_loop_holds_what_it_stacks_up():
    def fn(x, w):
        return jax.lax.scan(lambda carry, _: (jnp.tanh(carry @ w), carry), x, length=10)

    carry = 32 * 16 * 4
    assert 11 * carry <= _peak(fn, _struct(32, 16), _struct(16, 16)) <= 14 * carry


def test_recomputation_in_the_backward_pass_is_seen():
    def loss(w, x, *, remat: bool):
        layer = lambda x, w: jnp.tanh(jnp.tanh(x @ w) @ w.T)  # noqa: E731
        layer = jax.checkpoint(layer) if remat else layer
        x, _ = jax.lax.scan(lambda x, w: (layer(x, w), None), x, w)
        return jnp.sum(x)

    args = _struct(12, 16, 64), _struct(256, 16)
    kept = _peak(jax.grad(lambda w, x: loss(w, x, remat=False)), *args)
    recomputed = _peak(jax.grad(lambda w, x: loss(w, x, remat=True)), *args)
    assert recomputed < 0.5 * kept


def test_the_program_of_each_device_counts_with_what_it_gathers():
    mesh = build_mesh(mesh_shape=(4, 2), mesh_axis_names=("data", "model"))

    def fn(x, w):
        on_each = jax.shard_map(
            lambda x, w: jnp.tanh(x @ w) @ w.T,
            mesh=mesh,
            in_specs=(PartitionSpec("data"), PartitionSpec()),
            out_specs=PartitionSpec("data"),
            check_vma=False,
        )
        return on_each(x, w)

    split = [(("data",), ()), ((), ("model",))]
    # A quarter of the rows, all columns of the weight, and a quarter of the result.
    expected = 4 * (64 * 512 + 8 * 512 + 64 * 8)
    peak = _peak(fn, _struct(256, 8), _struct(8, 512), axes=split)
    assert expected <= peak <= 1.1 * expected


def test_the_larger_branch_of_a_condition_counts():
    def fn(x, flag):
        return jax.lax.cond(flag, lambda x: jnp.sum(jnp.exp(x @ x.T) @ x), lambda x: jnp.sum(x), x)

    assert _peak(fn, _struct(128, 8), _struct(dtype=jnp.bool_)) >= 128 * 128 * 4


@pytest.mark.parametrize("length", [2, 6])
def test_the_compiler_agrees_on_a_stack_of_layers(length):
    def loss(w, x):
        x, _ = jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w) @ w.T, None), x, w)
        return jnp.sum(x**2)

    args = _struct(length, 64, 128), _struct(512, 64)
    compiled = jax.jit(jax.grad(loss)).lower(*args).compile().memory_analysis()
    actual = compiled.temp_size_in_bytes + compiled.output_size_in_bytes
    assert 0.6 <= _peak(jax.grad(loss), *args) / actual <= 1.6


# Where values lie.


def _axes_of_result(fn, *args, axes):
    return _program(fn, *args, axes=axes).outputs[0].axes


def test_splits_go_through_products_transposes_and_sums():
    x, w = _struct(8, 16), _struct(16, 32)
    split = [(("data",), ()), ((), ("model",))]
    assert _axes_of_result(jnp.matmul, x, w, axes=split) == (("data",), ("model",))
    assert _axes_of_result(lambda x, w: (x @ w).T, x, w, axes=split) == (("model",), ("data",))
    assert _axes_of_result(lambda x, w: jnp.sum(x @ w, axis=0), x, w, axes=split) == (("model",),)
    assert _axes_of_result(lambda x, w: jnp.tanh(x @ w) + 1, x, w, axes=split) == (("data",), ("model",))


def test_a_split_of_either_operand_is_kept_where_sizes_of_one_are_repeated():
    x, y = _struct(8, 1, 6), _struct(1, 4, 6)
    split = [(("data",), (), ()), ((), ("model",), ())]
    assert _axes_of_result(jnp.multiply, x, y, axes=split) == (("data",), ("model",), ())


def test_a_constraint_leaves_what_it_does_not_name():
    mesh = build_mesh(mesh_shape=(4, 2, 1), mesh_axis_names=("data", "model", "seq"))
    spec = PartitionSpec(PartitionSpec.UNCONSTRAINED, "seq", "model")
    with use_mesh(mesh):
        axes = _axes_of_result(
            lambda x: with_sharding_constraint(x, spec), _struct(8, 6, 4), axes=[(("data",), (), ())]
        )
    # The axis with one device says nothing.
    assert axes == (("data",), (), ("model",))


def test_a_weight_that_is_split_as_the_batch_is_gathered_for_its_product():
    x, w = _struct(8, 64), _struct(64, 32)
    split = [(("data",), ()), (("data",), ())]
    assert _axes_of_result(jnp.matmul, x, w, axes=split) == (("data",), ())
    result, whole_weight = 8 * 32 * 4 // 4, 64 * 32 * 4
    assert _peak(jnp.matmul, x, w, axes=split) == result + whole_weight


def test_rows_of_a_table_lie_as_their_ids_do():
    table, ids = _struct(100, 16), _struct(8, 12, dtype=jnp.int32)
    split = [((), ("model",)), (("data",), ())]
    assert _axes_of_result(lambda t, i: t[i], table, ids, axes=split) == (("data",), (), ("model",))


def test_a_constraint_decides_and_reaches_into_loops():
    mesh = build_mesh(mesh_shape=(4, 2), mesh_axis_names=("data", "model"))

    def fn(x):
        def body(carry, _):
            carry = with_sharding_constraint(carry, PartitionSpec("data", None))
            return jnp.tanh(carry), carry

        return jax.lax.scan(body, x, length=5)

    with use_mesh(mesh):
        program = _program(fn, _struct(8, 16))
    carry, stacked = program.outputs
    assert carry.axes == (("data",), ())
    assert stacked.axes == ((), ("data",), ())


def test_what_the_program_has_to_return_reaches_back_to_what_it_is_made_of():
    program = flatten(
        jax.make_jaxpr(lambda x, w: (jnp.zeros_like(x) + 1).T @ x * w)(_struct(8, 16), _struct(16, 16))
    )
    place(program, inputs=[None, None], outputs=[(("model",), ())])
    assert program.ops[-1].inputs[0].axes == (("model",), ())


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4), st.data())
def test_a_reshape_keeps_a_legal_split(shape, data):
    axes = tuple(data.draw(st.sampled_from([(), ("model",)])) if dim % 2 == 0 else () for dim in shape)
    # No axis twice.
    first = next((i for i, entry in enumerate(axes) if entry), None)
    axes = tuple(entry if i == first else () for i, entry in enumerate(axes))
    size = 1
    for dim in shape:
        size *= dim
    flat = _axes_after_reshape(Value(tuple(shape), 4, axes), (size,))
    assert len(flat) == 1
    back = _axes_after_reshape(Value((size,), 4, flat), tuple(shape))
    assert len(back) == len(shape)
    same = _axes_after_reshape(Value(tuple(shape), 4, axes), (*shape, 1))
    assert same[: len(shape)] == axes
