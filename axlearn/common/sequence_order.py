"""The order in which the positions of a row lie in memory, so that devices that split a row have equal work.

Under a causal mask late positions see more than early ones. In head-tail order of n chunks a row is cut into n equal
chunks 0, 1, ..., n - 1, which lie in memory as 0, n-1, 1, n-2, 2, ...: parts with an even number of chunks have as
many early chunks as late ones. The order depends on the length and on n alone, never on a mesh, so nor do numbers.

Reference: Brandon et al., Striped Attention, https://arxiv.org/abs/2311.09431 (why a causal mask needs an order); the
pairing of an early with a late chunk is that of Llama 3, https://arxiv.org/abs/2407.21783, section 3.3.2.
"""

from typing import Optional

import jax
import jax.numpy as jnp
import numpy as np

from axlearn.common.config import error_message


def check_num_chunks(num_chunks: int, *, seq_len: Optional[int] = None, where: str = "") -> None:
    """Refuses numbers of chunks that no row can have, or not one of this length.

    Args:
        num_chunks: The number of chunks.
        seq_len: Positions of a row. None: of any length.
        where: The path of what asks for it, for the message.

    Raises:
        ValueError: If it is neither 1 nor an even number, or does not divide the row.
    """
    if num_chunks != 1 and (num_chunks < 2 or num_chunks % 2):
        raise ValueError(
            error_message(
                where=where,
                what=f"{num_chunks} chunks in head-tail order",
                expected="an even number, twice the number of devices that split a row, or 1 for the order of the text",
            )
        )
    if seq_len is not None and seq_len % num_chunks:
        raise ValueError(
            error_message(
                where=where,
                what=f"{num_chunks} chunks of a row of {seq_len} positions",
                expected=f"a number of chunks that divides {seq_len}",
            )
        )


def head_tail_chunks(num_chunks: int) -> np.ndarray:
    """Which chunk of the text lies at each place.

    Args:
        num_chunks: Number of chunks: an even number, or 1 for the order of the text.

    Returns:
        int32 `[num_chunks]`: 0, n-1, 1, n-2, ...

    Raises:
        ValueError: For another number of chunks.
    """
    check_num_chunks(num_chunks)
    places = np.arange(num_chunks, dtype=np.int32)
    return np.where(places % 2, num_chunks - 1 - places // 2, places // 2).astype(np.int32)


def head_tail_indices(seq_len: int, *, num_chunks: int) -> np.ndarray:
    """The index in the text of what lies at each place of a row.

    Args:
        seq_len: Positions of a row, a multiple of `num_chunks`.
        num_chunks: See `head_tail_chunks`.

    Returns:
        int32 `[seq_len]`, such that `row[indices]` puts a row of the text in head-tail order.

    Raises:
        ValueError: If the chunks do not divide the row, or for a number of chunks that cannot be.
    """
    check_num_chunks(num_chunks, seq_len=seq_len)
    chunks = head_tail_chunks(num_chunks)
    return np.arange(seq_len, dtype=np.int32).reshape(num_chunks, -1)[chunks].reshape(-1)


def text_order_indices(seq_len: int, *, num_chunks: int) -> np.ndarray:
    """The place of each position of the text: the inverse of `head_tail_indices`.

    Args:
        seq_len: Positions of a row, a multiple of `num_chunks`.
        num_chunks: See `head_tail_chunks`.

    Returns:
        int32 `[seq_len]`, such that `row[indices]` puts a row that lies in head-tail order in the order of the text.

    Raises:
        ValueError: As `head_tail_indices`.
    """
    return np.argsort(head_tail_indices(seq_len, num_chunks=num_chunks)).astype(np.int32)


def to_head_tail_order(x: jax.Array, *, num_chunks: int, axis: int = 1) -> jax.Array:
    """Puts an array that lies in the order of the text in head-tail order.

    Args:
        x: The array.
        num_chunks: See `head_tail_chunks`.
        axis: The dim of positions, a multiple of `num_chunks` long.

    Returns:
        The array as `x[..., head_tail_indices(...), ...]`, by static slices.

    Raises:
        ValueError: As `head_tail_indices`.
    """
    return _take_chunks(x, head_tail_chunks(num_chunks), axis=axis)


def to_text_order(x: jax.Array, *, num_chunks: int, axis: int = 1) -> jax.Array:
    """Puts an array that lies in head-tail order in the order of the text; the inverse of `to_head_tail_order`."""
    return _take_chunks(x, np.argsort(head_tail_chunks(num_chunks)), axis=axis)


def _take_chunks(x: jax.Array, chunks: np.ndarray, *, axis: int) -> jax.Array:
    check_num_chunks(len(chunks), seq_len=x.shape[axis])
    if len(chunks) == 1:
        return x
    parts = jnp.split(x, len(chunks), axis=axis)
    return jnp.concatenate([parts[i] for i in chunks], axis=axis)
