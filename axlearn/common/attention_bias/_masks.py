"""Mask functions: which key position a query position may attend to, as arithmetic on positions.

A mask function is elementwise and stateless, so that a kernel can evaluate it on a block of positions
without anybody building the whole matrix.
"""

import functools
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from axlearn.common.config import error_message


@runtime_checkable
class MaskFn(Protocol):
    """Says elementwise whether the query at one position may attend to the key at another."""

    def __call__(
        self, query_position: Int[Array, "..."], key_position: Int[Array, "..."]
    ) -> Bool[Array, "..."]:
        """Computes the mask.

        Args:
            query_position: Positions of queries, of any shape that broadcasts against `key_position`.
            key_position: Positions of keys.

        Returns:
            True where the query may attend to the key; shaped like the broadcast arguments.
        """


def causal_mask(query_position: jax.Array, key_position: jax.Array) -> jax.Array:
    """A query sees the keys at its own position and before. See `MaskFn`."""
    return query_position >= key_position


def and_masks(*mask_fns: MaskFn) -> MaskFn:
    """The mask of the pairs that every one of `mask_fns` allows."""
    return _fold_masks("and", mask_fns)


def or_masks(*mask_fns: MaskFn) -> MaskFn:
    """The mask of the pairs that at least one of `mask_fns` allows."""
    return _fold_masks("or", mask_fns)


def left_right_window_mask(left_size: int, right_size: int) -> MaskFn:
    """A query sees itself, `left_size` positions before and `right_size` positions after it.

    Args:
        left_size: Number of visible positions before the query, itself not counted; not negative.
        right_size: Number of visible positions after the query; not negative.

    Returns:
        The mask function; equal sizes give the identical object, so that using it as static data of a
        jitted function does not retrace.

    Raises:
        ValueError: If a size is negative.
    """
    _check_size("left_size", left_size)
    _check_size("right_size", right_size)
    return _window_mask(left_size, right_size)


def sliding_window_causal_mask(sliding_window_size: int) -> MaskFn:
    """A query sees itself and `sliding_window_size` positions before it.

    Args:
        sliding_window_size: Number of visible positions before the query, itself not counted; not negative.

    Returns:
        The mask function, the identical object for equal sizes.

    Raises:
        ValueError: If the size is negative.
    """
    _check_size("sliding_window_size", sliding_window_size)
    return _window_mask(sliding_window_size, 0)


def truncated_key_mask(key_len: int) -> MaskFn:
    """Every query sees the first `key_len` keys and no others, for instance a prefix, or keys without padding.

    Args:
        key_len: Number of visible keys, counted from position 0; not negative.

    Returns:
        The mask function, the identical object for equal lengths.

    Raises:
        ValueError: If the length is negative.
    """
    _check_size("key_len", key_len)
    return _prefix_mask(key_len)


def _check_size(name: str, size: int) -> None:
    if size < 0:
        raise ValueError(
            error_message(what=f"{name}={size}", expected="a number of positions that is not negative")
        )


@functools.lru_cache(maxsize=256)
def _window_mask(left_size: int, right_size: int) -> MaskFn:
    def mask(query_position: jax.Array, key_position: jax.Array) -> jax.Array:
        distance = query_position - key_position
        return (distance <= left_size) & (distance >= -right_size)

    return mask


@functools.lru_cache(maxsize=256)
def _prefix_mask(key_len: int) -> MaskFn:
    def mask(query_position: jax.Array, key_position: jax.Array) -> jax.Array:
        # The sum with zeros gives the mask the shape of both.
        return key_position + jnp.zeros_like(query_position) < key_len

    return mask


@functools.lru_cache(maxsize=256)
def _fold_masks(how: str, mask_fns: tuple[MaskFn, ...]) -> MaskFn:
    if not mask_fns:
        raise ValueError(error_message(what=f"{how}_masks()", expected="at least one mask function"))

    def mask(query_position: jax.Array, key_position: jax.Array) -> jax.Array:
        first, *rest = (mask_fn(query_position, key_position) for mask_fn in mask_fns)
        for other in rest:
            first = first & other if how == "and" else first | other
        return first

    return mask
