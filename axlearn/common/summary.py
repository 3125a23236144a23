"""Values to log that know how to be combined: over the iterations of a loop, over batches of an evaluation."""

import abc
import dataclasses
from typing import Any

import jax

from axlearn.common.utils import Tensor


class Summary(abc.ABC):
    """A value to log; a pytree, so that it passes through jit and scan."""

    @abc.abstractmethod
    def value(self) -> Any:
        """What to log."""

    def validate(self) -> None:  # noqa: B027
        """Checks shapes and types before the value is written.

        Raises:
            ValueError: If they cannot be logged.
        """

    def accumulate(self, other: "Summary") -> "Summary":
        """Combines this value with a later one.

        The default keeps this one: most kinds of examples are worth showing once.
        """
        del other
        return self


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ImageSummary(Summary):
    """Images to show.

    Attributes:
        images: `[batch, height, width, channels]` with 1, 3 or 4 channels: float in [0, 1], or uint8.
    """

    images: Tensor

    def value(self) -> Tensor:
        return self.images

    def validate(self) -> None:
        if self.images.ndim != 4 or self.images.shape[-1] not in (1, 3, 4):
            raise ValueError(
                f"ImageSummary: images have shape {self.images.shape}. Expected [batch, height, width, "
                "channels] with 1, 3 or 4 channels."
            )


def is_summary(node: Any) -> bool:
    """Whether `node` is a Summary: the leaves of trees of summaries."""
    return isinstance(node, Summary)


def accumulate_summaries(first: Any, second: Any) -> Any:
    """Combines two trees of summaries leaf by leaf; plain numbers and arrays are added.

    Args:
        first: A tree of Summary and arrays.
        second: A tree of the same structure.

    Returns:
        A tree of the same structure.
    """

    def combine(x: Any, y: Any) -> Any:
        return x.accumulate(y) if is_summary(x) else x + y

    return jax.tree.map(combine, first, second, is_leaf=is_summary)
