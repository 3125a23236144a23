"""How a trainer evaluates: what it fills in of its evalers, and of which parameters each one is."""

import os
from collections.abc import Iterator, Mapping
from typing import Any

from jax.sharding import PartitionSpec

from axlearn.common.config import error_message
from axlearn.common.evaler import SpmdEvaler, maybe_set_fields, set_writer_fields
from axlearn.common.trainer._state import TrainerState, as_key


def train_summaries_dir(run_dir: str) -> str:
    """Returns the folder of the summaries of training."""
    return os.path.join(run_dir, "summaries", "train_train")


def evaler_configs(
    evalers: Mapping[str, SpmdEvaler.Config], *, run_dir: str, partition_spec: PartitionSpec
) -> Iterator[tuple[str, SpmdEvaler.Config]]:
    """Yields the name and the config of each evaler, with what only the trainer knows filled in.

    Args:
        evalers: The configs by name; they stay as they are.
        run_dir: The folder of the run.
        partition_spec: How batches lie on the mesh.
    """
    for name, cfg in evalers.items():
        yield (
            name,
            cfg.clone(
                input=maybe_set_fields(cfg.input, partition_spec=partition_spec),
                summary_writer=set_writer_fields(
                    cfg.summary_writer,
                    dir=os.path.join(run_dir, "summaries", name),
                    train_dir=train_summaries_dir(run_dir),
                ),
            ),
        )


def check_evaled_weights(evalers: Mapping[str, SpmdEvaler], *, has_ema: bool) -> None:
    """Refuses evalers of averages that nobody keeps.

    Args:
        evalers: The evalers by name.
        has_ema: Whether the learner keeps averages.

    Raises:
        ValueError: If there is one.
    """
    for evaler in evalers.values():
        if evaler.config.use_ema and not has_ema:
            raise ValueError(
                error_message(
                    where=f"{evaler.path()}.use_ema",
                    what="True, but the learner keeps no averages",
                    expected="a learner with ema.decay, or None or False for the parameters themselves",
                )
            )


def evaluates_ema(evaler: SpmdEvaler, *, step: int, state: TrainerState) -> bool:
    """Returns whether an evaler evaluates the averaged parameters.

    Before the first step there is nothing to average: then it is the parameters.

    Args:
        evaler: The evaler.
        step: The last step that was done.
        state: The state behind it.
    """
    return step > 0 and evaler.config.use_ema is not False and "ema" in state.learner


def evaluate(
    evaler: SpmdEvaler, *, step: int, state: TrainerState, train_summaries: dict[str, Any]
) -> dict[str, Any]:
    """Runs an evaler, whatever its policy says, and returns its summaries.

    Args:
        evaler: The evaler.
        step: The last step that was done.
        state: The state behind it.
        train_summaries: The summaries of that step.
    """
    is_ema = evaluates_ema(evaler, step=step, state=state)
    _, summaries, _ = evaler.eval_step(
        step,
        prng_key=as_key(state.prng_key),
        model_params=state.learner["ema"].ema if is_ema else state.model,
        train_summaries=train_summaries,
        force_run=True,
    )
    assert summaries is not None
    return summaries
