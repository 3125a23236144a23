"""Activation functions by name."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from axlearn.common.config import error_message, nearest_names


def _linear(x: jax.Array) -> jax.Array:
    return x


def _quick_gelu(x: jax.Array) -> jax.Array:
    # 1.702: the sigmoid approximation of GELU, Hendrycks and Gimpel, https://arxiv.org/abs/1606.08415,
    # section 2.
    return x * jax.nn.sigmoid(1.702 * x)


def _exact_gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


def _squared_relu(x: jax.Array) -> jax.Array:
    return jnp.square(jax.nn.relu(x))


_OWN_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "linear": _linear,
    "quick_gelu": _quick_gelu,
    "exact_gelu": _exact_gelu,
    "squared_relu": _squared_relu,
}
_NAMESPACES = {"nn": jax.nn, "jnp": jnp}


def get_activation_fn(name: str) -> Callable[[jax.Array], jax.Array]:
    """Finds an elementwise function by the name that configs use.

    Args:
        name: "linear" (the identity), "quick_gelu" (x * sigmoid(1.702 x)), "exact_gelu" (by the error
            function), "squared_relu", "nn.<function of jax.nn>" or "jnp.<function of jax.numpy>".

    Returns:
        The function, from an array to an array of the same shape.

    Raises:
        ValueError: If there is no function of this name.
    """
    own = _OWN_ACTIVATIONS.get(name)
    if own is not None:
        return own
    namespace, _, attribute = name.partition(".")
    fn = getattr(_NAMESPACES.get(namespace), attribute, None) if attribute.isidentifier() else None
    if callable(fn):
        return fn
    candidates = [*_OWN_ACTIVATIONS, *(f"nn.{x}" for x in dir(jax.nn) if not x.startswith("_"))]
    own_names = ", ".join(_OWN_ACTIVATIONS)
    raise ValueError(
        error_message(
            what=f"unknown activation {name!r}",
            expected=f"one of {own_names}, nn.<function of jax.nn>, jnp.<function of jax.numpy>",
            nearest=nearest_names(name, candidates),
        )
    )
