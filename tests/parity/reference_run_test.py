"""Three steps of our trainer against three steps that AXLearn itself took, from AXLearn's own checkpoint of step 0.

The run directory is what a user who moves over would make: AXLearn's `checkpoints` folder and our config. Losses,
parameters, moments, counts and the key are compared with what AXLearn wrote at step 3.

The tolerances are those of the reference's description: its own float32 rounding moves a few elements whose first
gradient is near Adam's eps by up to 8e-6, and the moments by some 1e-6 of the largest.
"""

import shutil
from collections.abc import Iterator
from typing import Optional

import jax
import numpy as np
import pytest

from axlearn.common import input_base
from axlearn.common.checkpointer import Checkpointer, open_checkpoint
from axlearn.common.config import config_class
from axlearn.common.input_base import Batch, DataIterator, lm_element_spec
from axlearn.common.module import nowrap
from axlearn.common.trainer import SpmdTrainer, read_metrics
from axlearn.common.utils import flatten_items
from axlearn.experiments.text.gpt import common
from tests.fixtures_reference import ReferenceRun, fuji_model_config

# What the batches of the run under way are; a config holds no arrays.
_BATCHES: list[Batch] = []


class StoredBatches(input_base.Input):
    """The batches that AXLearn was fed, the first one at step 1."""

    @config_class
    class Config(input_base.Input.Config):
        is_training: Optional[bool] = None

    @nowrap
    def batches(self) -> DataIterator:
        def batches_from(step: int) -> Iterator[Batch]:
            return iter(_BATCHES[step:])

        return DataIterator(batches_from=batches_from, fingerprint={"input": "stored"})

    @nowrap
    def element_spec(self):
        shape = _BATCHES[0]["input_ids"].shape
        return {key: spec for key, spec in lm_element_spec(shape).items() if key in _BATCHES[0]}


def _trainer(run, *, max_step: int, mesh_shape=(1, 1, 1)) -> SpmdTrainer:
    cfg = SpmdTrainer.default_config().set(
        name="reference",
        dir=str(run),
        input=StoredBatches.default_config(),
        model=fuji_model_config(),
        learner=common.learner_config(peak_lr=6e-4, max_step=10, warmup_steps=2, weight_decay=0.01),
        checkpointer=Checkpointer.default_config().set(keep_last_n=3),
        max_step=max_step,
        mesh_axis_names=("data", "fsdp", "model"),
        mesh_shape=mesh_shape,
        batch_axis_names=("data", "fsdp"),
        log_every_n_steps=1,
    )
    devices = np.array(jax.devices()[: np.prod(mesh_shape)])
    return SpmdTrainer(cfg, parent=None, devices=devices)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    reference = ReferenceRun.unpack(tmp_path_factory.mktemp("reference"))
    _BATCHES[:] = reference.batches
    return reference


def _copy_step(reference, run, step: int) -> None:
    name = f"checkpoints/step_{step:08d}"
    shutil.copytree(reference.folder / name, run / name)


@pytest.fixture(scope="module")
def run(reference, tmp_path_factory):
    """A run of ours from their step 0 to step 3, as a user would start it."""
    run = tmp_path_factory.mktemp("run")
    _copy_step(reference, run, 0)
    with jax.default_matmul_precision("highest"):
        trainer = _trainer(run, max_step=3)
        trainer.run(jax.random.PRNGKey(1))
    assert trainer.restored_step == 0
    return run


@pytest.fixture(scope="module")
def ours(run):
    """What we saved at step 3, by path."""
    reader = open_checkpoint(run / "checkpoints", step=3)
    assert reader.writer == "ours"
    return {path: reader.read(path) for path in reader.arrays}


def test_losses_agree_to_a_millionth(reference, run):
    records = read_metrics(str(run / "metrics.jsonl"))
    losses = {record["step"]: record["loss"] for record in records if "loss" in record}
    assert sorted(losses) == [1, 2, 3]
    np.testing.assert_allclose([losses[step] for step in (1, 2, 3)], reference.losses, rtol=1e-6)


def test_parameters_agree(reference, ours):
    theirs = reference.arrays(step=3, prefix="model/")
    errors = np.concatenate([np.abs(ours[f"model/{path}"] - value).ravel() for path, value in theirs.items()])
    assert errors.size == 217_664
    # The few elements of the module's docstring: 8.8e-6 at most on one machine and 2.7e-5 on another with the same jax,
    # because a CPU's vector width and XLA's fusions decide how first gradients near eps are rounded. Another formula is
    # off by 1e-4 and more, and by more than one element in ten thousand.
    assert errors.max() <= 4e-5
    assert np.mean(errors <= 1e-6) >= 0.9999


def test_moments_and_counts_agree(reference, ours):
    theirs = reference.arrays(step=3)
    assert sorted(ours) == sorted(theirs)
    assert sum(path.endswith("count") for path in theirs) == 3
    for path, value in reference.arrays(step=3, prefix="learner/").items():
        value_of_ours = ours[f"learner/{path}"]
        if path.endswith("count"):
            assert value_of_ours == value == 3
        else:
            np.testing.assert_allclose(
                value_of_ours, value, rtol=0, atol=1e-5 * np.abs(value).max(), err_msg=path
            )


def test_the_key_of_the_next_step_agrees(reference, ours):
    np.testing.assert_array_equal(ours["prng_key"], reference.arrays(step=3)["prng_key"])


def test_their_checkpoint_stays_as_it_was_beside_ours(reference, run):
    assert sorted(path.name for path in (run / "checkpoints").glob("step_*")) == [
        f"step_{step:08d}" for step in (0, 1, 2, 3)
    ]
    theirs = reference.folder / "checkpoints" / "step_00000000"
    copy = run / "checkpoints" / "step_00000000"
    names = sorted(path.relative_to(theirs) for path in theirs.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(copy) for path in copy.rglob("*") if path.is_file())
    assert all((theirs / name).read_bytes() == (copy / name).read_bytes() for name in names)


def test_a_run_continues_from_their_step_3_on_a_mesh_and_behind_its_batches(reference, tmp_path, capsys):
    _copy_step(reference, tmp_path, 0)
    _copy_step(reference, tmp_path, 3)
    trainer = _trainer(tmp_path, max_step=4, mesh_shape=(2, 2, 2))
    with trainer.mesh():
        iterator = trainer._open_input()
        trainer.restore_or_init(jax.random.PRNGKey(1))
        trainer.checkpointer.stop()
    assert trainer.step == 3
    assert "Continuing from step 3." in capsys.readouterr().out
    assert iterator.get_state()["next_step"] == 3
    theirs = reference.arrays(step=3)
    state = dict(flatten_items(trainer.trainer_state._asdict()))
    assert sorted(state) == sorted(theirs)
    for path, value in theirs.items():
        np.testing.assert_array_equal(state[path], value, err_msg=path)
    assert any(not x.sharding.is_fully_replicated for x in state.values())


def test_the_key_of_their_run_is_one_of_rbg(reference, run):
    assert open_checkpoint(run / "checkpoints", step=1).arrays["prng_key"].shape == (4,)
