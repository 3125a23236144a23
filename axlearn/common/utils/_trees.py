"""Trees of arrays: paths, look-up by path, pruning, casting, and dicts of values stacked over layers."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Optional, TypeVar, Union

import jax
import jax.numpy as jnp

T = TypeVar("T")

Tensor = jax.Array

# A leaf, or a tree of leaves. The recursion is not spelled out: run-time type checkers cannot follow it.
Nested = Union[T, Mapping[str, Any], Sequence[Any]]
NestedTensor = Nested[Tensor]


class VDict(dict):
    """A dict whose every leaf is stacked along a leading axis, one entry per layer.

    It is a pytree node of its own, so that optimizers see where a leading axis means "many tensors" and can
    work on each of them by itself (`vectorized_tree_map`). Children are visited in the order of their sorted
    keys, as in a dict.
    """

    def __repr__(self) -> str:
        return f"VDict({super().__repr__()})"


def _flatten_vdict(tree: VDict) -> tuple[list[tuple[Any, Any]], tuple[str, ...]]:
    names = tuple(sorted(tree))
    return [(jax.tree_util.DictKey(name), tree[name]) for name in names], names


def _unflatten_vdict(names: tuple[str, ...], values: Iterable[Any]) -> VDict:
    return VDict(zip(names, values, strict=True))


jax.tree_util.register_pytree_with_keys(VDict, _flatten_vdict, _unflatten_vdict)


def _is_vdict(node: Any) -> bool:
    return isinstance(node, VDict)


def vectorized_tree_map(fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """`jax.tree.map`, with `fn` applied to each layer by itself inside of every VDict.

    Args:
        fn: Takes one leaf of `tree` and the corresponding subtrees of `rest`; below a VDict, without the
            stacked axis.
        tree: Any tree.
        rest: Trees of which `tree` is a prefix.

    Returns:
        A tree like `tree` of the results; a VDict stays a VDict, its results stacked.
    """

    def map_node(node, *others):
        if not _is_vdict(node):
            return fn(node, *others)
        if not jax.tree.leaves(node):
            return node

        def map_one_layer(layer, *other_layers):
            return vectorized_tree_map(fn, layer, *other_layers)

        # One VDict deep: what vmap maps over are plain dicts, hence the recursion ends.
        return VDict(jax.vmap(map_one_layer)(dict(node), *(dict(other) for other in others)))

    return jax.tree.map(map_node, tree, *rest, is_leaf=_is_vdict)


def expand_vdicts(tree: Any) -> Any:
    """Replaces each VDict by a list with one dict per layer."""

    def expand(node):
        if not _is_vdict(node):
            return node
        leaves = jax.tree.leaves(node)
        num_layers = leaves[0].shape[0] if leaves else 0
        return [
            expand_vdicts(jax.tree.map(lambda leaf, index=i: leaf[index], dict(node)))
            for i in range(num_layers)
        ]

    return jax.tree.map(expand, tree, is_leaf=_is_vdict)


def flatten_items(
    tree: Any, separator: str = "/", is_leaf: Optional[Callable[[Any], bool]] = None
) -> list[tuple[str, Any]]:
    """Lists the leaves of a tree with their paths, in the order of `jax.tree.leaves` (dict keys sorted).

    Args:
        tree: Any tree. None is an empty subtree, as everywhere in jax.
        separator: Goes between the parts of a path.
        is_leaf: Tells where to stop; None: at what jax does not know as a tree.

    Returns:
        `[(path, leaf)]`, where dict keys and namedtuple fields appear by name and sequence items by index.
    """
    items, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    return [(jax.tree_util.keystr(path, simple=True, separator=separator), leaf) for path, leaf in items]


def tree_paths(tree: Any, separator: str = "/", is_leaf: Optional[Callable[[Any], bool]] = None) -> Any:
    """A tree like `tree` whose leaves are their own paths; see `flatten_items`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.keystr(path, simple=True, separator=separator), tree, is_leaf=is_leaf
    )


