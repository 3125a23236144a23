"""What to keep for the backward pass, by the names that layers give to their intermediate values."""

import functools
import re
from collections.abc import Callable
from typing import Any, Optional

import jax

# Takes a primitive and its parameters, tells jax.checkpoint whether its outputs are saved, offloaded or
# recomputed.
RematPolicy = Callable[..., Any]


@functools.lru_cache(maxsize=256)
def save_and_offload_only_these_names_regex(
    *,
    names_which_can_be_saved: Optional[str] = None,
    names_which_can_be_offloaded: Optional[str] = None,
    offload_src: str = "device",
    offload_dst: str = "pinned_host",
) -> RematPolicy:
    """A policy that saves or offloads named values and recomputes everything else.

    Names are those that `BaseLayer._remat_name` gives: `ClassName.name`.

    Args:
        names_which_can_be_saved: Regular expression; values whose whole name matches stay on the device.
            None: no value.
        names_which_can_be_offloaded: Regular expression; values whose whole name matches move to
            `offload_dst` between the forward and the backward pass. None: no value.
        offload_src: Memory kind that offloaded values come from.
        offload_dst: Memory kind that offloaded values go to.

    Returns:
        The policy. The same arguments give the same object, so a policy never makes jax trace again.

    Raises:
        ValueError: While tracing, if a name matches both expressions.
    """

    @functools.cache
    def policy_of_name(name: str) -> RematPolicy:
        save = names_which_can_be_saved is not None and re.fullmatch(names_which_can_be_saved, name)
        offload = names_which_can_be_offloaded is not None and re.fullmatch(
            names_which_can_be_offloaded, name
        )
        if save and offload:
            raise ValueError(
                f"{name!r} matches both names_which_can_be_saved={names_which_can_be_saved!r} and "
                f"names_which_can_be_offloaded={names_which_can_be_offloaded!r}. Expected at most one match."
            )
        return jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[name] if save else [],
            names_which_can_be_offloaded=[name] if offload else [],
            offload_src=offload_src,
            offload_dst=offload_dst,
        )

    def policy(prim: Any, *args: Any, **params: Any) -> Any:
        # Other primitives have a parameter `name` too (a jitted function); jax's own policy tells them apart.
        name = params.get("name")
        return policy_of_name(name if isinstance(name, str) else "")(prim, *args, **params)

    return policy
