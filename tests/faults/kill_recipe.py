"""kill-test: a recipe so small that a run of sixty steps is mostly start-up and saves."""

import os
from typing import Optional

import jax.numpy as jnp

from axlearn.common import input_grain
from axlearn.common.config import TrainerConfigFn, config_for_function
from axlearn.common.input_grain_lm import PackedTextSource
from axlearn.common.text_corpus import text_files, trained_sentencepiece
from axlearn.common.trainer import SpmdTrainer
from axlearn.experiments.text.gpt import common, fuji

VOCAB_SIZE = 320


def trainer_config(data_dir: Optional[str] = None) -> SpmdTrainer.Config:
    """Returns fuji-test in float32 over the text at $KILL_TEST_TEXT, on two devices."""
    del data_dir
    cfg = fuji.trainer_config(fuji.Variant(size="test", version="v1"))
    cfg.model.decoder.vocab_size = VOCAB_SIZE
    cfg.train_dtype = jnp.float32
    cfg.mesh_shape = common.mesh_shape_from_axes(fsdp=-1)
    cfg.log_every_n_steps = 1
    cfg.checkpointer.set(keep_last_n=4, keep_every_n_steps=None)
    corpus = config_for_function(text_files).set(path=os.environ["KILL_TEST_TEXT"])
    cfg.input = input_grain.Input.default_config().set(
        is_training=True,
        source=PackedTextSource.default_config().set(
            corpus=corpus,
            vocab_cfg=config_for_function(trained_sentencepiece).set(vocab_size=VOCAB_SIZE),
            max_sequence_length=32,
        ),
        global_batch_size=4,
    )
    return cfg


def named_trainer_configs() -> dict[str, TrainerConfigFn]:
    """Returns the recipe by name."""
    return {"kill-test": trainer_config}
