"""Sharding constraints, and the way of a batch onto the mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from axlearn.common.utils import (
    DataPartitionType,
    TensorSpec,
    build_mesh,
    data_partition_type_to_spec,
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
