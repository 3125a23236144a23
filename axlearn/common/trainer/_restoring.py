"""What a run asks of a checkpoint, and what it says about what it got."""

from collections.abc import Sequence
from typing import Any, Optional

import jax

from axlearn.common.checkpointer import CheckpointIndex
from axlearn.common.config import error_message
from axlearn.common.trainer._position import DataPosition
from axlearn.common.trainer._programs import Programs
from axlearn.common.trainer._state import TrainerState, as_raw_key, is_key_shape
from axlearn.common.utils import Tensor, flatten_items


def state_to_restore(
    held: CheckpointIndex, *, programs: Programs, position: Optional[DataPosition], may_begin: bool
) -> dict[str, Any]:
    """Returns the state to restore from a checkpoint.

    Args:
        held: What the checkpoint holds. The kind of its key is that of the run from now on: rbg and threefry keys
            differ in their shape.
        programs: The trainer's programs.
        position: That in the data; None where the input cannot tell it.
        may_begin: Whether a checkpoint of step 0 with nothing but parameters will do.

    Returns:
        Specs of the parameters alone, as `model`, if that is all there is and it will do; else those of the whole
        state, and the position.
    """
    key = held.arrays.get("prng_key")
    if key is not None and is_key_shape(key.shape):
        programs.expect_key(key.shape)
    if may_begin and _holds_only_parameters(held):
        return {"model": programs.state_specs.model}
    state: dict[str, Any] = programs.state_specs._asdict()
    if position is not None:
        state["input_iter"] = position
    return state


def _holds_only_parameters(held: CheckpointIndex) -> bool:
    """Whether a checkpoint is one to begin from; a run that was under way has moments that must not be lost."""
    paths = [*held.arrays, *held.documents]
    return held.step == 0 and bool(paths) and all(path.startswith("model/") for path in paths)


def complete_state(
    restored: dict[str, Any], *, programs: Programs, prng_key: Optional[Tensor], where: str
) -> tuple[TrainerState, list[str]]:
    """Returns the state of a run from what was restored; what was not restored begins anew.

    Args:
        restored: Arrays in the place of what was restored, by field of the state; specs, or no field, where it was
            not: the checkpoint holds parameters alone, or the checkpointer has a `restore_state_filter`.
        programs: The trainer's programs.
        prng_key: The key from which the rest is made. None: there must be no rest.
        where: The path of the trainer, for the message.

    Returns:
        The state, and the paths of what begins anew.

    Raises:
        ValueError: If something was not restored, and there is no key.
    """
    fields = {name: restored.get(name, spec) for name, spec in programs.state_specs._asdict().items()}
    state = TrainerState(**fields)
    anew = [path for path, leaf in flatten_items(fields) if not isinstance(leaf, jax.Array)]
    if not anew:
        return state, anew
    if prng_key is None:
        more = f" and {len(anew) - 1} more" if len(anew) > 1 else ""
        raise ValueError(
            error_message(
                where=f"{where}.checkpointer.restore_state_filter",
                what=f"It leaves out {anew[0]}{more}, which must begin anew",
                advice="Call restore_or_init(prng_key), or restore_checkpoint with a prng_key",
            )
        )
    return programs.complete(state, as_raw_key(prng_key)), anew


# A filter leaves out a whole optimizer; a few of its paths tell which.
_MAX_NAMED = 3


def begin_text(
    *, step: Optional[int], is_parameters_only: bool, anew: Sequence[str], follows_step: bool
) -> str:
    """Returns what a person should know about where a run begins.

    Args:
        step: The step of the checkpoint; None where there is none.
        is_parameters_only: Whether it holds parameters alone.
        anew: The paths of what was not restored and begins anew.
        follows_step: Whether the position in the data was concluded from the step.
    """
    if step is None:
        return "There is no checkpoint: starting from scratch."
    if is_parameters_only:
        return (
            f"Starting from the parameters in the checkpoint of step {step}, which holds nothing else: the optimizer, "
            "the random key and the data begin anew."
        )
    text = f"Continuing from step {step}."
    if follows_step:
        text += (
            " Its checkpoint holds no position in the data that can be read here: the next batch is number "
            f"{step + 1}."
        )
    if anew:
        more = f" and {len(anew) - _MAX_NAMED} more" if len(anew) > _MAX_NAMED else ""
        text += (
            " What checkpointer.restore_state_filter leaves out begins anew: "
            f"{', '.join(anew[:_MAX_NAMED])}{more}."
        )
    return text
