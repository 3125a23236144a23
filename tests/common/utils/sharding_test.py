"""Sharding constraints, and the way of a batch onto the mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from axlearn.common.utils import (
    DataPartitionType,
    DroppedAxes,
    TensorSpec,
    build_mesh,
    data_partition_type_to_spec,
    fit_to_mesh,
    global_to_host_array,
    host_to_global_array,
    input_partition_spec,
    maybe_shard,
    use_mesh,
    with_sharding_constraint,
)


@pytest.fixture(scope="module")
def mesh():
    return build_mesh(mesh_shape=(4, 2), mesh_axis_names=("data", "model"))


def test_a_batch_is_split_over_all_axes_by_default(mesh):
    batch = {"ids": np.arange(32).reshape(16, 2), "step": np.array(3)}
    with use_mesh(mesh):
        assert input_partition_spec() == P(("data", "model"))
        placed = host_to_global_array(batch)
    assert placed["ids"].sharding == NamedSharding(mesh, P(("data", "model")))
    assert {shard.data.shape for shard in placed["ids"].addressable_shards} == {(2, 2)}
    assert placed["step"].sharding.is_fully_replicated
    fetched = global_to_host_array(placed)
    assert all(np.array_equal(fetched[name], batch[name]) for name in batch)


def test_a_batch_can_have_a_partition_per_leaf(mesh):
    batch = {"ids": np.zeros((8, 4)), "nested": {"x": np.zeros((8,)), "y": np.zeros((4, 2))}}
    partition = {"ids": P("data", "model"), "nested": DataPartitionType.BATCH}
    with use_mesh(mesh):
        placed = host_to_global_array(batch, partition=partition)
        assert data_partition_type_to_spec(DataPartitionType.REPLICATED) == P()
    assert placed["ids"].sharding.spec == P("data", "model")
    assert placed["nested"]["x"].sharding.spec == P(("data",))
    assert placed["nested"]["y"].sharding.shard_shape((4, 2)) == (1, 2)


def test_a_batch_that_does_not_divide_is_refused_by_name(mesh):
    with use_mesh(mesh), pytest.raises(ValueError) as error:
        host_to_global_array({"ids": np.zeros((6, 4))}, partition=P("data"))
    assert str(error.value) == (
        "ids: dimension 0 has size 6, which the 4 shards of mesh axes ('data',) do not divide. Expected a "
        "multiple of 4; "
        "change the batch size or the mesh shape."
    )


def test_maybe_shard_drops_axes_that_the_mesh_does_not_have(mesh):
    x = np.zeros((8, 4), np.float32)
    constrain = jax.jit(lambda x: maybe_shard(x, (("data", "expert"), "seq")))
    with use_mesh(mesh):
        assert constrain(x).sharding.spec == P("data")
    assert maybe_shard(x, P("data")) is x
    with use_mesh(mesh):
        assert maybe_shard(x, None) is x


def test_maybe_shard_leaves_out_manual_axes(mesh):
    def body(x):
        return maybe_shard(x, P("data", "model")) * 2

    with use_mesh(mesh):
        f = jax.shard_map(body, in_specs=P("data"), out_specs=P("data"), axis_names={"data"})
        np.testing.assert_array_equal(jax.jit(f)(np.ones((4, 2), np.float32)), 2 * np.ones((4, 2)))


def test_with_sharding_constraint_is_strict(mesh):
    with pytest.raises(RuntimeError, match="no mesh here"):
        with_sharding_constraint(np.zeros(2), P())
    with use_mesh(mesh):
        placed = jax.jit(lambda x: with_sharding_constraint(x, P("data")))(np.zeros(8))
        with pytest.raises(ValueError, match="expert"):
            jax.jit(lambda x: with_sharding_constraint(x, P("expert")))(np.zeros(8))
    assert placed.sharding.spec == P("data")


def test_a_tensor_spec_knows_its_sharding_on_the_mesh(mesh):
    spec = TensorSpec((8, 4), jnp.float32, mesh_axes=P("data", None), memory_kind="pinned_host")
    with use_mesh(mesh):
        assert spec.sharding == NamedSharding(mesh, P("data", None), memory_kind="pinned_host")
        assert TensorSpec((8,)).sharding == NamedSharding(mesh, P())
    with pytest.raises(RuntimeError, match="no mesh here"):
        _ = spec.sharding


@pytest.mark.parametrize(
    ("spec", "shape", "expected", "dropped"),
    [
        (P("data", "model"), (8, 4), P("data", "model"), []),
        # Not a multiple of 4: whole there.
        (P("data", "model"), (6, 4), P(None, "model"), [(0, 6, ("data",), 4)]),
        # As many of the first axes as divide.
        (P(("data", "model")), (4,), P("data"), [(0, 4, ("model",), 8)]),
        (P(("model", "data")), (6,), P("model"), [(0, 6, ("data",), 8)]),
        (P(None, ("data", "model")), (3, 3), P(None, None), [(1, 3, ("data", "model"), 8)]),
        # What the compiler is free to choose, and what the shape does not have, stays as it is.
        (P(P.UNCONSTRAINED, "model"), (3, 4), P(P.UNCONSTRAINED, "model"), []),
        (P(), (3,), P(), []),
    ],
)
def test_axes_that_a_dimension_does_not_divide_over_are_dropped(mesh, spec, shape, expected, dropped):
    assert fit_to_mesh(spec, shape=shape, mesh=mesh) == (expected, tuple(DroppedAxes(*x) for x in dropped))
    if P.UNCONSTRAINED in spec:
        return
    with use_mesh(mesh):
        tensor_spec = TensorSpec(shape, np.float32, mesh_axes=spec)
        assert tensor_spec.dropped_axes == tuple(DroppedAxes(*x) for x in dropped)
        # Nothing is refused, neither outside of jit nor inside.
        x = jax.device_put(np.ones(shape, np.float32), tensor_spec.sharding)
        constrained = jax.jit(lambda x: maybe_shard(x, spec))(x)
        assert constrained.sharding.is_equivalent_to(tensor_spec.sharding, x.ndim)


def test_an_axis_that_the_mesh_does_not_have_is_still_an_error(mesh):
    with use_mesh(mesh), pytest.raises(ValueError, match="expert"):
        _ = TensorSpec((8,), np.float32, mesh_axes=P(("data", "expert"))).sharding


def test_dropped_axes_read_as_a_sentence(mesh):
    _, (dropped,) = fit_to_mesh(P(("data", "model")), shape=(4,), mesh=mesh)
    assert str(dropped) == "dimension 0 is not split over 'model': its size 4 is no multiple of 8"
