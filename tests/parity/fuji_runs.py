"""A few steps of a recipe, on one device or on eight, by the trainer's own programs."""

import contextlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from axlearn.common.data_dir import FAKE
from axlearn.common.trainer import SpmdTrainer
from axlearn.common.utils import flatten_items, host_to_global_array
from axlearn.experiments.registry import find_trainer_config
from tests.compiling import compiling_anew


class Run(NamedTuple):
    """What a run has shown.

    Attributes:
        losses: Of each step.
        gradients: Of the first step, after clipping, by the path of the parameter; up to one factor.
        program: The compiled step.
    """

    losses: list[float]
    gradients: dict[str, np.ndarray]
    program: str


def recipe(name: str) -> SpmdTrainer.Config:
    """Returns a recipe by its name, on made-up data, in float32 and without evaluation.

    The learning rate is at its peak from the first step: of a warm-up over 2000, twenty would change nearly nothing.
    """
    cfg = find_trainer_config(name)(data_dir=FAKE)
    cfg.learner.optimizer.args[1].update_schedule = 1
    return cfg.set(dir="unused", evalers={}, train_dtype=jnp.float32)


def run(cfg: SpmdTrainer.Config, *, num_devices: int, num_steps: int) -> Run:
    """Trains a recipe for some steps.

    Args:
        cfg: The recipe, with a mesh shape for so many devices; left as it is.
        num_devices: 1 to 8, the devices of the tests.
        num_steps: The number of steps, at least one.
    """
    devices = np.array(jax.devices()[:num_devices])
    trainer = cfg.klass(cfg.clone(), parent=None, devices=devices)
    trainer.init(jax.random.PRNGKey(3))
    losses, gradients = [], {}
    with trainer.mesh():
        with contextlib.nullcontext() if num_devices == 1 else compiling_anew():
            step_fn = trainer.compile_train_step()
        state, batches = trainer.trainer_state, trainer.input.batches()
        for _ in range(num_steps):
            batch = host_to_global_array(next(batches), partition=trainer.input.partition_spec)
            state, outputs = step_fn(state, batch)
            losses.append(float(outputs["loss"]))
            if not gradients:
                # After one step Adam's first moment is a part of the gradient.
                arrays = flatten_items(state.learner)
                gradients = {path.split("/mu/")[1]: np.asarray(x) for path, x in arrays if "/mu/" in path}
    return Run(losses=losses, gradients=gradients, program=step_fn.as_text())
