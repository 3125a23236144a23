"""A run whose batch does not divide over the devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from axlearn.common.config import config_for_function
from axlearn.common.input_dispatch import InputDispatcher
from axlearn.common.input_fake import FakeLmInput, fake_lm_source
from axlearn.common.input_tf_data import Input, identity, per_feed_batch
from axlearn.common.trainer._prefetch import BatchPrefetcher
from tests.common.trainer.tiny_recipe import VOCAB_SIZE, trainer_config
from tests.parity.runs import take_steps

BATCH_SIZE = 6


@pytest.fixture
def without_compilation_cache():
    """On CPU a program that was read from the cache can wait for a collective for ever."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


def _trainer(*, num_devices, dispatcher):
    cfg = trainer_config(dir="unused").set(mesh_shape=(num_devices, 1))
    cfg.input = FakeLmInput.default_config().set(
        global_batch_size=BATCH_SIZE, source_length=12, vocab_size=VOCAB_SIZE
    )
    if dispatcher:
        cfg.input.input_dispatcher = InputDispatcher.default_config().set(
            global_logical_batch_size=BATCH_SIZE
        )
    devices = np.array(jax.devices()[:num_devices]).reshape(cfg.mesh_shape)
    trainer = cfg.klass(cfg.clone(), parent=None, devices=devices)
    trainer.init(jax.random.PRNGKey(5))
    return trainer


def _losses(trainer):
    with trainer.mesh():
        steps = take_steps(trainer, trainer.compile_train_step(), num_steps=3)
        return [float(outputs["loss"]) for _, outputs in steps]


def test_six_rows_on_eight_devices_give_the_losses_of_six_rows_on_one(without_compilation_cache):
    expected = _losses(_trainer(num_devices=1, dispatcher=False))
    trainer = _trainer(num_devices=8, dispatcher=True)
    assert trainer.input.element_spec()["input_ids"].shape == (8, 12)
    np.testing.assert_allclose(_losses(trainer), expected, rtol=1e-5)


def test_without_a_dispatcher_such_a_batch_is_refused():
    with pytest.raises(ValueError, match="does not divide over the 8 shards"):
        _trainer(num_devices=8, dispatcher=False)


def test_rows_that_fill_up_the_mesh_are_no_tokens():
    trainer = _trainer(num_devices=8, dispatcher=True)
    with BatchPrefetcher(
        iter(trainer.input.batches()),
        prepare=lambda batch: batch,
        on_finished=lambda step, loss: None,
        logical_rows=trainer.input.logical_rows,
    ) as prefetcher:
        batch = prefetcher.get()
        prefetcher.step_dispatched(1, jnp.zeros([]))
    assert batch.arrays["input_ids"].shape == (8, 12)
    assert batch.num_tokens == BATCH_SIZE * 12


def test_a_run_of_functions_trains_evaluates_and_continues_bit_for_bit(tmp_path):
    """The whole of `input_tf_data` under a trainer: made-up rows, an evaluation that fills up its last batch."""

    def config(max_step, folder):
        cfg = trainer_config(dir=str(folder), max_step=max_step, save_every_n_steps=2, eval_every_n_steps=4)
        source = config_for_function(fake_lm_source).set(
            is_training=True, max_sequence_length=12, vocab_size=VOCAB_SIZE
        )
        cfg.input = Input.default_config().set(
            source=source,
            processor=config_for_function(identity),
            batcher=config_for_function(per_feed_batch),
            input_dispatcher=InputDispatcher.default_config().set(global_logical_batch_size=BATCH_SIZE),
        )
        cfg.evalers["heldout"].input = cfg.input.clone(
            is_training=False, source=source.clone(is_training=False, num_examples=10)
        )
        return cfg.set(mesh_shape=(1, 1))

    def run(max_step, folder):
        cfg = config(max_step, folder)
        devices = np.array(jax.devices()[:1]).reshape(cfg.mesh_shape)
        trainer = cfg.klass(cfg.clone(), parent=None, devices=devices)
        trainer.run(jax.random.PRNGKey(0))
        return {path: np.asarray(x) for path, x in trainer.trainer_state.model.items()}

    whole = run(4, tmp_path / "whole")
    run(2, tmp_path / "parts")
    in_parts = run(4, tmp_path / "parts")
    for path, value in whole.items():
        np.testing.assert_array_equal(in_parts[path], value)