def _path_parts(path: Union[str, Sequence[str]], separator: Optional[str]) -> list[str]:
    if not isinstance(path, str):
        return list(path)
    if not path:
        return []
    return path.split(separator) if separator else [path]


def get_recursively(
    tree: Nested[Any], path: Union[str, Sequence[str]], separator: Optional[str] = "/"
) -> Any:
    """The subtree of nested dicts at `path`.

    Args:
        tree: Nested dicts.
        path: Keys joined by `separator`, or a sequence of keys. Empty: the whole tree.
        separator: What joins the keys of a string; None: the string is one key.

    Returns:
        The subtree, not copied.

    Raises:
        KeyError: If there is nothing at `path`; the message says how far it goes.
    """
    parts = _path_parts(path, separator)
    node: Any = tree
    for i, part in enumerate(parts):
        if not isinstance(node, Mapping) or part not in node:
            here = (separator or "/").join(parts[:i]) or "the root"
            known = ", ".join(map(str, node)) if isinstance(node, Mapping) else f"a {type(node).__name__}"
            raise KeyError(
                f"Nothing at {path!r}: no {part!r} below {here}, which holds {known or 'nothing'}."
            )
        node = node[part]
    return node


def set_recursively(
    tree: dict[str, Any],
    *,
    value: Any,
    path: Union[str, Sequence[str]],
    separator: Optional[str] = "/",
) -> None:
    """Sets the subtree of nested dicts at `path`, in place, making the dicts on the way that are missing.

    Args:
        tree: Nested dicts.
        value: The new subtree.
        path: As in `get_recursively`, not empty.
        separator: As in `get_recursively`.

    Raises:
        ValueError: If `path` is empty.
        TypeError: If there is a leaf on the way.
    """
    parts = _path_parts(path, separator)
    if not parts:
        raise ValueError("The path of the value to set is empty. Expected at least one key.")
    for part in parts[:-1]:
        tree = tree.setdefault(part, {})
    tree[parts[-1]] = value


def copy_recursively(
    *,
    source: Nested[Any],
    target: Optional[dict[str, Any]],
    path: Union[str, Sequence[str]],
    separator: Optional[str] = "/",
) -> Any:
    """Copies the subtree at `path` of `source` to the same path of `target`; leaves are shared.

    Args:
        source: Nested dicts.
        target: Nested dicts, changed in place. None: a new tree.
        path: As in `get_recursively`. Empty: everything; then `target` is not used.
        separator: As in `get_recursively`.

    Returns:
        `target`, or the new tree.
    """
    value = jax.tree.map(lambda leaf: leaf, get_recursively(source, path, separator))
    if not path:
        return value
    target = {} if target is None else target
    set_recursively(target, value=value, path=path, separator=separator)
    return target


def prune_tree(
    tree: Any, should_prune: Callable[[str, Any], bool], *, prefix: str = "", separator: str = "/"
) -> Any:
    """A copy of nested dicts without the entries that `should_prune(path, subtree)` names.

    Args:
        tree: Nested dicts; other nodes count as leaves.
        should_prune: Is asked for each entry after its own entries were pruned.
        prefix: Goes before every path.
        separator: Goes between the parts of a path.

    Returns:
        The copy; dicts keep their type, leaves are shared.
    """
    if not isinstance(tree, dict):
        return tree
    kept = type(tree)()
    for name, value in tree.items():
        path = f"{prefix}{separator}{name}" if prefix else str(name)
        value = prune_tree(value, should_prune, prefix=path, separator=separator)
        if not should_prune(path, value):
            kept[name] = value
    return kept


def prune_empty(tree: Any) -> Any:
    """A copy of nested dicts without dicts that are empty, or that become so."""
    return prune_tree(tree, lambda _, value: isinstance(value, dict) and not value)


