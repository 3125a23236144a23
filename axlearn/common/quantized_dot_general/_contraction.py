"""Which dims a product of activations and a kernel sums over."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from axlearn.common.config import error_message


class Contraction(NamedTuple):
    """A product whose result has the other dims of the activations, in order, then those of the kernel.

    Attributes:
        activation_dims: The dims of the activations that are summed over.
        kernel_dims: The dims of the kernel that they meet, one by one.
    """

    activation_dims: tuple[int, ...]
    kernel_dims: tuple[int, ...]

    @classmethod
    def from_einsum(cls, subscripts: str, *, activation_rank: int) -> "Contraction":
        """Reads an einsum of two operands.

        Args:
            subscripts: Such as "...i,io->...o" or "btd,dnh->btnh".
            activation_rank: How many dims the activations have; says what "..." stands for.

        Returns:
            The contraction.

        Raises:
            ValueError: If the result is ordered otherwise, a dim of both operands is not summed over, or the
                activations have another number of dims.
        """
        operands, _, result = subscripts.partition("->")
        activation, _, kernel = operands.partition(",")
        num_named = len(activation.replace("...", ""))
        if activation_rank < num_named or ("..." not in activation and activation_rank > num_named):
            raise ValueError(
                error_message(
                    where="subscripts",
                    what=f"{subscripts!r}, and the activations have {activation_rank} dims",
                    expected=f"{num_named}" + (" or more" if "..." in activation else ""),
                )
            )
        # Digits stand for the dims of "...", which no subscript uses.
        ellipsis = "".join(str(i) for i in range(activation_rank - num_named))
        activation, result = (x.replace("...", ellipsis) for x in (activation, result))
        summed = [label for label in activation if label not in result]
        kept = [label for label in activation if label in result] + [x for x in kernel if x not in activation]
        if result != "".join(kept) or sorted(summed) != sorted(set(activation) & set(kernel)):
            raise ValueError(
                error_message(
                    where="subscripts",
                    what=repr(subscripts),
                    expected="a sum over all dims that both operands have, whose result has the other dims of the "
                    "first, then those of the second, such as 'btd,dnh->btnh'",
                )
            )
        return cls(
            tuple(activation.index(label) for label in summed), tuple(kernel.index(label) for label in summed)
        )

    def apply(self, activation: jax.Array, kernel: jax.Array, **kwargs: Any) -> jax.Array:
        """The product; `kwargs` go to `jax.lax.dot_general`."""
        return _dot(activation, kernel, self.activation_dims, self.kernel_dims, **kwargs)

    def activation_cotangent(self, output: jax.Array, kernel: jax.Array, **kwargs: Any) -> jax.Array:
        """The sum over the kernel's other dims, in the order of the activations' dims."""
        kernel_free = _others(kernel.ndim, self.kernel_dims)
        num_kept = output.ndim - len(kernel_free)
        product = _dot(output, kernel, range(num_kept, output.ndim), kernel_free, **kwargs)
        # Behind the kept dims now stand the kernel's summed dims, in their order.
        summed = _in_order_of(self.kernel_dims, self.activation_dims)
        kept = _others(num_kept + len(summed), summed)
        return _transposed(product, [*kept, *summed])

    def kernel_cotangent(self, activation: jax.Array, output: jax.Array, **kwargs: Any) -> jax.Array:
        """The sum over the activations' other dims, in the order of the kernel's dims."""
        activation_free = _others(activation.ndim, self.activation_dims)
        product = _dot(activation, output, activation_free, range(len(activation_free)), **kwargs)
        summed = _in_order_of(self.activation_dims, self.kernel_dims)
        free = _others(product.ndim, summed)
        return _transposed(product, [*summed, *free])

    def num_summed(self, activation: jax.Array) -> int:
        """How many products each element of the result is the sum of."""
        return math.prod(activation.shape[dim] for dim in self.activation_dims)


def _dot(
    lhs: jax.Array, rhs: jax.Array, lhs_dims: Sequence[int], rhs_dims: Sequence[int], **kwargs: Any
) -> jax.Array:
    return jax.lax.dot_general(lhs, rhs, ((tuple(lhs_dims), tuple(rhs_dims)), ((), ())), **kwargs)


def _others(rank: int, dims: Sequence[int]) -> list[int]:
    return [dim for dim in range(rank) if dim not in dims]


def _in_order_of(dims: Sequence[int], others: Sequence[int]) -> list[int]:
    """The entries of `others`, by ascending entries of `dims`, their partners."""
    return [other for _, other in sorted(zip(dims, others, strict=True))]


def _transposed(x: jax.Array, positions: Sequence[int]) -> jax.Array:
    """Moves dim `i` of `x` to `positions[i]`."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    return x if order == list(range(len(order))) else jax.lax.transpose(x, order)
