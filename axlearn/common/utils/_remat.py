"""What to keep for the backward pass, by the names that layers give to their intermediate values."""

import functools
import re
from collections.abc import Callable
from typing import Any, Optional

import jax
from jax.ad_checkpoint import Offloadable, Recompute

from axlearn.common.config import ConfigOr, maybe_instantiate

# What a policy says of a value: True or Saveable keeps it on the device, Offloadable(src, dst) keeps it in the
# memory kind dst, False or Recompute computes it again.
RematVerdict = Any

# Takes a primitive and its parameters, tells jax.checkpoint whether its outputs are saved, offloaded or
# recomputed.
RematPolicy = Callable[..., Any]


@functools.lru_cache(maxsize=256)
def save_and_offload_only_these_names_regex(
    *,
    names_which_can_be_saved: Optional[str],
    names_which_can_be_offloaded: Optional[str],
    offload_src: Optional[str] = "device",
    offload_dst: Optional[str] = "pinned_host",
) -> RematPolicy:
    """A policy that saves or offloads named values and recomputes everything else.

    Names are those that `BaseLayer._remat_name` gives: `ClassName.name`.

    Args:
        names_which_can_be_saved: Regular expression; values whose whole name matches stay on the device.
            None: no value.
        names_which_can_be_offloaded: Regular expression; values whose whole name matches move to
            `offload_dst` between the forward and the backward pass. None: no value.
        offload_src: Memory kind that offloaded values come from; may be None where nothing is offloaded.
        offload_dst: Memory kind that offloaded values go to, likewise.

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


def offload_dots_saveable(*, offload_src: str, offload_dst: str) -> RematPolicy:
    """A policy that offloads what `jax.checkpoint_policies.dots_saveable` saves, and recomputes the rest.

    Those are the results of all matrix products, with and without batch dims, and of convolutions: the values
    that are expensive to compute again. What goes to the host costs its link, not its memory.

    Args:
        offload_src: Memory kind that offloaded values come from, such as "device".
        offload_dst: Memory kind that they wait in for the backward pass, such as "pinned_host".

    Returns:
        The policy. The same arguments give the same object, so a policy never makes jax trace again.
    """
    return _offload_dots_saveable(offload_src, offload_dst)


@functools.lru_cache(maxsize=256)
def _offload_dots_saveable(offload_src: str, offload_dst: str) -> RematPolicy:
    offload = Offloadable(src=offload_src, dst=offload_dst)

    def policy(prim: Any, *args: Any, **params: Any) -> Any:
        is_dot = jax.checkpoint_policies.dots_saveable(prim, *args, **params)
        return offload if is_dot else Recompute

    return policy


def combine_fn(verdict_1: RematVerdict, verdict_2: RematVerdict) -> RematVerdict:
    """Keeps what either policy keeps, where the first of them that keeps it says.

    So the first policy may name exceptions from the second: values that stay on the device although the second
    offloads all like them, or the other way round.

    Args:
        verdict_1: What the first policy says of a value.
        verdict_2: What the second one says of it.

    Returns:
        `verdict_1`, unless it is to recompute the value; then `verdict_2`.
    """
    return verdict_2 if verdict_1 is False or isinstance(verdict_1, type(Recompute)) else verdict_1


def combine_remat_policies(
    policy_1: ConfigOr[RematPolicy],
    policy_2: ConfigOr[RematPolicy],
    combine_fn: Callable[[RematVerdict, RematVerdict], RematVerdict] = combine_fn,
) -> RematPolicy:
    """A policy made of two.

    Args:
        policy_1: A policy, or its config.
        policy_2: Another one.
        combine_fn: Takes what both say of a value, returns what the combined policy says. By default a value is
            kept if one of them keeps it, and where they keep it in different places `policy_1` decides.

    Returns:
        The policy. The same arguments give the same object, so a policy never makes jax trace again.
    """
    return _combine_remat_policies(maybe_instantiate(policy_1), maybe_instantiate(policy_2), combine_fn)


@functools.lru_cache(maxsize=256)
def _combine_remat_policies(
    policy_1: RematPolicy,
    policy_2: RematPolicy,
    combine: Callable[[RematVerdict, RematVerdict], RematVerdict],
) -> RematPolicy:
    def policy(prim: Any, *args: Any, **params: Any) -> RematVerdict:
        return combine(policy_1(prim, *args, **params), policy_2(prim, *args, **params))

    return policy
