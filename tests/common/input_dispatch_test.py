"""Batches that do not divide over processes and devices."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from axlearn.common.config import config_for_function
from axlearn.common.input_base import partition_by_path_rank
from axlearn.common.input_dispatch import InputDispatcher
from axlearn.common.input_fake import FakeLmInput
from axlearn.common.utils import TensorSpec, build_mesh, host_to_global_array, use_mesh


def make_dispatcher(**kwargs):
    cfg = InputDispatcher.default_config().set(name="input_dispatcher", **kwargs)
    return cfg.instantiate(parent=None)


def rows(dispatcher, first):
    """What a feed reads: rows that say their number in the logical batch."""
    numbers = np.arange(first, first + dispatcher.feed_logical_batch_size)
    return {
        "input_ids": np.stack([numbers, numbers], axis=1),
        "target_labels": numbers,
        "x": {"y": numbers * 0.5},
    }


def dispatched(feeds):
    """The logical batch that the step sees, from the dispatchers of all physical feeds."""
    parts = []
    for feed in feeds:
        part = feed.feed_read_config()
        assert part["num_shards"] == feed.num_logical_feeds
        first = part["shard_index"] * feed.feed_logical_batch_size
        physical = feed.logical_to_physical_batch(rows(feed, first))
        assert {len(leaf) for leaf in jax.tree.leaves(physical)} == {feed.feed_physical_batch_size}
        parts.append(physical)
    physical = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
    shapes = feeds[0].logical_to_physical_shapes(dispatched_specs(feeds[0]))
    assert jax.tree.map(lambda spec: spec.shape, shapes) == jax.tree.map(np.shape, physical)
    return physical, jax.jit(feeds[0].physical_to_logical_batch)(physical)


def dispatched_specs(dispatcher):
    size = dispatcher.config.global_logical_batch_size
    return {
        "input_ids": TensorSpec(shape=(size, 2)),
        "target_labels": TensorSpec(shape=(size,)),
        "x": {"y": TensorSpec(shape=(size,))},
    }


@pytest.mark.parametrize(
    ("logical", "num_feeds", "kwargs", "num_physical_rows"),
    [
        (8, 4, {}, 8),
        (8, 1, {}, 8),
        (4, 4, {"num_batch_shards": 8}, 8),
        (2, 4, {}, 4),
        (6, 4, {}, 8),
        # Five rows do not divide over more than one reader, and every process hands in as many rows.
        (5, 4, {"num_batch_shards": 8}, 24),
        (12, 8, {"num_batch_shards": 8}, 16),
        (7, 4, {"num_batch_shards": 4}, 28),
        (4, 4, {"logical_feed_indices": [1, 3]}, 8),
        (4, 2, {"global_physical_batch_size": 10}, 10),
    ],
)
def test_every_row_of_the_logical_batch_comes_back_in_its_place(
    logical, num_feeds, kwargs, num_physical_rows
):
    feeds = [
        make_dispatcher(
            global_logical_batch_size=logical, num_physical_feeds=num_feeds, physical_feed_index=i, **kwargs
        )
        for i in range(num_feeds)
    ]
    physical, batch = dispatched(feeds)
    assert len(physical["target_labels"]) == num_physical_rows
    np.testing.assert_array_equal(batch["target_labels"], np.arange(logical))
    np.testing.assert_array_equal(batch["input_ids"][:, 1], np.arange(logical))
    np.testing.assert_array_equal(batch["x"]["y"], np.arange(logical) * 0.5)
    # Padding is no target for whoever looks at the physical batch.
    assert np.sum(physical["target_labels"] >= 0) == logical
    parts = np.split(physical["target_labels"], num_feeds)
    logical_rows = [feed.physical_rows_to_logical_rows(part) for feed, part in zip(feeds, parts, strict=True)]
    np.testing.assert_array_equal(np.concatenate(logical_rows), np.arange(logical))


def test_a_batch_that_divides_is_left_alone():
    dispatcher = make_dispatcher(global_logical_batch_size=8, num_batch_shards=8)
    batch = rows(dispatcher, 0)
    assert dispatcher.logical_to_physical_batch(batch) is batch
    assert dispatcher.physical_to_logical_batch(batch) is batch
    assert dispatcher.physical_rows_to_logical_rows(batch) is batch
    assert dispatcher.feed_read_config() == {"num_shards": 1, "shard_index": 0}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"global_logical_batch_size": 0}, "global_logical_batch_size: 0"),
        ({"num_physical_feeds": 2, "physical_feed_index": 2}, r"in \[0, 2\)"),
        ({"logical_feed_indices": [0, 0]}, "logical_feed_indices"),
        ({"logical_feed_indices": [1]}, "some of 0 to 0"),
        (
            {"num_physical_feeds": 4, "logical_feed_indices": [0, 1, 2], "physical_feed_index": 0},
            "multiple of the 3",
        ),
        ({"global_physical_batch_size": 4}, "a multiple of 1 from 8 on"),
        ({"global_physical_batch_size": 12, "num_batch_shards": 8}, "a multiple of 8 from 8 on"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message) as e:
        make_dispatcher(**{"global_logical_batch_size": 8, **kwargs})
    assert "input_dispatcher." in str(e.value)


def test_a_feed_that_reads_too_few_rows_is_an_error():
    dispatcher = make_dispatcher(global_logical_batch_size=4, num_batch_shards=8)
    with pytest.raises(ValueError, match="the feed has read 3 rows"):
        dispatcher.logical_to_physical_batch({"x": np.zeros([3])})


def fake_input(batch_size, **kwargs):
    cfg = FakeLmInput.default_config().set(
        name="input", is_training=True, global_batch_size=batch_size, source_length=4, vocab_size=10, **kwargs
    )
    return cfg.instantiate(parent=None)


def test_an_input_takes_the_size_of_the_physical_batch_from_the_mesh_and_the_step_sees_the_logical_one():
    mesh = build_mesh(mesh_shape=(8,), mesh_axis_names=("data",))
    partitioner = config_for_function(partition_by_path_rank).set(
        path_rank_to_partition={(None, None): PartitionSpec("data")}
    )
    plain = next(fake_input(6).batches())
    with use_mesh(mesh):
        module = fake_input(
            6,
            input_dispatcher=InputDispatcher.default_config().set(global_logical_batch_size=6),
            input_partitioner=partitioner,
        )
        assert module.element_spec()["input_ids"].shape == (8, 4)
        physical = next(module.batches())
        assert physical["input_ids"].shape == (8, 4)
        on_mesh = host_to_global_array(physical, partition=module.partition_spec)
        logical = jax.jit(module.dispatch_global_batch)(on_mesh)
    for name, leaf in plain.items():
        np.testing.assert_array_equal(logical[name], leaf)
        np.testing.assert_array_equal(module.logical_rows(physical)[name], leaf)


def test_a_dispatcher_of_another_size_than_the_input_is_refused():
    dispatcher = InputDispatcher.default_config().set(global_logical_batch_size=4)
    module = fake_input(8, input_dispatcher=dispatcher)
    with pytest.raises(ValueError, match="global_logical_batch_size=4"):
        module.batches()
