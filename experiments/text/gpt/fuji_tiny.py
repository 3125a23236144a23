"""fuji-tiny: a language model that trains in minutes on two CPU cores, on text that every machine has.

The text is the sources of Python's own standard library, about 10 MB; one file in twenty is held out. The tokenizer is
trained on the rest the first time it is needed. Everything is float32, so that runs can be compared bit for bit.

What to expect (two cores, Python 3.11, jax 0.10.2, 2026-11-20): see `docs/fuji_tiny.md`.
"""

from typing import Optional

import jax.numpy as jnp
from jax.sharding import PartitionSpec

from axlearn.common import input_grain
from axlearn.common.config import TrainerConfigFn, config_for_function
from axlearn.common.input_base import partition_by_path_rank
from axlearn.common.input_grain_lm import PackedTextSource
from axlearn.common.text_corpus import python_standard_library, trained_sentencepiece
from axlearn.common.trainer import SpmdTrainer
from axlearn.experiments.text.gpt import common

VOCAB_SIZE = 2048
SEQ_LEN = 256
BATCH_SIZE = 8
MAX_STEP = 400


def _input_config(*, split: str, max_examples: Optional[int] = None) -> input_grain.Input.Config:
    """Returns packed rows of the standard library's training files or of its held-out files."""
    return input_grain.Input.default_config().set(
        is_training=split == "train",
        source=PackedTextSource.default_config().set(
            corpus=config_for_function(python_standard_library),
            vocab_cfg=config_for_function(trained_sentencepiece).set(vocab_size=VOCAB_SIZE),
            max_sequence_length=SEQ_LEN,
            split=split,
            max_examples=max_examples,
        ),
        global_batch_size=BATCH_SIZE,
        input_partitioner=config_for_function(partition_by_path_rank).set(
            path_rank_to_partition={
                (None, 1): PartitionSpec(common.BATCH_AXIS_NAMES),
                (None, 2): PartitionSpec(common.BATCH_AXIS_NAMES, "seq"),
            }
        ),
    )


def trainer_config(data_dir: Optional[str] = None) -> SpmdTrainer.Config:
    """Returns the config of fuji-tiny: 1.5 million parameters, 0.8 million tokens.

    Args:
        data_dir: Not used: the text is part of the running Python.
    """
    del data_dir
    norm = common.rms_norm_config()
    layer = common.layer_config(
        attention=common.attention_config(
            num_heads=4, num_kv_heads=2, rope_theta=1e4, kv_cache_dtype=jnp.float32
        ),
        feed_forward_dim=common.scaled_hidden_dim(scale=8 / 3, round_up_to_multiples_of=16),
        norm=norm,
    )
    cfg = common.trainer_config(
        # All activations fit: recomputing some would only cost time.
        model=common.model_config(
            vocab_size=VOCAB_SIZE, dim=128, num_layers=6, layer=layer, norm=norm, remat=False
        ),
        # Measured on this recipe; see docs/fuji_tiny.md.
        learner=common.learner_config(peak_lr=3e-3, max_step=MAX_STEP, warmup_steps=40, weight_decay=1e-4),
        max_step=MAX_STEP,
        save_every_n_steps=100,
        mesh_shape=common.mesh_shape_from_axes(data=-1),
        train_dtype=jnp.float32,
        keep_every_n_steps=None,
        write_summary_every_n_steps=10,
    )
    cfg.input = _input_config(split="train")
    cfg.evalers = {
        "heldout": common.evaler_config(
            input_config=_input_config(split="heldout", max_examples=256),
            every_n_steps=200,
            max_step=MAX_STEP,
            eval_dtype=jnp.float32,
        )
    }
    cfg.log_every_n_steps = 10
    return cfg


def named_trainer_configs() -> dict[str, TrainerConfigFn]:
    """Returns the recipes of this module by name."""
    return {"fuji-tiny": trainer_config}
