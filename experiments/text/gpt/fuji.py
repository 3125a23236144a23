"""Fuji: decoder-only models of the Llama family, as facts in tables and one function that puts them together.

Sources of the facts: Llama (https://arxiv.org/abs/2302.13971) for version 1, Llama 2
(https://arxiv.org/abs/2307.09288) for version 2, Llama 3 (https://arxiv.org/abs/2407.21783) for version 3.
"""

import dataclasses
import enum

import jax.numpy as jnp

from axlearn.common.trainer import SpmdTrainer
from axlearn.experiments.text.gpt import common


class Version(enum.Enum):
    """A tokenizer with the training recipe that goes with it."""

    V1 = "v1"
    V2 = "v2"
    V3 = "v3"
    V3_TIKTOKEN = "v3-tiktoken"


@dataclasses.dataclass(frozen=True)
class VersionFacts:
    """What depends on the version alone."""

    rope_theta: float
    pad_token_id: int = 0
    eos_token_id: int = 1


@dataclasses.dataclass(frozen=True)
class SizeFacts:
    """What depends on the size alone."""

    num_layers: int
    dim: int
    num_heads: int
    num_kv_heads: int
    # The feed-forward's width is dim * ffn_scale, rounded up to a multiple of ffn_multiple.
    ffn_scale: float
    ffn_multiple: int
    vocab_size: int
    peak_lr: float
    weight_decay: float
    max_step: int
    save_every_n_steps: int
    mesh_shape: tuple[int, ...]


VERSIONS = {
    Version.V1: VersionFacts(rope_theta=1e4),
    Version.V2: VersionFacts(rope_theta=1e4),
    Version.V3: VersionFacts(rope_theta=5e5),
    Version.V3_TIKTOKEN: VersionFacts(rope_theta=5e5, pad_token_id=128004, eos_token_id=128001),
}

SIZES = {
    # Small enough for a test on a CPU; its vocabulary is 32 whatever the version's tokenizer.
    "test": SizeFacts(
        num_layers=4,
        dim=8,
        num_heads=4,
        num_kv_heads=2,
        ffn_scale=8 / 3,
        ffn_multiple=16,
        vocab_size=32,
        peak_lr=6e-4,
        weight_decay=0.01,
        max_step=3000,
        save_every_n_steps=500,
        mesh_shape=common.mesh_shape_from_axes(data=-1),
    ),
}


def trainer_config(*, size: str, version: Version) -> SpmdTrainer.Config:
    """Returns all of a fuji recipe that does not depend on the data: `input`, `evalers` and `dir` are still to be set.

    Args:
        size: A key of `SIZES`.
        version: A key of `VERSIONS`.
    """
    of_size, of_version = SIZES[size], VERSIONS[version]
    norm = common.rms_norm_config()
    layer = common.layer_config(
        attention=common.attention_config(
            num_heads=of_size.num_heads,
            num_kv_heads=of_size.num_kv_heads,
            rope_theta=of_version.rope_theta,
        ),
        feed_forward_dim=common.scaled_hidden_dim(
            scale=of_size.ffn_scale, round_up_to_multiples_of=of_size.ffn_multiple
        ),
        norm=norm,
    )
    return common.trainer_config(
        model=common.model_config(
            vocab_size=of_size.vocab_size,
            dim=of_size.dim,
            num_layers=of_size.num_layers,
            layer=layer,
            norm=norm,
            pad_token_id=of_version.pad_token_id,
            eos_token_id=of_version.eos_token_id,
        ),
        learner=common.learner_config(
            peak_lr=of_size.peak_lr, max_step=of_size.max_step, weight_decay=of_size.weight_decay
        ),
        max_step=of_size.max_step,
        save_every_n_steps=of_size.save_every_n_steps,
        mesh_shape=of_size.mesh_shape,
        train_dtype=jnp.bfloat16,
        keep_every_n_steps=min(50_000, of_size.max_step),
    )
