"""Ten steps of a small model on uneven rows, and what is compared between layouts of the same devices."""

import contextlib
from typing import NamedTuple

import jax
import numpy as np

from axlearn.common.compiled_program import Collective, collectives_of
from axlearn.common.config import InstantiableConfig, config_for_function
from axlearn.common.input_base import partition_by_path_rank
from axlearn.common.input_fake import FakeLmInput
from axlearn.common.module import nowrap
from axlearn.common.trainer import SpmdTrainer
from axlearn.common.utils import flatten_items, host_to_global_array
from axlearn.experiments.text.gpt import common
from tests.compiling import compiling_anew

NUM_STEPS = 10


class UnevenInput(FakeLmInput):
    """Made-up ids, with labels of different length in each row: rows 0 and 5 have none."""

    @nowrap
    def batches(self):
        cfg = self.config
        lens = 1 + np.arange(cfg.global_batch_size) * 3 % cfg.source_length
        lens[[0, 5]] = 0
        is_live = np.arange(cfg.source_length) < lens[:, None]
        for batch in super().batches():
            labels = np.where(is_live, batch["target_labels"], -1).astype(np.int32)
            yield {**batch, "target_labels": labels, "target_num_bytes": lens.astype(np.int32)}


class PackedInput(UnevenInput):
    """Rows of two documents, whose lengths differ from row to row."""

    @nowrap
    def batches(self):
        cfg = self.config
        starts = 1 + np.arange(cfg.global_batch_size)[:, None] * 5 % (cfg.source_length - 1)
        indices = np.arange(cfg.source_length)
        is_second = indices >= starts
        segment_ids = (1 + is_second).astype(np.int32)
        positions = np.where(is_second, indices - starts, indices).astype(np.int32)
        for batch in super().batches():
            yield {**batch, "input_segment_ids": segment_ids, "input_positions": positions}


def input_partitioner() -> InstantiableConfig:
    """Rows over the axes of a batch, positions over "seq"."""
    return config_for_function(partition_by_path_rank).set(
        path_rank_to_partition={
            (None, 1): jax.P(common.BATCH_AXIS_NAMES),
            (None, 2): jax.P(common.BATCH_AXIS_NAMES, "seq"),
        }
    )


class LayoutRun(NamedTuple):
    """What a run has shown; arrays by their paths.

    Attributes:
        initial: The parameters before the first step.
        losses: Of each step.
        gradients: Of the first step, up to one factor: after one step Adam's first moment is a part of it.
        final: The parameters after the last step.
        collectives: Of the compiled step.
    """

    initial: dict[str, np.ndarray]
    losses: list[float]
    gradients: dict[str, np.ndarray]
    final: dict[str, np.ndarray]
    collectives: list[Collective]


def _arrays(tree) -> dict[str, np.ndarray]:
    return {path: np.asarray(x) for path, x in flatten_items(tree)}


def run_layout(cfg: SpmdTrainer.Config, *, axis_sizes: dict[str, int]) -> LayoutRun:
    """Trains a config by the trainer's own programs.

    Args:
        cfg: The trainer's config, of a learner with Adam; left as it is.
        axis_sizes: The sizes of all axes of its mesh, over all slices.
    """
    num_devices = int(np.prod(list(axis_sizes.values())))
    trainer = cfg.klass(cfg.clone(), parent=None, devices=np.array(jax.devices()[:num_devices]))
    trainer.init(jax.random.PRNGKey(5))
    initial, losses, gradients = _arrays(trainer.trainer_state.model), [], {}
    with trainer.mesh():
        with contextlib.nullcontext() if num_devices == 1 else compiling_anew():
            step_fn = trainer.compile_train_step()
        state, batches = trainer.trainer_state, trainer.input.batches()
        for _ in range(NUM_STEPS):
            batch = host_to_global_array(next(batches), partition=trainer.input.partition_spec)
            state, outputs = step_fn(state, batch)
            losses.append(float(outputs["loss"]))
            if not gradients:
                moments = {path: x for path, x in _arrays(state.learner).items() if "/mu/" in path}
                gradients = {path.split("/mu/")[1]: x for path, x in moments.items()}
    return LayoutRun(
        initial=initial,
        losses=losses,
        gradients=gradients,
        final=_arrays(state.model),
        collectives=collectives_of(step_fn.as_text(), mesh_shape=axis_sizes),
    )


def check_begins_and_trains_the_same(run: LayoutRun, expected: LayoutRun) -> None:
    """The same initial parameters in every bit, and losses within 1e-5 relative."""
    assert run.initial.keys() == expected.initial.keys()
    # From jax 0.11 on, XLA's CPU code for random normal numbers depends on how many a device draws; see mesh_test.
    max_ulp = 0 if jax.__version_info__ < (0, 11) else 4
    for path, value in expected.initial.items():
        np.testing.assert_array_max_ulp(run.initial[path], value, maxulp=max_ulp)
    np.testing.assert_allclose(run.losses, expected.losses, rtol=1e-5)
    # The steps have moved something: equal losses of an unchanged model would prove little.
    assert all((value != run.initial[path]).any() for path, value in run.final.items())


def check_gradients_are_the_same(run: LayoutRun, expected: LayoutRun) -> None:
    """Every gradient within 1e-5 of the largest number in it."""
    assert run.gradients.keys() == expected.gradients.keys() == run.initial.keys()
    for path, gradient in expected.gradients.items():
        error = np.abs(run.gradients[path] - gradient).max() / np.abs(gradient).max()
        assert error < 1e-5, (path, error)
