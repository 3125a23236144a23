"""What can be wrong with a trainer config although every part of it can be built."""

import enum
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from axlearn.common.config import ConfigBase, Place, places_below

# Fields whose number of steps ought to be the trainer's.
_MAX_STEP = "max_step"
# What is asked of tokenizers by the name of the field: a config of a vocabulary.
_VOCABULARY = "vocab_cfg"


class Severity(enum.Enum):
    """What follows from a finding."""

    # A run would be refused.
    ERROR = "error"
    # A run would start, and may not do what is meant.
    WARNING = "warning"
    # Something could not be looked at.
    NOTE = "note"


class Finding(NamedTuple):
    """Something about a config that somebody should know.

    Attributes:
        severity: What follows from it.
        path: Where it is; empty: in all of it.
        message: What it is, in full sentences; several lines where a validator wrote it.
    """

    severity: Severity
    path: str
    message: str


def findings_of_config(cfg: Any) -> list[Finding]:
    """Returns what the values of a trainer config say about each other.

    Args:
        cfg: The config, after mesh rule and overrides.
    """
    # The rules for other machines are no part of what runs.
    places = list(places_below(cfg, closed=("mesh_rules",)))
    return [*_max_steps(cfg, places), *_checkpoints(cfg)]


def _max_steps(cfg: Any, places: list[Place]) -> Iterator[Finding]:
    """A schedule that ends at another step than the run, a policy that has "the last step" elsewhere."""
    for place in places:
        is_copy = place.key == _MAX_STEP and place.path != _MAX_STEP
        if not is_copy or not isinstance(place.value, int | float) or place.value == cfg.max_step:
            continue
        yield Finding(
            Severity.WARNING,
            place.path,
            f"it is {_steps(place.value)}, and the run's own max_step is {_steps(cfg.max_step)}",
        )


def _steps(value: float) -> str:
    return f"{value:,}" if math.isfinite(value) else "not limited"


def _checkpoints(cfg: Any) -> Iterator[Finding]:
    checkpointer = cfg.checkpointer
    policy = getattr(checkpointer, "save_policy", None)
    period = getattr(policy, "n", None)
    keep_period = getattr(checkpointer, "keep_every_n_steps", None)
    if not isinstance(period, int):
        return
    if period > cfg.max_step:
        yield Finding(
            Severity.WARNING,
            "checkpointer.save_policy.n",
            f"it is {period:,}, and the run has {_steps(cfg.max_step)} steps: nothing is saved before its end",
        )
    if isinstance(keep_period, int) and 0 < keep_period <= period < cfg.max_step:
        yield Finding(
            Severity.WARNING,
            "checkpointer.keep_every_n_steps",
            f"it is {keep_period:,}, and there is a checkpoint every {period:,} steps: none of them is ever deleted",
        )


def vocabulary_sizes(inputs: Mapping[str, ConfigBase]) -> Iterator[tuple[str, Any]]:
    """Yields the number of ids of each tokenizer below some inputs, with its path; of equal ones the first.

    A tokenizer that would be trained for the purpose is not: its size is in its config.

    Args:
        inputs: The configs of inputs, by their paths.

    Yields:
        A path and a number, or the error that came of reading the tokenizer's file.
    """
    seen = []
    for path, input_cfg in inputs.items():
        for place in places_below(input_cfg):
            if place.key == "vocab_size" and isinstance(place.value, int):
                yield f"{path}.{place.path}", place.value
            is_vocabulary = place.key == _VOCABULARY and isinstance(place.value, ConfigBase)
            if is_vocabulary and "vocab_size" not in place.value and place.value not in seen:
                seen.append(place.value)
                yield f"{path}.{place.path}", _vocabulary_size(place.value)


def _vocabulary_size(vocab_cfg: Any) -> Any:
    try:
        return int(vocab_cfg.instantiate().vocab_size)
    except (ValueError, OSError, ImportError) as e:
        return e
