"""Optimizer states that wait in the memory of the host, between the steps that need them."""

import re
from typing import Any

import jax

from axlearn.common.base_layer import ParameterSpec
from axlearn.common.config import ConfigOr, error_message, maybe_instantiate
from axlearn.common.optimizer_base import NestedOptParam, OptStateSpec, PartitionedGradientTransformation
from axlearn.common.utils import Nested, Tensor, tree_paths

_SPACES = {"device": jax.memory.Space.Device, "pinned_host": jax.memory.Space.Host}


def offload_optimizer(
    optimizer: ConfigOr[PartitionedGradientTransformation],
    *,
    pattern: str = ".*",
    offload_src: str = "device",
    offload_dst: str = "pinned_host",
) -> PartitionedGradientTransformation:
    """Keeps the state of an optimizer in another memory, and fetches it for each update.

    It belongs around the whole optimizer: nothing outside of it can compute with what it keeps elsewhere.

    Args:
        optimizer: The optimizer, or its config.
        pattern: A regular expression for whole paths in the state, such as ".*/(mu|nu)/.*": what to move.
        offload_src: The memory where updates are computed, "device".
        offload_dst: The memory where the state waits, "pinned_host".

    Returns:
        The optimizer. Its state is that of `optimizer`, and what it computes too.

    Raises:
        ValueError: If there is no such memory, or nothing in the state matches.
    """
    for field, kind in (("offload_src", offload_src), ("offload_dst", offload_dst)):
        if kind not in _SPACES:
            raise ValueError(
                error_message(
                    where=f"offload_optimizer.{field}",
                    what=repr(kind),
                    expected=f"one of {', '.join(_SPACES)}",
                )
            )
    inner = maybe_instantiate(optimizer)

    def map_matching(fn: Any, tree: Nested[Any]) -> Nested[Any]:
        return jax.tree.map(
            lambda path, leaf: fn(leaf) if re.fullmatch(pattern, path) else leaf, tree_paths(tree), tree
        )

    def move(state: Any, kind: str) -> Any:
        return map_matching(lambda x: jax.device_put(x, _SPACES[kind]), state)

    def init_fn(params: NestedOptParam) -> Any:
        return move(inner.init(params), offload_dst)

    def update_fn(updates: Nested[Tensor], state: Any, params: NestedOptParam) -> tuple[Any, Any]:
        new_updates, new_state = inner.update(updates, move(state, offload_src), params)
        return new_updates, move(new_state, offload_dst)

    def partition_fn(param_specs: Nested[ParameterSpec]) -> Any:
        specs = inner.partition(param_specs)
        paths = jax.tree.leaves(tree_paths(specs))
        if paths and not any(re.fullmatch(pattern, path) for path in paths):
            raise ValueError(
                error_message(
                    where="offload_optimizer.pattern",
                    what=f"{pattern!r} matches nothing in the state",
                    expected=f"a regular expression for whole paths such as {paths[0]!r}",
                )
            )

        def place(spec: OptStateSpec) -> OptStateSpec:
            return OptStateSpec(
                shape=spec.shape, dtype=spec.dtype, mesh_axes=spec.mesh_axes, memory_kind=offload_dst
            )

        return map_matching(place, specs)

    return PartitionedGradientTransformation(init=init_fn, update=update_fn, partition=partition_fn)
