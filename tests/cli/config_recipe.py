"""Recipes whose every line is here, so that what commands say about lines does not change with the library."""

from typing import Optional

import jax.numpy as jnp

from axlearn.common.base_layer import RematSpec
from axlearn.common.checkpointer import Checkpointer, every_n_steps_and_last_policy
from axlearn.common.config import config_for_function
from axlearn.common.input_fake import FakeLmInput
from axlearn.common.learner import Learner
from axlearn.common.optimizers import adamw_optimizer
from axlearn.common.schedule import cosine_with_linear_warmup
from axlearn.common.trainer import SpmdTrainer
from axlearn.common.trainer_config_modifier import (
    ChainConfigModifier,
    GradientAccumulationModifier,
    MeshShapeModifier,
    RematSpecModifier,
)
from tests.common.trainer.tiny_recipe import BigramModel

# Of the model; a multiple of 8 and not of 3.
VOCAB_SIZE = 16


def _rule(*, model: int, remat: bool = False) -> ChainConfigModifier.Config:
    """A mesh with so many shards of the model, and two micro-batches."""
    modifiers = [
        MeshShapeModifier.default_config().set(mesh_shape=(-1, model)),
        GradientAccumulationModifier.default_config().set(grad_acc_steps=2),
        MeshShapeModifier.default_config().set(mesh_shape=(-1, 2 * model)),
    ]
    if remat:
        modifiers.append(
            RematSpecModifier.default_config().set(remat_policies={"model": RematSpec(prevent_cse=False)})
        )
    return ChainConfigModifier.default_config().set(config_modifiers=modifiers)


def _learner(max_step: int) -> Learner.Config:
    learner = Learner.default_config()
    learner.optimizer = config_for_function(adamw_optimizer).set(
        learning_rate=config_for_function(cosine_with_linear_warmup).set(
            peak_lr=1e-3, max_step=max_step, warmup_steps=2
        ),
        b1=0.9,
        b2=0.95,
        eps=1e-8,
    )
    return learner


def trainer_config(data_dir: Optional[str] = None) -> SpmdTrainer.Config:
    """Pairs of ids, 40 steps."""
    cfg = SpmdTrainer.default_config().set(name="trainer", max_step=40)
    cfg.mesh_axis_names = ("data", "model")
    cfg.mesh_shape = (-1, 1)
    cfg.model = BigramModel.default_config().set(vocab_size=VOCAB_SIZE, dtype=jnp.float32)
    cfg.input = FakeLmInput.default_config().set(
        is_training=True, global_batch_size=64, source_length=8, vocab_size=VOCAB_SIZE
    )
    cfg.learner = _learner(max_step=40)
    cfg.checkpointer = Checkpointer.default_config().set(
        save_policy=config_for_function(every_n_steps_and_last_policy).set(n=10, max_step=40)
    )
    cfg.mesh_rules = [
        ("gpu-(a3-highgpu-8g|p5.48xlarge)-(8|16)", (-1, 2)),
        ("tpu-v5litepod-.*", _rule(model=2)),
        ("tpu-v4-8", _rule(model=3, remat=True)),
        ("my-cluster", (-1, 1)),
    ]
    return cfg


def without_rules(data_dir: Optional[str] = None) -> SpmdTrainer.Config:
    cfg = trainer_config(data_dir)
    cfg.mesh_rules = None
    return cfg


def broken(data_dir: Optional[str] = None) -> SpmdTrainer.Config:
    raise ValueError("broken: there is nothing here")


def named_trainer_configs():
    return {"bigrams": trainer_config, "bigrams-without-rules": without_rules}


def trainer_config_aliases():
    return {"pairs": "bigrams"}
