"""Positions in the data, and the way of a batch onto the mesh."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from axlearn.common import input_base
from axlearn.common.config import config_for_function
from axlearn.common.input_base import DataIterator, PathAndRank, partition_by_path_rank
from axlearn.common.utils import build_mesh, use_mesh


def counting(**fingerprint):
    return DataIterator(
        batches_from=lambda step: ({"x": np.asarray(i)} for i in itertools.count(step)),
        fingerprint=fingerprint,
    )


def take(iterator, n):
    return [int(next(iterator)["x"]) for _ in range(n)]


def test_a_position_survives_json_and_continues_without_a_gap():
    iterator = counting(seed=3)
    assert take(iterator, 4) == [0, 1, 2, 3]
    state = json.loads(json.dumps(iterator.get_state()))
    assert state == {"next_step": 4, "fingerprint": {"seed": 3}}
    other = counting(seed=3)
    other.set_state(state)
    assert take(other, 2) == take(iterator, 2) == [4, 5]
    iterator.set_state(state)
    assert take(iterator, 1) == [4]


def test_the_end_of_the_data_does_not_move_the_position():
    iterator = DataIterator(batches_from=lambda step: iter([{}] * (2 - step)), fingerprint={})
    assert len(list(iterator)) == 2
    assert iterator.get_state()["next_step"] == 2
    assert list(iterator) == []


def test_a_position_in_other_data_is_refused_naming_what_differs():
    state = counting(tokenizer="abc", seed=1, corpus="same").get_state()
    with pytest.raises(ValueError, match="input_iter") as e:
        counting(tokenizer="xyz", corpus="same", rows=5).set_state(state)
    message = str(e.value)
    assert "tokenizer was 'abc', is 'xyz'" in message
    assert "seed was 1, is None" in message
    assert "rows was None, is 5" in message
    assert "corpus" not in message


@pytest.mark.parametrize(
    "state",
    [{}, {"next_step": 3}, {"next_step": -1, "fingerprint": {}}, {"next_step": True, "fingerprint": {}},
     {"next_step": "3", "fingerprint": {}}, {"next_step": 1, "fingerprint": 2}, [3], None],
)  # fmt: skip
def test_what_is_no_position_is_refused(state):
    with pytest.raises(ValueError, match="is not a position in the data"):
        counting().set_state(state)


RULES = {
    (None, 1): PartitionSpec(("data", "expert", "fsdp")),
    (None, 2): PartitionSpec(("data", "expert", "fsdp"), "seq"),
}


def make_input(**kwargs):
    cfg = input_base.Input.default_config().set(name="input", **kwargs)
    return cfg.instantiate(parent=None)


def test_batches_are_laid_out_by_path_and_rank_inside_the_step():
    mesh = build_mesh(mesh_shape=(2, 1, 2, 2), mesh_axis_names=("data", "expert", "fsdp", "seq"))
    partitioner = config_for_function(partition_by_path_rank).set(path_rank_to_partition=RULES)
    module = make_input(input_partitioner=partitioner)
    batch = {"input_ids": jnp.arange(64).reshape(8, 8), "target_num_bytes": jnp.arange(8)}
    with use_mesh(mesh):
        laid_out = jax.jit(lambda b: jax.tree.map(lambda x: x + 1, module.dispatch_global_batch(b)))(batch)
    assert {s.data.shape for s in laid_out["input_ids"].addressable_shards} == {(2, 4)}
    assert {s.data.shape for s in laid_out["target_num_bytes"].addressable_shards} == {(2,)}
    np.testing.assert_array_equal(laid_out["input_ids"], batch["input_ids"] + 1)


def test_the_first_matching_rule_decides_and_none_leaves_alone():
    mesh = build_mesh(mesh_shape=(4, 2), mesh_axis_names=("data", "model"))
    partition = partition_by_path_rank(
        {
            PathAndRank("a/.*", None): PartitionSpec("model"),
            PathAndRank(None, 1): PartitionSpec("data", None)[:1],
            PathAndRank(None, None): None,
        }
    )
    with use_mesh(mesh):
        out = jax.jit(partition)({"a": {"x": jnp.zeros(8)}, "b": jnp.zeros(8), "c": jnp.zeros((8, 8))})
    assert out["a"]["x"].addressable_shards[0].data.shape == (4,)
    assert out["b"].addressable_shards[0].data.shape == (2,)


def test_without_a_mesh_and_without_a_partitioner_batches_pass():
    batch = {"x": jnp.ones((3, 5))}
    assert make_input().dispatch_global_batch(batch) is batch
    out = jax.jit(partition_by_path_rank({(None, 2): PartitionSpec("data")}))(batch)
    np.testing.assert_array_equal(out["x"], batch["x"])


def test_a_leaf_without_a_rule_is_an_error_that_names_it():
    with pytest.raises(ValueError, match=r"images/raw.*rank 3"):
        partition_by_path_rank(RULES)({"images": {"raw": jnp.zeros((1, 2, 3))}})


def test_rules_print_as_in_the_reference_dumps():
    expected = [
        "path_rank_to_partition[(None, 1)]: PartitionSpec(('data', 'expert', 'fsdp'),)",
        "path_rank_to_partition[(None, 2)]: PartitionSpec(('data', 'expert', 'fsdp'), 'seq')",
    ]
    named = {PathAndRank(*key): spec for key, spec in RULES.items()}
    for rules in (RULES, named):
        cfg = config_for_function(partition_by_path_rank).set(path_rank_to_partition=rules)
        assert cfg.debug_string().split("\n") == [
            "fn: 'axlearn.common.input_base.partition_by_path_rank'",
            *expected,
        ]


def test_the_batch_is_split_over_all_axes_unless_said_otherwise():
    mesh = build_mesh(mesh_shape=(4, 2), mesh_axis_names=("data", "model"))
    with use_mesh(mesh):
        assert make_input().partition_spec == PartitionSpec(("data", "model"))
        for spec in (PartitionSpec("data"), PartitionSpec()):
            assert make_input(partition_spec=spec).partition_spec == spec


@pytest.mark.parametrize(
    ("num_rows", "expected"), [(8, PartitionSpec("data")), (4, PartitionSpec("data")), (3, PartitionSpec())]
)
def test_some_rows_of_a_batch_lie_as_the_batch_as_far_as_they_divide(num_rows, expected):
    rows = {"ids": jnp.zeros((num_rows, 2)), "num_bytes": jnp.zeros((num_rows,))}
    inputs = [
        input_base.Input.default_config().set(name="input", partition_spec=PartitionSpec("data")),
        input_base.Input.default_config().set(
            name="input",
            input_partitioner=config_for_function(partition_by_path_rank).set(
                path_rank_to_partition={(None, None): PartitionSpec("data")}
            ),
        ),
    ]
    for cfg in inputs:
        layer = cfg.instantiate(parent=None)
        with use_mesh(build_mesh(mesh_shape=(4, 2), mesh_axis_names=("data", "model"))) as mesh:
            placed = jax.jit(layer.partition_rows)(rows)
        for x in placed.values():
            assert x.sharding.is_equivalent_to(jax.sharding.NamedSharding(mesh, expected), x.ndim)
