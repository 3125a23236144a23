"""Paths, look-up, pruning, casting, stacked dicts and key splitting."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axlearn.common.utils import (
    StackedKeyArray,
    VDict,
    cast_floats,
    copy_recursively,
    expand_vdicts,
    flatten_items,
    get_recursively,
    match_regex_rules,
    prune_empty,
    prune_tree,
    set_recursively,
    split_prng_key,
    tree_merge,
    tree_paths,
    vectorized_tree_map,
)


class Pair(NamedTuple):
    first: int
    second: int


def test_flatten_items_names_keys_fields_and_indices():
    tree = {"b": [1, (2, 3)], "a": Pair(4, 5), "empty": {}, "none": None}
    assert flatten_items(tree) == [("a/first", 4), ("a/second", 5), ("b/0", 1), ("b/1/0", 2), ("b/1/1", 3)]
    assert flatten_items({"a": {"b": 1}}, separator=".") == [("a.b", 1)]
    assert flatten_items({"a": {"b": 1}}, is_leaf=lambda x: "b" in x if isinstance(x, dict) else False) == [
        ("a", {"b": 1})
    ]


nested_dicts = st.recursive(
    st.integers(),
    lambda children: st.dictionaries(st.text("abc", min_size=1, max_size=2), children, max_size=3),
    max_leaves=8,
)


@settings(max_examples=30, deadline=None)
@given(nested_dicts)
def test_every_leaf_is_found_at_its_path(tree):
    if not isinstance(tree, dict):
        return
    for path, leaf in flatten_items(tree):
        assert get_recursively(tree, path) == leaf
    assert jax.tree.leaves(tree_paths(tree)) == [path for path, _ in flatten_items(tree)]
    rebuilt = {}
    for path, leaf in flatten_items(tree):
        set_recursively(rebuilt, value=leaf, path=path)
    assert rebuilt == prune_empty(tree)


def test_get_recursively_says_how_far_the_path_goes():
    tree = {"decoder": {"emb": 1}}
    assert get_recursively(tree, "") is tree
    assert get_recursively(tree, ["decoder", "emb"]) == 1
    with pytest.raises(KeyError, match="no 'embb' below decoder, which holds emb"):
        get_recursively(tree, "decoder/embb")
    with pytest.raises(KeyError, match="no 'x' below decoder/emb, which holds a int"):
        get_recursively(tree, "decoder/emb/x")


def test_set_recursively_refuses_an_empty_path():
    with pytest.raises(ValueError, match="is empty"):
        set_recursively({}, value=1, path="")


def test_copy_recursively_takes_only_the_subtree():
    source = {"a": {"b": {"c": 1}, "d": 2}}
    assert copy_recursively(source=source, target=None, path="a/b") == {"a": {"b": {"c": 1}}}
    assert copy_recursively(source=source, target={"e": 3}, path="a/d") == {"a": {"d": 2}, "e": 3}
    whole = copy_recursively(source=source, target=None, path="")
    assert whole == source
    assert whole["a"] is not source["a"]


def test_prune_tree_asks_with_paths_after_pruning_below():
    tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    asked = []

    def should_prune(path, value):
        asked.append(path)
        return path == "a/c/d" or value == {}

    assert prune_tree(tree, should_prune) == {"a": {"b": 1}, "e": 3}
    assert asked == ["a/b", "a/c/d", "a/c", "a", "e"]
    assert isinstance(prune_tree(VDict(a=1), lambda *_: False), VDict)


def test_tree_merge_combines_dicts_and_refuses_to_overwrite():
    assert tree_merge({"a": {"b": 1}}, secondary={"a": {"c": 2}}) == {"a": {"b": 1, "c": 2}}
    assert tree_merge({"a": 1}, secondary={"a": 2}, leaf_merge_fn=lambda x, y: x + y) == {"a": 3}
    with pytest.raises(ValueError, match="leaf at the same path"):
        tree_merge({"a": 1}, secondary={"a": 2})
    with pytest.raises(ValueError, match="Cannot merge a dict with a int"):
        tree_merge({"a": {}}, secondary={"a": 2})


def test_the_first_rule_that_matches_the_whole_string_wins():
    rules = [("a", 1), ("a.*", 2), (".*b", 3)]
    assert [match_regex_rules(x, rules=rules) for x in ("a", "ab", "bb", "c")] == [1, 2, 3, None]
    assert match_regex_rules("c", rules=rules, default_value=4) == 4


def test_cast_floats_leaves_all_other_types_alone():
    tree = {
        "f32": np.ones(2, np.float32),
        "bf16": jnp.ones(2, jnp.bfloat16),
        "f64": np.ones(2, np.float64),
        "i32": np.ones(2, np.int32),
        "name": "x",
    }
    cast = cast_floats(tree, jnp.bfloat16)
    assert [str(cast[k].dtype) for k in ("f32", "bf16", "f64", "i32")] == [
        "bfloat16",
        "bfloat16",
        "float64",
        "int32",
    ]
    assert cast["name"] == "x"
    assert cast_floats(tree, None) is tree
    with pytest.raises(ValueError, match=r"float16 is not supported. Expected float32 or bfloat16"):
        cast_floats(tree, jnp.float16)


def test_vdict_is_a_pytree_node_with_paths():
    tree = {"layers": VDict(b=np.ones(3), a=np.zeros(3))}
    assert [path for path, _ in flatten_items(tree)] == ["layers/a", "layers/b"]
    doubled = jax.tree.map(lambda x: 2 * x, tree)
    assert type(doubled["layers"]) is VDict
    assert jax.tree.structure(tree) != jax.tree.structure({"layers": dict(tree["layers"])})


def test_vectorized_tree_map_works_on_each_layer_by_itself():
    rng = np.random.default_rng(0)
    stacked = VDict(weight=rng.normal(size=(3, 4)), inner=VDict(deep=rng.normal(size=(3, 2, 5))))
    tree = {"layers": stacked, "single": rng.normal(size=(4,))}
    other = jax.tree.map(lambda x: x + 1, tree)
    result = vectorized_tree_map(lambda x, y: jnp.sum(x * y), tree, other)
    assert type(result["layers"]) is VDict
    np.testing.assert_allclose(
        result["layers"]["weight"], np.sum(stacked["weight"] * (stacked["weight"] + 1), axis=1), rtol=1e-5
    )
    deep = stacked["inner"]["deep"]
    np.testing.assert_allclose(
        result["layers"]["inner"]["deep"], np.sum(deep * (deep + 1), axis=2), rtol=1e-5
    )
    assert result["single"].shape == ()


def test_expand_vdicts_lists_the_layers():
    tree = {"layers": VDict(x=np.arange(6).reshape(2, 3), inner=VDict(y=np.arange(8).reshape(2, 4)))}
    layers = expand_vdicts(tree)["layers"]
    assert len(layers) == 2
    assert layers[1]["x"].tolist() == [3, 4, 5]
    assert [int(entry["y"]) for entry in layers[1]["inner"]] == [4, 5, 6, 7]


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_split_prng_key_is_a_chain_of_two_way_splits(impl):
    key = jax.random.key_data(jax.random.key(7, impl=impl))

    def split(key_data):
        return jax.random.key_data(jax.random.split(jax.random.wrap_key_data(key_data, impl=impl)))

    expected = []
    rest = key
    for _ in range(3):
        rest, key_i = split(rest)
        expected.append(np.asarray(key_i))
    typed = split_prng_key(jax.random.wrap_key_data(key, impl=impl), 3)
    assert np.array_equal(jax.random.key_data(typed.keys), expected)


def test_split_prng_key_of_several_levels_and_of_a_split_key():
    key = jax.random.PRNGKey(0)
    once = split_prng_key(key, 3)
    twice = split_prng_key(key, (3, 2))
    assert twice.keys.shape == (3, 2, *key.shape)
    assert np.array_equal(twice.keys[1], split_prng_key(once.keys[1], 2).keys)
    assert split_prng_key(once, 3) is once
    with pytest.raises(ValueError, match=r"already split into 3 keys. Expected 4"):
        split_prng_key(once, 4)
    assert isinstance(jax.jit(lambda k: k)(once), StackedKeyArray)
