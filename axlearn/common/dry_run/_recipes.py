"""Which of many recipes is the largest that fits, in little time."""

import contextlib
import logging
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, Optional

import jax

from axlearn.common.dry_run._report import estimated_needs
from axlearn.common.trainer import MemoryThere, SpmdTrainer, format_bytes

# The number of parameters that a name speaks of, such as fuji-7B-v2 or gala-85M.
_SIZE = re.compile(r"(?<![0-9A-Za-z.])(\d+(?:\.\d+)?)([MBT])(?![0-9A-Za-z])")
_UNITS = {"M": 1e6, "B": 1e9, "T": 1e12}
# At the least, over all devices: a parameter, its gradient and two moments, in float32.
_BYTES_PER_PARAMETER = 16


class _Candidate(NamedTuple):
    name: str
    trainer: SpmdTrainer
    num_parameters: int


def largest_recipe_text(
    candidates: Mapping[str, Callable[[], SpmdTrainer]], *, there: MemoryThere, timeout_seconds: float
) -> str:
    """Returns a sentence that names the largest recipe whose dry run fits.

    Args:
        candidates: Builds the trainer of each recipe, by its name. What cannot be built here is passed over.
        there: The memory there.
        timeout_seconds: After how long to go by what has been looked at until then.
    """
    with _silence():
        return _largest_recipe_text(candidates, there=there, deadline=time.monotonic() + timeout_seconds)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """A context in which nothing is logged: what is looked at here is not what the user started."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def _largest_recipe_text(
    candidates: Mapping[str, Callable[[], SpmdTrainer]], *, there: MemoryThere, deadline: float
) -> str:
    names = _in_order(candidates, there=there)
    fitting: list[_Candidate] = []
    num_seen = 0
    for name in names:
        if time.monotonic() > deadline:
            break
        num_seen += 1
        candidate = _candidate(name, candidates[name], there=there)
        if candidate is not None:
            fitting.append(candidate)
    is_all = num_seen == len(names)
    # From the largest down, because tracing a step takes much longer than counting its state.
    for candidate in sorted(fitting, key=lambda c: -c.num_parameters):
        needed = estimated_needs(candidate.trainer).total
        if needed <= there.num_bytes:
            of = "listed recipe" if is_all else f"of {num_seen} out of {len(names)} listed recipes"
            return (
                f"The largest {of} that fits here is {candidate.name}, which needs {format_bytes(needed)} per "
                "device."
            )
        if time.monotonic() > deadline:
            is_all = False
            break
    if is_all:
        return "None of the listed recipes fits here."
    return "No listed recipe was found to fit here, in the little time that there is for the search."


def _candidate(name: str, build: Callable[[], SpmdTrainer], *, there: MemoryThere) -> Optional[_Candidate]:
    """Builds a trainer; None if its state alone does not fit, or it cannot be built here."""
    try:
        trainer = build()
        least_bytes = trainer.programs.memory_needs().total
        sizes = [math.prod(spec.shape) for spec in jax.tree.leaves(trainer.programs.state_specs.model)]
    except Exception:
        # A mesh for another machine, a library that is not installed, a tokenizer that is not there: whatever
        # the reason, this is a hint below an error, and another recipe will do.
        return None
    return _Candidate(name, trainer, sum(sizes)) if least_bytes <= there.num_bytes else None


def _in_order(names: Mapping[str, object], *, there: MemoryThere) -> list[str]:
    """Puts the names first that may be of the largest that fit: the time may not suffice for all."""
    # A recipe may split its state over all devices.
    num_bytes = there.num_bytes * jax.device_count()

    def rank(name: str) -> tuple[int, float]:
        match = _SIZE.search(name)
        if match is None:
            return 1, 0.0
        size = float(match.group(1)) * _UNITS[match.group(2)]
        return (0, -size) if size * _BYTES_PER_PARAMETER <= num_bytes else (2, size)

    return sorted(names, key=rank)
