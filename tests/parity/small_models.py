"""Small models on uneven rows, for runs on many layouts of the same devices."""

import jax
import jax.numpy as jnp
import numpy as np

from axlearn.common.config import InstantiableConfig, config_for_function
from axlearn.common.input_base import partition_by_path_rank
from axlearn.common.input_fake import FakeLmInput
from axlearn.common.learner import Learner
from axlearn.common.module import nowrap
from axlearn.common.pipeline import GPipeSchedule, StreamSchedule
from axlearn.common.trainer import SpmdTrainer
from axlearn.common.trainer_config_modifier import GradientAccumulationModifier
from axlearn.common.utils import HybridMeshShape, MeshShape
from axlearn.experiments.text.gpt import common, gspmd

NUM_STEPS = 10
SCHEDULES = {"gpipe": GPipeSchedule, "stream": StreamSchedule}


class UnevenInput(FakeLmInput):
    """Made-up ids, with labels of different length in each row: rows 0 and 5 have none."""

    @nowrap
    def batches(self):
        cfg = self.config
        lens = 1 + np.arange(cfg.global_batch_size) * 3 % cfg.source_length
        lens[[0, 5]] = 0
        is_live = np.arange(cfg.source_length) < lens[:, None]
        for batch in super().batches():
            labels = np.where(is_live, batch["target_labels"], -1).astype(np.int32)
            yield {**batch, "target_labels": labels, "target_num_bytes": lens.astype(np.int32)}


class PackedInput(UnevenInput):
    """Rows of two documents, whose lengths differ from row to row."""

    @nowrap
    def batches(self):
        cfg = self.config
        starts = 1 + np.arange(cfg.global_batch_size)[:, None] * 5 % (cfg.source_length - 1)
        indices = np.arange(cfg.source_length)
        is_second = indices >= starts
        segment_ids = (1 + is_second).astype(np.int32)
        positions = np.where(is_second, indices - starts, indices).astype(np.int32)
        for batch in super().batches():
            yield {**batch, "input_segment_ids": segment_ids, "input_positions": positions}


def input_partitioner() -> InstantiableConfig:
    """Rows over the axes of a batch, positions over "seq"."""
    return config_for_function(partition_by_path_rank).set(
        path_rank_to_partition={
            (None, 1): jax.P(common.BATCH_AXIS_NAMES),
            (None, 2): jax.P(common.BATCH_AXIS_NAMES, "seq"),
        }
    )


def quick_learner() -> Learner.Config:
    """Adam, whose rate is at its peak after one step; of Adam the first step shows the gradient."""
    return common.learner_config(peak_lr=3e-3, max_step=100, warmup_steps=1, weight_decay=1e-4)


def accumulate(cfg: SpmdTrainer.Config, grad_acc_steps: int) -> SpmdTrainer.Config:
    """Takes each batch in so many parts."""
    if grad_acc_steps == 1:
        return cfg
    return GradientAccumulationModifier.default_config().set(grad_acc_steps=grad_acc_steps).instantiate()(cfg)


def small_gspmd(
    input_cfg: FakeLmInput.Config,
    *,
    mesh_shape: MeshShape | HybridMeshShape,
    num_stages: int,
    num_microbatches: int,
    schedule: str,
    grad_acc_steps: int,
) -> SpmdTrainer.Config:
    """gspmd's recipe with one small layer for each stage, in float32.

    Args:
        input_cfg: Batches without a vocabulary and a partitioner, which are set here.
        mesh_shape: Sizes of `common.MESH_AXIS_NAMES`.
        num_stages: The number of stages.
        num_microbatches: How many micro-batches pass the pipeline in each part of a batch.
        schedule: One of SCHEDULES.
        grad_acc_steps: The number of parts of a batch.
    """
    cfg = gspmd.trainer_config()
    cfg.model = gspmd.model_config(
        schedule=SCHEDULES[schedule].default_config(),
        dim=32,
        num_heads=4,
        num_kv_heads=2,
        num_layers=num_stages,
        num_stages=num_stages,
        num_microbatches=num_microbatches,
        vocab_size=64,
    )
    cfg.learner = quick_learner()
    cfg.input = input_cfg.set(vocab_size=cfg.model.decoder.vocab_size, input_partitioner=input_partitioner())
    cfg.set(dir="unused", evalers={}, mesh_shape=mesh_shape, train_dtype=jnp.float32)
    return accumulate(cfg, grad_acc_steps)
