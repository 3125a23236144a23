"""What the runs that are killed and those of several processes train: fuji-test on a small text."""

import jax.numpy as jnp

from axlearn.common import input_grain
from axlearn.common.config import config_for_function
from axlearn.common.input_grain_lm import PackedTextSource
from axlearn.common.text_corpus import text_files, trained_sentencepiece
from axlearn.common.trainer import SpmdTrainer
from axlearn.experiments.text.gpt import common, fuji

VOCAB_SIZE = 320


def small_text_config(input_cfg: input_grain.Input.Config, *, path: str) -> SpmdTrainer.Config:
    """Returns fuji-test in float32, sharded over all devices, so small that a run is mostly start-up and saves.

    Args:
        input_cfg: The input, with the size of its batches; its source is set here.
        path: Of the text.
    """
    cfg = fuji.trainer_config(fuji.Variant(size="test", version="v1"))
    cfg.model.decoder.vocab_size = VOCAB_SIZE
    cfg.train_dtype = jnp.float32
    cfg.mesh_shape = common.mesh_shape_from_axes(fsdp=-1)
    cfg.log_every_n_steps = 1
    cfg.checkpointer.set(keep_last_n=4, keep_every_n_steps=None)
    source = PackedTextSource.default_config().set(
        corpus=config_for_function(text_files).set(path=path),
        vocab_cfg=config_for_function(trained_sentencepiece).set(vocab_size=VOCAB_SIZE),
        max_sequence_length=32,
    )
    cfg.input = input_cfg.set(is_training=True, source=source)
    return cfg
