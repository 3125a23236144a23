"""`jax.lax.scan` over a function that calls modules: each iteration runs in a context of its own."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Optional

import jax

from axlearn.common.module._context import InvocationContext, current_context, set_current_context
from axlearn.common.module._module import Module
from axlearn.common.module._outputs import OutputCollection, new_output_collection
from axlearn.common.summary import accumulate_summaries
from axlearn.common.utils import Nested, NestedTensor, StackedKeyArray, Tensor, prune_empty, prune_tree


def scan_in_context(
    fn: Callable[[NestedTensor, NestedTensor], tuple[NestedTensor, NestedTensor]],
    *,
    carry: NestedTensor,
    xs: Mapping[str, Nested[Tensor]],
    module: Optional[Module] = None,
    drop_output: Optional[Callable[[str], bool]] = None,
    child_name_prefix: str = "iter",
    unroll: int = 1,
    remat_kwargs: Optional[Mapping[str, Any]] = None,
    merge_summaries: bool = False,
) -> tuple[NestedTensor, NestedTensor]:
    """Runs `fn` once per entry of `xs`, each time in a child of the current context.

    Args:
        fn: `fn(carry, x) -> (carry, y)`; may call the public methods of `module` and of its descendants.
        carry: What the first iteration gets.
        xs: Under "xs" what `fn` gets one slice of per iteration (None: it gets None); besides, slices of
            fields of the context of each iteration, such as `state` and `prng_key`.
        module: The module of the iterations' contexts; None: that of the current context.
        drop_output: Tells by path ("summaries/...", "state_updates/...", "module_outputs/...") which outputs
            to drop.
        child_name_prefix: Outputs of iteration `i` appear below `<prefix><i>` (summaries), or stacked below
            `<prefix>` (state updates, module outputs).
        unroll: How many iterations one round of the compiled loop contains.
        remat_kwargs: Arguments of `jax.checkpoint` around each iteration; None: no rematerialization.
        merge_summaries: Whether to accumulate the summaries of all iterations below `<prefix>` instead.

    Returns:
        The last carry, and all `y`, stacked.

    Raises:
        ValueError: If `xs` has no "xs", or `remat_kwargs` asks to prevent common subexpression elimination,
            for which there is no need inside of a loop.
        RuntimeError: If there is no current context.
    """
    context = current_context()
    if context is None:
        raise RuntimeError("scan_in_context: there is no context. Expected to run in `functional`.")
    if "xs" not in xs:
        raise ValueError(
            f"scan_in_context: xs has no 'xs' (but {sorted(xs)}). Expected what fn gets under 'xs'."
        )
    xs = {k: v.keys if isinstance(v, StackedKeyArray) else v for k, v in xs.items()}

    def run_one(
        carry_i: NestedTensor, xs_i: dict[str, Any]
    ) -> tuple[NestedTensor, tuple[Any, OutputCollection]]:
        overrides = {"module": context.module if module is None else module, **xs_i}
        x_i = overrides.pop("xs")
        # The outputs are returned by the loop body; only afterwards they may go to the outer context.
        outputs = new_output_collection()
        child = context.add_child(child_name_prefix, output_collection=outputs, **overrides)
        with set_current_context(child):
            carry_i, y_i = fn(carry_i, x_i)
        return carry_i, (y_i, _drop(child.output_collection, drop_output))

    if remat_kwargs is not None:
        if remat_kwargs.get("prevent_cse"):
            raise ValueError(
                "scan_in_context: remat_kwargs['prevent_cse'] is True. Expected False inside of a loop."
            )
        run_one = jax.checkpoint(run_one, **{"prevent_cse": False, **remat_kwargs})
    carry, (ys, outputs) = jax.lax.scan(run_one, init=carry, xs=xs, unroll=unroll)
    num_iterations = next((leaf.shape[0] for leaf in jax.tree.leaves((xs, outputs))), 0)
    _add_stacked(
        context, outputs, name=child_name_prefix, num=num_iterations, merge_summaries=merge_summaries
    )
    return carry, ys


def _drop(outputs: OutputCollection, drop_output: Optional[Callable[[str], bool]]) -> OutputCollection:
    if drop_output is None:
        return outputs
    return OutputCollection(
        **prune_tree(dict(outputs._asdict()), lambda path, _: "/" in path and drop_output(path))
    )


def _add_stacked(
    context: InvocationContext, outputs: OutputCollection, *, name: str, num: int, merge_summaries: bool
) -> None:
    """Adds stacked outputs of iterations to the outputs of the context around the loop."""
    collection = context.output_collection
    collection.add_child(name)
    collection.state_updates[name] = outputs.state_updates
    collection.module_outputs[name] = outputs.module_outputs
    del collection.summaries[name]
    summaries = prune_empty(outputs.summaries)
    if not summaries:
        return

    def summaries_of(i: int) -> dict[str, Any]:
        return jax.tree.map(lambda leaf: jax.lax.index_in_dim(leaf, i, keepdims=False), summaries)

    if merge_summaries:
        context.add_summary(name, functools.reduce(accumulate_summaries, map(summaries_of, range(num))))
        return
    for i in range(num):
        context.add_summary(f"{name}{i}", summaries_of(i))
