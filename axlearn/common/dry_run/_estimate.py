"""An estimate of what a training step holds besides its state, its gradients and its batch, without compiling it."""

from collections.abc import Mapping
from typing import Any

import jax

from axlearn.common.dry_run._liveness import peak_bytes
from axlearn.common.dry_run._placement import axes_of_sharding, place
from axlearn.common.dry_run._program import flatten
from axlearn.common.trainer import SpmdTrainer


def step_peak_bytes(trainer: SpmdTrainer) -> int:
    """Returns an estimate of the most bytes per device that a step holds at once besides state and batch.

    The step is traced, which takes a fraction of a second, and neither compiled nor run.

    Args:
        trainer: The trainer.
    """
    with trainer.mesh() as mesh:
        state = jax.tree.leaves(trainer.programs.state_shardings())
        traced = trainer.programs.trace_train_step()
        program = flatten(traced.jaxpr, min_float_bytes=_min_float_bytes(mesh))
        batch = [x.sharding for x in jax.tree.leaves(trainer.programs.batch_specs())]
    placed = [
        axes_of_sharding(sharding, ndim=len(value.shape))
        for sharding, value in zip([*state, *batch], program.inputs, strict=True)
    ]
    num_others = len(program.outputs) - len(state)
    place(program, inputs=placed, outputs=[*placed[: len(state)], *[None] * num_others])
    return peak_bytes(program, axis_sizes=_split_axes(mesh.shape), donated=range(len(state)))


def _min_float_bytes(mesh: Any) -> int:
    """XLA's CPU backend holds the results of narrow floats as float32 (jax 0.10.2)."""
    return 4 if mesh.devices.flat[0].platform == "cpu" else 1


def _split_axes(axis_sizes: Mapping[str, Any]) -> dict[str, int]:
    return {axis: int(size) for axis, size in axis_sizes.items() if size > 1}
