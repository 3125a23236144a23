"""fuji-tiny: a language model that trains in minutes on two CPU cores, on text that every machine has.

The text is the sources of Python's own standard library, about 10 MB; one file in twenty is held out. The tokenizer is
trained on the rest the first time it is needed. Everything is float32, so that runs can be compared bit for bit.

What to expect (two cores, Python 3.11, jax 0.10.2, 2026-11-20): see `docs/fuji_tiny.md`.
"""

from typing import Optional

import jax.numpy as jnp
from jax.sharding import PartitionSpec

from axlearn.common import input_base, input_grain
from axlearn.common.config import TrainerConfigFn, config_for_function
from axlearn.common.data_dir import FAKE
from axlearn.common.input_base import partition_by_path_rank
from axlearn.common.input_fake import FakeLmInput
from axlearn.common.input_grain_lm import PackedTextSource
from axlearn.common.text_corpus import python_standard_library, text_files, trained_sentencepiece
from axlearn.common.trainer import SpmdTrainer
from axlearn.experiments.text.gpt import common

VOCAB_SIZE = 2048
SEQ_LEN = 256
BATCH_SIZE = 8
MAX_STEP = 500
# Rows of the held-out text that each evaluation reads: some 190 kB, a few seconds.
NUM_HELDOUT_ROWS = 256
# Rows of the training text that are evaluated likewise: how far the two are apart says how much was learnt by heart.
NUM_TRAIN_SAMPLE_ROWS = 64


def _input_config(
    *, data_dir: Optional[str], split: str, max_rows: Optional[int] = None
) -> input_base.Input.Config:
    """Returns packed rows of a corpus' training files, or of its held-out files.

    Args:
        data_dir: As for `trainer_config`.
        split: "train" or "heldout".
        max_rows: How many rows an evaluation reads; None: they are for training, without an end.
    """
    is_training = max_rows is None
    if data_dir == FAKE:
        return FakeLmInput.default_config().set(
            is_training=is_training,
            global_batch_size=BATCH_SIZE,
            source_length=SEQ_LEN,
            vocab_size=VOCAB_SIZE,
            total_num_batches=None if is_training else 4,
        )
    if data_dir is None:
        corpus = config_for_function(python_standard_library)
    else:
        corpus = config_for_function(text_files).set(path=data_dir)
    return input_grain.Input.default_config().set(
        is_training=is_training,
        source=PackedTextSource.default_config().set(
            corpus=corpus,
            vocab_cfg=config_for_function(trained_sentencepiece).set(vocab_size=VOCAB_SIZE),
            max_sequence_length=SEQ_LEN,
            split=split,
            max_examples=max_rows,
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
    """Returns the config of fuji-tiny: 1.6 million parameters, one million tokens.

    Args:
        data_dir: Where the text is: a file, a folder or a glob pattern, as `text_files` reads it. None: the
            standard library of the running Python. "FAKE": ids drawn at random, for trying things out.
    """
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
            vocab_size=VOCAB_SIZE, dim=192, num_layers=3, layer=layer, norm=norm, remat=False
        ),
        # Width, depth and learning rate: the best of what docs/fuji_tiny.md lists.
        learner=common.learner_config(
            peak_lr=5e-3, max_step=MAX_STEP, warmup_steps=40, weight_decay=1e-4, alpha=0.02
        ),
        max_step=MAX_STEP,
        save_every_n_steps=100,
        mesh_shape=common.mesh_shape_from_axes(data=-1),
        train_dtype=jnp.float32,
        keep_every_n_steps=None,
        write_summary_every_n_steps=10,
    )
    cfg.input = _input_config(data_dir=data_dir, split="train")
    cfg.evalers = {
        name: common.evaler_config(
            input_config=_input_config(data_dir=data_dir, split=split, max_rows=max_rows),
            every_n_steps=250,
            max_step=MAX_STEP,
            eval_dtype=jnp.float32,
        )
        for name, split, max_rows in (
            ("heldout", "heldout", NUM_HELDOUT_ROWS),
            ("train_sample", "train", NUM_TRAIN_SAMPLE_ROWS),
        )
        # Of made-up data no part is held out.
        if split == "heldout" or data_dir != FAKE
    }
    cfg.log_every_n_steps = 10
    return cfg


def named_trainer_configs() -> dict[str, TrainerConfigFn]:
    """Returns the recipes of this module by name."""
    return {"fuji-tiny": trainer_config}
