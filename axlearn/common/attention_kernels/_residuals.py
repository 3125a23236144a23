"""Names for what a kernel's backward pass needs, so that remat policies can save it."""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name


def with_named_residuals(
    fn: Callable[..., jax.Array],
    *,
    name: str,
    context: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Callable[..., jax.Array]:
    """The same function, whose result and residuals have a name.

    Where a policy saves that name, the backward pass runs without `fn`: both what it computes with and what others
    need of the result are saved. Inputs are not named; they are there, or cheap to compute again.

    Args:
        fn: A function of arrays, and trees of them, with a derivative of its own.
        name: The name.
        context: Makes what the function, and its derivative, are traced in.

    Returns:
        The function.
    """

    def name_unless(x: Any, inputs: dict[int, Any]) -> Any:
        if id(x) in inputs:
            return inputs[id(x)]
        # What a kernel knows of its mask is an input too.
        return checkpoint_name(x, name) if jnp.issubdtype(x.dtype, jnp.floating) else x

    def run(*args: Any) -> jax.Array:
        with context():
            return fn(*args)

    def forward(*args: Any) -> tuple[jax.Array, Any]:
        with context():
            out, vjp = jax.vjp(fn, *args)
        named_out = checkpoint_name(out, name)
        # The result is usually a residual too, and need not be saved twice.
        known = {id(x): x for x in jax.tree.leaves(args)} | {id(out): named_out}
        return named_out, jax.tree.map(lambda x: name_unless(x, known), vjp)

    def backward(vjp: Any, cotangent: jax.Array) -> Any:
        with context():
            return vjp(cotangent)

    named = jax.custom_vjp(run)
    named.defvjp(forward, backward)
    return named
