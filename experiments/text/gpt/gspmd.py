"""gspmd: a dense model in a pipeline over two slices, the "16B" of the GSPMD paper's tables with grouped heads.

The machine is two TPU slices of 128 chips, a mesh of 2x16x8: the slow network between the slices carries the pipeline,
the fast one within each carries 16-way data and 8-way tensor parallelism. With 16 micro-batches each slice idles in one
step of 17, and each chip works on two rows at a time. Eight key heads instead of 64 leave 11.1 billion parameters.

Reference: Xu et al., GSPMD, https://arxiv.org/abs/2105.04663, section 3.3.

| recipe | who holds the micro-batches that wait |
|---|---|
| gspmd-16B-2x16x8 | every stage all of them |
| gspmd-16B-2x16x8-stream | every stage its half |
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from axlearn.common.attention import PipelinedTransformerLayer, build_remat_spec
from axlearn.common.causal_lm import Model
from axlearn.common.config import config_for_function
from axlearn.common.learner import Learner
from axlearn.common.optimizers import adafactor_optimizer
from axlearn.common.pipeline import BaseSchedule, GPipeSchedule, StreamSchedule
from axlearn.common.schedule import adafactor, adafactor_decay_rate
from axlearn.common.trainer import SpmdTrainer
from axlearn.common.utils import HybridMeshShape
from axlearn.experiments.text.gpt import common

VOCAB_SIZE = 32 * 1024
MAX_SEQUENCE_LENGTH = 1024
GLOBAL_BATCH_SIZE = 512
MAX_STEP = 100_000
# Steps between checkpoints, and between evaluations.
SAVE_EVERY_N_STEPS = 5_000

_SCHEDULES: dict[str, type[BaseSchedule]] = {
    "gspmd-16B-2x16x8": GPipeSchedule,
    "gspmd-16B-2x16x8-stream": StreamSchedule,
}


def model_config(
    *,
    schedule: BaseSchedule.Config,
    dim: int = 4096,
    num_heads: int = 64,
    num_kv_heads: int = 8,
    num_layers: int = 64,
    num_stages: int = 2,
    num_microbatches: int = 16,
    vocab_size: int = VOCAB_SIZE,
) -> Model.Config:
    """Returns the model; the sizes are those of gspmd-16B.

    Args:
        schedule: Where micro-batches wait.
        dim: The model's width.
        num_heads: Query heads.
        num_kv_heads: Key heads, and value heads, which groups of query heads share.
        num_layers: Layers of all stages.
        num_stages: Stages.
        num_microbatches: Micro-batches of a batch.
        vocab_size: Rows of the embedding.
    """
    norm = common.rms_norm_config(eps=1e-8)
    layer = common.layer_config(
        attention=common.attention_config(num_heads=num_heads, num_kv_heads=num_kv_heads, rope_theta=5e5),
        feed_forward_dim=common.scaled_hidden_dim(scale=4, round_up_to_multiples_of=256),
        norm=norm,
    )
    layer.feed_forward.set(activation="nn.relu")
    stack = PipelinedTransformerLayer.default_config().set(
        num_layers=num_layers, num_stages=num_stages, num_microbatches=num_microbatches, layer=layer
    )
    stack.layer.remat_spec = build_remat_spec(stack)
    stack.pipeline.schedule = schedule
    cfg = common.model_config(
        vocab_size=vocab_size, dim=dim, num_layers=num_layers, layer=layer, norm=norm, remat=False
    )
    cfg.decoder.transformer = stack
    # Outside of the stages, all devices of the pipeline share the work on the vocabulary's rows.
    emb: Any = cfg.decoder.emb
    emb.token_emb.set(param_partition_spec=("pipeline", "model"))
    return cfg


def learner_config() -> Learner.Config:
    """Returns Adafactor with momentum, as for T5 (https://arxiv.org/abs/1804.04235)."""
    return Learner.default_config().set(
        optimizer=config_for_function(adafactor_optimizer).set(
            learning_rate=config_for_function(adafactor).set(scale=1e-3),
            b1=0.9,
            b2=config_for_function(adafactor_decay_rate),
            multiply_by_parameter_scale=False,
            clipping_threshold=5,
            dtype_momentum=jnp.float32,
            weight_decay=1e-3,
            weight_decay_scale_by_learning_rate_exponent=1,
        )
    )


def trainer_config(*, schedule: type[BaseSchedule] = GPipeSchedule) -> SpmdTrainer.Config:
    """Returns the recipe without its data.

    Args:
        schedule: Where micro-batches wait.
    """
    cfg = common.trainer_config(
        model=model_config(schedule=schedule.default_config()),
        learner=learner_config(),
        max_step=MAX_STEP,
        save_every_n_steps=SAVE_EVERY_N_STEPS,
        mesh_shape=common.mesh_shape_from_axes(),
        train_dtype=jnp.bfloat16,
    )
    cfg.mesh_shape = HybridMeshShape(
        ici_mesh_shape=common.mesh_shape_from_axes(data=-1, model=8),
        dcn_mesh_shape=common.mesh_shape_from_axes(pipeline=2, data=-1),
    )
    return cfg


def trainer_configs() -> dict[str, Callable[[], SpmdTrainer.Config]]:
    """Returns the recipes without their data, by name."""
    return {
        name: functools.partial(trainer_config, schedule=schedule) for name, schedule in _SCHEDULES.items()
    }
