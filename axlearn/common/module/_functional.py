"""From a method of a module to a pure function of its state."""

from collections.abc import Mapping, Sequence
from typing import Any, Optional, Union

import jax

from axlearn.common.config import nearest_names
from axlearn.common.module._context import InvocationContext, set_current_context
from axlearn.common.module._module import Module
from axlearn.common.module._outputs import OutputCollection, new_output_collection
from axlearn.common.utils import NestedTensor, Tensor


def _check_is_tree(node: Any, *, what: str, enclosing: frozenset[int] = frozenset()) -> None:
    """Raises where a container contains itself, which jax would follow until the stack overflows."""
    if not isinstance(node, Mapping | list | tuple):
        return
    if id(node) in enclosing:
        raise ValueError(f"{what} contains itself. Expected a tree.")
    for child in node.values() if isinstance(node, Mapping) else node:
        _check_is_tree(child, what=what, enclosing=enclosing | {id(node)})


def _copy_tree(tree: Any, *, what: str) -> Any:
    """New containers around the same leaves, so that a method may change what it is given."""
    _check_is_tree(tree, what=what)
    return jax.tree.map(lambda leaf: leaf, tree)


def _check_method(module: Module, method: str) -> None:
    if callable(getattr(module, method, None)):
        return
    nearest = nearest_names(method, [name for name in dir(module) if not name.startswith("_")])
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    raise ValueError(f"{module.path()}: {type(module).__qualname__} has no method {method!r}.{hint}")


def functional(
    module: Module,
    prng_key: Optional[Tensor],
    state: NestedTensor,
    inputs: Union[Mapping[str, Any], Sequence[Any]],
    *,
    method: str = "forward",
    is_training: bool,
    drop_output_collections: Sequence[str] = ("module_outputs",),
    copy_args_tree: bool = True,
) -> tuple[Any, OutputCollection]:
    """Calls a method of a module as a pure function.

    It can be jitted and differentiated: `jax.jit(functools.partial(functional, module, is_training=True))`.

    Args:
        module: The module.
        prng_key: The PRNG key; None if the method draws no random numbers.
        state: The state of the module; for a layer, its parameters.
        inputs: The arguments of the method: by name, or in order.
        method: The name of the method.
        is_training: Whether this is training.
        drop_output_collections: Fields of `OutputCollection` that return empty.
        copy_args_tree: Whether to copy the containers of `state` and `inputs`, so that the method cannot
            change the caller's. The arrays are shared in any case.

    Returns:
        The outputs of the method, and what it and those it called added to the output collection.

    Raises:
        ValueError: If there is no such method or output collection, or an argument contains itself.
    """
    _check_method(module, method)
    unknown = set(drop_output_collections) - set(OutputCollection._fields)
    if unknown:
        raise ValueError(
            f"drop_output_collections: unknown name {min(unknown)!r}. Expected some of "
            f"{OutputCollection._fields}."
        )
    if copy_args_tree:
        state = _copy_tree(state, what="state")
        inputs = _copy_tree(inputs, what="inputs")
    context = InvocationContext(
        name="root",
        parent=None,
        module=module,
        state=state,
        is_training=is_training,
        prng_key=prng_key,
        output_collection=new_output_collection(),
    )
    args, kwargs = ((), inputs) if isinstance(inputs, Mapping) else (inputs, {})
    with set_current_context(context, require_parent=False):
        outputs = getattr(module, method)(*args, **kwargs)
    dropped: dict[str, Any] = {name: {} for name in drop_output_collections}
    return outputs, context.output_collection._replace(**dropped)
