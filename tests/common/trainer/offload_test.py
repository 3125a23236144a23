"""The optimizer's state in the memory of the host, read off a compiled train step and the state that it returns.

CPU devices have a memory of that kind too.
"""

import jax
import numpy as np
import pytest

from axlearn.common.config import config_for_function
from axlearn.common.optimizers import offload_optimizer
from axlearn.common.utils import flatten_items, host_to_global_array
from axlearn.experiments.text.gpt import common, fuji_tiny


def _config(*, is_offloaded: bool):
    cfg = fuji_tiny.trainer_config(data_dir="FAKE")
    cfg.set(dir="unused", evalers={}, mesh_shape=common.mesh_shape_from_axes())
    cfg.model.decoder.set(dim=32, vocab_size=64)
    cfg.model.decoder.transformer.num_layers = 2
    cfg.input.set(global_batch_size=1, source_length=16, vocab_size=64)
    if is_offloaded:
        cfg.learner.optimizer = config_for_function(offload_optimizer).set(
            optimizer=cfg.learner.optimizer, pattern=".*/(mu|nu)/.*"
        )
    return cfg


@pytest.fixture(scope="module")
def runs():
    """Two steps on one device, with the moments there and on the host: memory kinds, the state, the losses."""
    found = []
    for is_offloaded in (False, True):
        cfg = _config(is_offloaded=is_offloaded)
        trainer = cfg.instantiate(parent=None, devices=np.array(jax.devices()[:1]))
        trainer.init(jax.random.PRNGKey(0))
        with trainer.mesh():
            step = trainer.compile_train_step()
            state, losses = trainer.trainer_state, []
            batch = next(trainer.input.batches())
            batch = host_to_global_array(batch, partition=trainer.input.partition_spec)
            for _ in range(2):
                state, outputs = step(state, batch)
                losses.append(float(outputs["loss"]))
        taken, _ = step.input_shardings[0]
        found.append((dict(flatten_items(taken._asdict())), dict(flatten_items(state._asdict())), losses))
    return found


def test_moments_come_from_the_host_and_go_back_there_in_each_step(runs):
    _, (taken, state, _) = runs
    for path, sharding in taken.items():
        kind = "pinned_host" if "/mu/" in path or "/nu/" in path else "device"
        assert sharding.memory_kind == kind, path
        assert state[path].sharding.memory_kind == kind, path


def test_where_moments_wait_changes_no_number(runs):
    (_, here, losses), (_, there, same_losses) = runs
    assert losses == same_losses
    for path, value in here.items():
        np.testing.assert_array_equal(np.asarray(value), np.asarray(there[path]), err_msg=path)
