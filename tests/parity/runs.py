"""A few steps of a config on one device or several, by the trainer's own programs, and how two such runs compare."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from axlearn.common.compiled_program import Collective, collectives_of
from axlearn.common.data_dir import FAKE
from axlearn.common.quantized_dot_general import get_all_fp8_param_names
from axlearn.common.trainer import SpmdTrainer, TrainerState
from axlearn.common.utils import flatten_items, host_to_global_array
from axlearn.experiments.registry import find_trainer_config
from tests.compiling import compiling_anew


class Run(NamedTuple):
    """What a run has shown; arrays by their paths.

    Attributes:
        initial: The parameters before the first step.
        losses: Of each step.
        gradients: Of the first step, after clipping, by the path of the parameter; up to one factor.
        final: The parameters after the last step.
        program: The compiled step.
        axis_sizes: Of the mesh, over all slices.
    """

    initial: dict[str, np.ndarray]
    losses: list[float]
    gradients: dict[str, np.ndarray]
    final: dict[str, np.ndarray]
    program: str
    axis_sizes: dict[str, int]

    def collectives(self) -> list[Collective]:
        """Those of the compiled step."""
        return collectives_of(self.program, mesh_shape=self.axis_sizes)


def recipe(name: str) -> SpmdTrainer.Config:
    """Returns a recipe by its name, on made-up data, in float32 and without evaluation.

    The learning rate is at its peak from the first step: of a warm-up over 2000, twenty would change nearly nothing.
    """
    cfg = find_trainer_config(name)(data_dir=FAKE)
    cfg.learner.optimizer.args[1].update_schedule = 1
    return cfg.set(dir="unused", evalers={}, train_dtype=jnp.float32)


def _arrays(tree) -> dict[str, np.ndarray]:
    return {path: np.asarray(x) for path, x in flatten_items(tree)}


def take_steps(
    trainer: SpmdTrainer, step_fn: Callable[..., Any], *, num_steps: int
) -> Iterator[tuple[TrainerState, dict[str, Any]]]:
    """Yields the state after each step and what the step returned besides; within the mesh of the trainer.

    Args:
        trainer: A trainer that has a state; the first step takes it over.
        step_fn: Its step, compiled or jitted.
        num_steps: The number of steps.
    """
    state, batches = trainer.trainer_state, trainer.input.batches()
    for _ in range(num_steps):
        batch = host_to_global_array(next(batches), partition=trainer.input.partition_spec)
        state, outputs = step_fn(state, batch)
        yield state, outputs


def run(cfg: SpmdTrainer.Config, *, num_devices: int, num_steps: int, seed: int = 5) -> Run:
    """Trains for some steps.

    Args:
        cfg: The trainer's config, of a learner with Adam and a mesh of so many devices; left as it is.
        num_devices: 1 to 8, the devices of the tests.
        num_steps: The number of steps, at least one.
        seed: Of the parameters, on which it depends how far the first steps lead.
    """
    trainer = cfg.klass(cfg.clone(), parent=None, devices=np.array(jax.devices()[:num_devices]))
    trainer.init(jax.random.PRNGKey(seed))
    initial, losses, gradients = _arrays(trainer.trainer_state.model), [], {}
    with trainer.mesh():
        with contextlib.nullcontext() if num_devices == 1 else compiling_anew():
            step_fn = trainer.compile_train_step()
        for state, outputs in take_steps(trainer, step_fn, num_steps=num_steps):
            losses.append(float(outputs["loss"]))
            if not gradients:
                # After one step Adam's first moment is a part of the gradient.
                moments = {path: x for path, x in flatten_items(state.learner) if "/mu/" in path}
                gradients = {path.split("/mu/")[1]: np.asarray(x) for path, x in moments.items()}
    return Run(
        initial=initial,
        losses=losses,
        gradients=gradients,
        final=_arrays(state.model),
        program=step_fn.as_text(),
        axis_sizes=dict(jax.tree.leaves(trainer.trainer_state_partition_specs)[0].mesh.shape),
    )


def check_begins_and_trains_the_same(ours: Run, expected: Run) -> None:
    """The same initial parameters in every bit, and losses within 1e-5 relative."""
    assert ours.initial.keys() == expected.initial.keys()
    # From jax 0.11 on, XLA's CPU code for random normal numbers depends on how many a device draws; see mesh_test.
    max_ulp = 0 if jax.__version_info__ < (0, 11) else 4
    for path, value in expected.initial.items():
        np.testing.assert_array_max_ulp(ours.initial[path], value, maxulp=max_ulp)
    np.testing.assert_allclose(ours.losses, expected.losses, rtol=1e-5)
    # The steps have moved something: equal losses of an unchanged model would prove little.
    assert all((value != ours.initial[path]).any() for path, value in ours.final.items())


def check_gradients_are_the_same(ours: Run, expected: Run, *, tolerance: float = 1e-5) -> None:
    """Every gradient within 1e-5, or `tolerance`, of the largest number in it."""
    # What fp8 remembers has none.
    trained = {path for path in ours.initial if path.rsplit("/", 1)[-1] not in get_all_fp8_param_names()}
    assert ours.gradients.keys() == expected.gradients.keys() == trained
    for path, gradient in expected.gradients.items():
        error = np.abs(ours.gradients[path] - gradient).max() / np.abs(gradient).max()
        assert error < tolerance, (path, error)
