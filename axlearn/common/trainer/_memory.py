"""What a run needs of a device's memory at the least, known before any array exists, and its refusal."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Optional

import jax
import numpy as np

from axlearn.common.config import error_message
from axlearn.common.trainer._device_memory import MemoryThere

# Of an accelerator; the state may also keep arrays in the memory of its host.
_HOST_MEMORY_KINDS = ("pinned_host", "unpinned_host")


@dataclasses.dataclass(frozen=True)
class MemoryNeeds:
    """Bytes that a run needs on each device.

    Attributes:
        state: Of the trainer's state by its parts: "prng_key", "parameters", and the learner's own, such as
            "optimizer" and "ema". Exact.
        gradients: Of one gradient per parameter that is optimized, in the type in which it is computed. A step
            that updates some parameters before it has the gradients of others may do with less; in a refusal
            it is what a step holds at once in any case.
        batch: Of one global batch. Exact.
        activations: Of all else that the step holds at its peak. None: not known.
    """

    state: Mapping[str, int]
    gradients: int
    batch: int
    activations: Optional[int] = None

    @property
    def total(self) -> int:
        """The sum of all that is known."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Returns the bytes by their parts, in a fixed order."""
        parts = {**self.state, "gradients": self.gradients, "batch": self.batch}
        return parts if self.activations is None else {**parts, "activations": self.activations}


class DoesNotFitError(ValueError):
    """A run needs more memory than there is.

    Attributes:
        needs: What it needs.
        there: What there is.
    """

    def __init__(self, message: str, *, needs: MemoryNeeds, there: MemoryThere):
        super().__init__(message)
        self.needs = needs
        self.there = there


def state_bytes(state_specs: Any, *, platform: str) -> dict[str, int]:
    """Returns the bytes per device of a trainer's state, by its parts.

    Args:
        state_specs: A `TrainerState` of specs.
        platform: Of the devices, such as "cpu".
    """
    learner = state_specs.learner
    return {
        "parameters": bytes_per_device(state_specs.model, platform=platform),
        **{
            name: bytes_per_device(part, platform=platform)
            for name, part in (learner if isinstance(learner, dict) else {"learner": learner}).items()
        },
        "prng_key": bytes_per_device(state_specs.prng_key, platform=platform),
    }


def bytes_per_device(tree: Any, *, platform: str) -> int:
    """Returns the bytes that a tree of arrays takes on each device of the mesh of the current thread.

    Args:
        tree: Specs or `jax.ShapeDtypeStruct`s: whatever has a shape, a dtype and a sharding.
        platform: Of the devices, such as "cpu". Elsewhere than on a CPU, what is kept in the memory of the
            host does not count.
    """
    return sum(
        shard_bytes(leaf) for leaf in jax.tree.leaves(tree) if platform == "cpu" or not is_on_host(leaf)
    )


def is_on_host(leaf: Any) -> bool:
    """Returns whether an array is meant to be kept in the memory of the host."""
    return leaf.sharding.memory_kind in _HOST_MEMORY_KINDS


def shard_bytes(leaf: Any) -> int:
    """Returns the bytes of one device's part of an array that has a shape, a dtype and a sharding."""
    return array_bytes(leaf.sharding.shard_shape(tuple(leaf.shape)), leaf.dtype)


def array_bytes(shape: tuple[int, ...], dtype: Any) -> int:
    """Returns the bytes of an array; a type of fewer than 8 bits takes a byte."""
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize


def check_fits(needs: MemoryNeeds, *, there: Optional[MemoryThere], where: str, num_devices: int) -> None:
    """Refuses a run that cannot fit, before it takes any memory.

    Args:
        needs: What is known of what the run needs.
        there: What there is; None where nobody can tell, and nothing is refused.
        where: The path of the trainer.
        num_devices: Devices of the mesh.

    Raises:
        DoesNotFitError: If the run needs more than there is.
    """
    if there is None or needs.total <= there.num_bytes:
        return
    largest = sorted(needs.parts().items(), key=lambda item: -item[1])[:3]
    devices = "its one device" if num_devices == 1 else f"each of its {num_devices} devices"
    raise DoesNotFitError(
        error_message(
            where=where,
            what=(
                f"does not fit: {devices} needs {format_bytes(needs.total)} without "
                f"activations ({', '.join(f'{name} {format_bytes(size)}' for name, size in largest)}), and "
                f"{format_bytes(there.num_bytes)} are there ({there.source})"
            ),
            expected="a model, a batch or an optimizer state that fits, or a mesh that splits them further",
            advice=(
                "--dry_run shows every array and where it lies; --set check_memory=False starts without this "
                "check."
            ),
        ),
        needs=needs,
        there=there,
    )


def format_bytes(num_bytes: float) -> str:
    """Returns bytes in the largest binary unit of which there is at least one, such as "1.5 GiB"."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = 0
    while power < len(units) - 1 and num_bytes >= 1024 ** (power + 1):
        power += 1
    return f"{num_bytes / 1024**power:,.{0 if power == 0 else 1}f} {units[power]}"
