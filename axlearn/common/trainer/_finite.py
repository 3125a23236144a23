"""Nothing that is not finite is saved: a look at a whole state, on the device, before a save."""

import jax
import jax.numpy as jnp

from axlearn.common.utils import NestedTensor, flatten_items, maybe_shard


@jax.jit
def _all_finite(leaves: list[jax.Array]) -> jax.Array:
    # As a whole on every device, whatever the compiler would choose: each process looks at it.
    return maybe_shard(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]), ())


def non_finite_paths(tree: NestedTensor) -> list[str]:
    """Returns the paths of the float arrays that hold an infinity or a NaN; waits for the device."""
    floats = [(path, x) for path, x in flatten_items(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    if not floats:
        return []
    finite = jax.device_get(_all_finite([x for _, x in floats]))
    return [path for (path, _), ok in zip(floats, finite, strict=True) if not ok]