def tree_merge(
    primary: Any, *, secondary: Any, leaf_merge_fn: Optional[Callable[[Any, Any], Any]] = None
) -> Any:
    """Merges nested dicts.

    Args:
        primary: Nested dicts.
        secondary: Nested dicts.
        leaf_merge_fn: Called with both where both have a leaf; None: that is an error.

    Returns:
        A new tree with the entries of both.

    Raises:
        ValueError: If a leaf meets a leaf without `leaf_merge_fn`, or a leaf meets a dict.
    """
    if isinstance(primary, dict) and isinstance(secondary, dict):
        merged = type(primary)(primary)
        for name, value in secondary.items():
            if name in merged:
                value = tree_merge(merged[name], secondary=value, leaf_merge_fn=leaf_merge_fn)
            merged[name] = value
        return merged
    if isinstance(primary, dict) or isinstance(secondary, dict):
        raise ValueError(f"Cannot merge a {type(primary).__name__} with a {type(secondary).__name__}.")
    if leaf_merge_fn is None:
        raise ValueError("Both trees have a leaf at the same path and no leaf_merge_fn was given.")
    return leaf_merge_fn(primary, secondary)


def match_regex_rules(x: str, *, rules: Sequence[tuple[str, T]], default_value: Optional[T] = None) -> Any:
    """The value of the first rule whose regular expression matches the whole of `x`; else `default_value`."""
    return next((value for pattern, value in rules if re.fullmatch(pattern, x)), default_value)


def cast_floats(tree: Any, dtype: Any) -> Any:
    """Casts the float32 and bfloat16 arrays of a tree.

    Other types (integers, float64, float8 scales) mean something by their width and stay.

    Args:
        tree: A tree of arrays.
        dtype: float32 or bfloat16; None leaves everything as it is.

    Returns:
        The tree.

    Raises:
        ValueError: If `dtype` is another type.
    """
    if dtype is None:
        return tree
    movable = (jnp.float32, jnp.bfloat16)
    if not any(jnp.dtype(dtype) == jnp.dtype(candidate) for candidate in movable):
        raise ValueError(
            f"cast_floats: dtype {jnp.dtype(dtype).name} is not supported. Expected float32 or bfloat16."
        )

    def cast(leaf):
        is_movable = hasattr(leaf, "dtype") and any(leaf.dtype == candidate for candidate in movable)
        return leaf.astype(dtype) if is_movable else leaf

    return jax.tree.map(cast, tree)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StackedKeyArray:
    """PRNG keys, one per layer.

    Attributes:
        keys: The keys, stacked along the leading axis (or axes, where `num_keys` is a sequence).
        num_keys: How many; static.
    """

    keys: Tensor
    num_keys: Union[int, tuple[int, ...]] = dataclasses.field(metadata={"static": True})


def split_prng_key(
    prng_key: Union[Tensor, StackedKeyArray], num_keys: Union[int, Sequence[int]]
) -> StackedKeyArray:
    """Splits a key into one per layer, by a chain of two-way splits.

    Key `i` does not depend on how many keys are asked for: it is the second half of the split of the first
    half of the split before, as for the parameters of a layer in
    `BaseLayer.initialize_parameters_recursively`.

    Args:
        prng_key: A key, or the result of an earlier call, which is then checked and returned.
        num_keys: How many keys; a sequence of numbers splits once per level.

    Returns:
        The keys, stacked.

    Raises:
        ValueError: If `prng_key` is already split into another number of keys.
    """
    sizes = (num_keys,) if isinstance(num_keys, int) else tuple(num_keys)
    static_sizes = num_keys if isinstance(num_keys, int) else sizes
    if isinstance(prng_key, StackedKeyArray):
        if prng_key.num_keys != static_sizes:
            raise ValueError(
                f"The key is already split into {prng_key.num_keys} keys. Expected {static_sizes}."
            )
        return prng_key

    def split_once(key, _):
        next_key, key_i = jax.random.split(key)
        return next_key, key_i

    def split_levels(key, levels):
        _, keys = jax.lax.scan(split_once, key, xs=None, length=levels[0])
        if len(levels) == 1:
            return keys
        return jax.vmap(lambda key_i: split_levels(key_i, levels[1:]))(keys)

    return StackedKeyArray(keys=split_levels(prng_key, sizes), num_keys=static_sizes)
