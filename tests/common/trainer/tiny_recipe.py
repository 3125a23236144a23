"""The smallest recipe that exercises a whole trainer: a table of pairs as its model, made-up ids as data."""

import functools
import math
import os
from collections.abc import Iterator
from typing import Any, Optional

import jax
import jax.numpy as jnp

from axlearn.common import input_fake
from axlearn.common.base_layer import BaseLayer, ParameterSpec
from axlearn.common.checkpointer import Checkpointer, every_n_steps_and_last_policy
from axlearn.common.config import REQUIRED, Required, config_class, config_for_function
from axlearn.common.evaler import SpmdEvaler, every_n_steps_policy
from axlearn.common.flops import FlopsPerToken
from axlearn.common.input_base import Batch, DataIterator
from axlearn.common.input_fake import FakeLmInput
from axlearn.common.learner import Learner
from axlearn.common.loss import cross_entropy
from axlearn.common.metrics import WeightedSummary
from axlearn.common.module import nowrap
from axlearn.common.optimizers import adamw_optimizer
from axlearn.common.summary_writer import SummaryWriter
from axlearn.common.trainer import SpmdTrainer

VOCAB_SIZE = 16


class BigramModel(BaseLayer):
    """Logits of the next id from a table of pairs, with noise on them while training."""

    # How often Python has run `forward`: once per program that is traced.
    num_traces = 0

    @config_class
    class Config(BaseLayer.Config):
        vocab_size: Required[int] = REQUIRED
        # What the loss of a marked batch is multiplied by; see `BadBatchInput`.
        bad_factor: float = math.nan

    def _create_layer_parameter_specs(self) -> dict[str, ParameterSpec]:
        cfg = self.config
        return {
            "weight": ParameterSpec(shape=(cfg.vocab_size, cfg.vocab_size), mesh_axes=(None, "model")),
            "bias": ParameterSpec(shape=(cfg.vocab_size,), mesh_axes=("model",)),
        }

    def forward(self, input_batch: dict[str, Any]) -> tuple[jax.Array, dict[str, Any]]:
        type(self).num_traces += 1
        logits = self.parameters["weight"][input_batch["input_ids"]] + self.parameters["bias"][None, None]
        if self.is_training:
            logits = logits + 0.1 * jax.random.normal(self.prng_key, logits.shape, logits.dtype)
        loss, _ = cross_entropy(logits, input_batch["target_labels"])
        loss = loss * jnp.where(input_batch["target_num_bytes"][0] < 0, self.config.bad_factor, 1.0)
        num_targets = jnp.sum(input_batch["target_labels"] >= 0).astype(jnp.float32)
        self.add_summary("cross_entropy_loss", WeightedSummary(loss, num_targets))
        return loss, {}

    @nowrap
    def check_host_batch(self, batch: Batch) -> None:
        largest = int(batch["input_ids"].max())
        if largest >= self.config.vocab_size:
            raise ValueError(
                f"input_ids: id {largest} is outside the vocabulary of {self.config.vocab_size}."
            )

    @nowrap
    def flops_per_token(self, seq_len: int) -> FlopsPerToken:
        return FlopsPerToken(full=600.0 + seq_len, causal=600.0 + seq_len / 2)


class BadBatchInput(FakeLmInput):
    """Made-up ids, but one batch is marked as bad: its `target_num_bytes` are negative."""

    @config_class
    class Config(FakeLmInput.Config):
        # The step whose batch is marked, counted from 1. None: none.
        bad_step: Optional[int] = None
        # The step at which reading fails, counted from 1. None: none.
        fail_step: Optional[int] = None

    @nowrap
    def batches(self) -> DataIterator:
        good = super().batches()

        def marked(first: int) -> Iterator[Batch]:
            good.set_state({**good.get_state(), "next_step": first})
            for step, batch in enumerate(good, start=first + 1):
                if step == self.config.fail_step:
                    raise OSError(f"cannot read the batch of step {step}")
                if step == self.config.bad_step:
                    batch = {**batch, "target_num_bytes": -batch["target_num_bytes"]}
                yield batch

        return DataIterator(batches_from=marked, fingerprint=good.get_state()["fingerprint"])


def trainer_config(
    *,
    dir: str = "",
    max_step: int = 8,
    save_every_n_steps: int = 4,
    eval_every_n_steps: int = 4,
    log_every_n_steps: int = 1,
    seed: int = 0,
    **model_fields: Any,
) -> SpmdTrainer.Config:
    """Returns a trainer config that runs in a second."""
    data = BadBatchInput.default_config().set(
        global_batch_size=8, source_length=12, vocab_size=VOCAB_SIZE, seed=seed
    )
    cfg = SpmdTrainer.default_config().set(
        name="tiny",
        input=data,
        model=BigramModel.default_config().set(vocab_size=VOCAB_SIZE, dtype=jnp.float32, **model_fields),
        learner=Learner.default_config().set(
            optimizer=config_for_function(adamw_optimizer).set(
                learning_rate=0.1, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.0
            )
        ),
        max_step=max_step,
        mesh_axis_names=("data", "model"),
        mesh_shape=(-1, 1),
        checkpointer=Checkpointer.default_config().set(
            save_policy=config_for_function(every_n_steps_and_last_policy).set(
                n=save_every_n_steps, max_step=max_step
            ),
            keep_last_n=3,
        ),
        evalers={
            "heldout": SpmdEvaler.default_config().set(
                input=input_fake.FakeLmInput.default_config().set(
                    global_batch_size=8, source_length=12, vocab_size=VOCAB_SIZE, total_num_batches=3, seed=1
                ),
                eval_policy=config_for_function(every_n_steps_policy).set(n=eval_every_n_steps),
            )
        },
        summary_writer=SummaryWriter.default_config().set(write_every_n_steps=100),
        log_every_n_steps=log_every_n_steps,
    )
    return cfg.set(dir=dir) if dir else cfg


def named_trainer_configs() -> dict[str, Any]:
    """Returns the recipes by name."""

    def named(data_dir: Optional[str] = None, **kwargs: Any) -> SpmdTrainer.Config:
        del data_dir
        return trainer_config(**kwargs)

    return {
        "tiny": named,
        "tiny-long": functools.partial(
            named, max_step=100_000, save_every_n_steps=50_000, log_every_n_steps=50
        ),
        "tiny-env": functools.partial(named, max_step=int(os.environ.get("TINY_MAX_STEP", "8"))),
    }
