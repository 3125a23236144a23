"""Fuji: decoder-only models of the Llama family, as tables of facts and a few functions that put them together.

To add a size, a version or a kind of machine, add a row; `docs/recipes.md` says what each column means.

Sources of the facts: Llama (https://arxiv.org/abs/2302.13971, table 2) for version 1, Llama 2
(https://arxiv.org/abs/2307.09288, table 1 and section 2.2) for version 2, Llama 3 (https://arxiv.org/abs/2407.21783,
table 3) for version 3, the model cards of Llama 3.2 for its sizes 1B and 3B. Learning rates, batches and mesh rules are
AXLearn's, and so are the vocabularies of versions 1 to 3, rounded up to a power of two.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Optional, Union

import jax
import jax.numpy as jnp

from axlearn.common.attention import RematRegexSavePatterns
from axlearn.common.base_layer import RematSpec
from axlearn.common.causal_lm import Model
from axlearn.common.config import InstantiableConfig, config_for_function
from axlearn.common.flash_attention import remat as flash_remat
from axlearn.common.flash_attention.layer import FlashBlockSizeModifier
from axlearn.common.trainer import SpmdTrainer
from axlearn.common.utils import (
    MeshShape,
    combine_remat_policies,
    offload_dots_saveable,
    save_and_offload_only_these_names_regex,
)
from axlearn.common.vocabulary import Vocabulary
from axlearn.experiments.text.common import vocab
from axlearn.experiments.text.gpt import common
from axlearn.experiments.text.gpt.common import MeshRule, accumulate, keep, save_names
from axlearn.experiments.text.gpt.common import mesh_shape_from_axes as mesh
from axlearn.experiments.text.gpt.vocabulary_fuji_v3 import FujiV3Vocabulary
from axlearn.experiments.trainer_config_utils import V6eFlashConfigModifier

MI = 2**20
TI = 2**40


@dataclasses.dataclass(frozen=True, kw_only=True)
class VersionFacts:
    """What depends on the version alone: a tokenizer, and the training that goes with it."""

    tokenizer: InstantiableConfig[Vocabulary]
    vocab_size: int
    pad_token_id: int = 0
    eos_token_id: int = 1
    max_sequence_length: int
    tokens_per_batch: int
    total_tokens: float
    rope_theta: float


def _bpe(name: str) -> InstantiableConfig[Vocabulary]:
    return config_for_function(vocab).set(sentencepiece_model_name=name)


VERSIONS: Mapping[str, VersionFacts] = {
    "v1": VersionFacts(
        tokenizer=_bpe("bpe_32k_c4.model"),
        vocab_size=32 * 1024,
        max_sequence_length=2048,
        tokens_per_batch=4 * MI,
        total_tokens=1 * TI,
        rope_theta=1e4,
    ),
    "v2": VersionFacts(
        tokenizer=_bpe("bpe_32k_c4.model"),
        vocab_size=32 * 1024,
        max_sequence_length=4096,
        tokens_per_batch=4 * MI,
        total_tokens=2 * TI,
        rope_theta=1e4,
    ),
    "v3": VersionFacts(
        tokenizer=_bpe("bpe_128k_c4.model"),
        vocab_size=128 * 1024,
        max_sequence_length=8192,
        tokens_per_batch=16 * MI,
        total_tokens=15 * TI,
        rope_theta=5e5,
    ),
    "v3-tiktoken": VersionFacts(
        tokenizer=FujiV3Vocabulary.default_config().set(filename="Llama-3-tokenizer.json"),
        vocab_size=128256,
        pad_token_id=128004,
        eos_token_id=128001,
        max_sequence_length=8192,
        tokens_per_batch=16 * MI,
        total_tokens=15 * TI,
        rope_theta=5e5,
    ),
}

_FSDP_WITHIN_8 = mesh(data=-1, fsdp=8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SizeFacts:
    """What depends on the size alone. The defaults are those of most sizes."""

    # The versions that have this size.
    versions: Sequence[str]
    num_layers: int
    dim: int
    num_heads: int
    # The versions in which several query heads share one of num_kv_heads key heads.
    grouped: Sequence[str] = ("v3", "v3-tiktoken")
    num_kv_heads: int = 8
    # The feed-forward's width, or the config of one that follows dim.
    ffn_dim: Union[int, InstantiableConfig[int]]
    tied_head: bool = True
    peak_lr: float = 3e-4
    weight_decay: float = 0.1
    mesh_shape: MeshShape = _FSDP_WITHIN_8
    # Whether there are variants in fp8, and variants that train on a single machine.
    fp8: bool = True
    single_host: bool = False
    # In steps.
    eval_every: int = 5000
    save_every: int = 5000
    # Where the size departs from its versions.
    total_tokens: Mapping[str, float] = dataclasses.field(default_factory=dict)
    vocab_size: Optional[int] = None
    max_sequence_length: Optional[int] = None
    batch_size: Optional[int] = None
    max_step: Optional[int] = None


def _ffn(scale: float, *, multiple: int = 256) -> InstantiableConfig[int]:
    return common.scaled_hidden_dim(scale=scale, round_up_to_multiples_of=multiple)


SIZES: Mapping[str, SizeFacts] = {
    # Small enough for a test on a CPU; its vocabulary has 32 ids whatever the version's tokenizer.
    "test": SizeFacts(
        versions=tuple(VERSIONS),
        num_layers=4,
        dim=8,
        num_heads=4,
        grouped=tuple(VERSIONS),
        num_kv_heads=2,
        ffn_dim=_ffn(8 / 3, multiple=16),
        peak_lr=6e-4,
        weight_decay=0.01,
        mesh_shape=mesh(data=-1),
        fp8=False,
        eval_every=1500,
        save_every=500,
        vocab_size=32,
        max_sequence_length=64,
        batch_size=32,
        max_step=3000,
    ),
    "1B": SizeFacts(
        versions=("v3", "v3-tiktoken"), num_layers=16, dim=2048, num_heads=32, ffn_dim=8192, single_host=True
    ),
    "3B": SizeFacts(
        versions=("v3", "v3-tiktoken"), num_layers=28, dim=3072, num_heads=24, ffn_dim=8192, single_host=True
    ),
    "7B": SizeFacts(
        versions=("v1", "v2", "v3"),
        num_layers=32,
        dim=4096,
        num_heads=32,
        ffn_dim=_ffn(8 / 3),
        single_host=True,
    ),
    "8B": SizeFacts(
        versions=("v3-tiktoken",),
        num_layers=32,
        dim=4096,
        num_heads=32,
        ffn_dim=_ffn(3.5),
        tied_head=False,
        single_host=True,
    ),
    "70B": SizeFacts(
        versions=tuple(VERSIONS),
        num_layers=80,
        dim=8192,
        num_heads=64,
        grouped=("v2", "v3", "v3-tiktoken"),
        ffn_dim=_ffn(3.5),
        tied_head=False,
        peak_lr=1.5e-4,
        mesh_shape=mesh(fsdp=-1),
        total_tokens={"v1": 1.4 * TI},
    ),
    "405B": SizeFacts(
        versions=("v3", "v3-tiktoken"),
        num_layers=126,
        dim=16384,
        num_heads=128,
        ffn_dim=53248,
        tied_head=False,
        peak_lr=1.5e-4,
        mesh_shape=mesh(fsdp=-1),
    ),
}


def offload_dots_saveable_policy(prim: Any, *args: Any, **params: Any) -> Any:
    """A remat policy: the results of matrix products wait on the host for the backward pass."""
    return _offload_dots(prim, *args, **params)


def offload_attention_proj_policy(prim: Any, *args: Any, **params: Any) -> Any:
    """A remat policy: attention's projections and context wait on the host for the backward pass."""
    return _offload_attention(prim, *args, **params)


_offload_dots = offload_dots_saveable(offload_src="device", offload_dst="pinned_host")
_offload_attention = save_and_offload_only_these_names_regex(
    names_which_can_be_saved=None, names_which_can_be_offloaded=RematRegexSavePatterns.NATIVE_ATTENTION.value
)


_SAVE_NOTHING = keep(save_names(None))
_SAVE_DOTS = keep(jax.checkpoint_policies.dots_saveable)
_SAVE_FLASH_AND_DOTS = keep(
    config_for_function(combine_remat_policies).set(
        policy_1=flash_remat.policy, policy_2=jax.checkpoint_policies.dots_saveable
    )
)
_SAVE_70B_V5P = keep(save_names(".*flash_residuals|.*[kqv]_proj|.*o_proj|.*linear1_0"))
# On Trainium layers are not scanned.
_SAVE_70B_TRN2 = RematSpec(
    prevent_cse=True, policy=save_names(".*[kqv]_proj|.*linear1_[01]", offload_src=None, offload_dst=None)
)
_OFFLOAD_DOTS = keep(offload_dots_saveable_policy)
_OFFLOAD_ATTENTION = keep(offload_attention_proj_policy)

_V6E_FLASH = V6eFlashConfigModifier.default_config().set(tpu_block_size=1024)
_A4_FLASH = FlashBlockSizeModifier.default_config().set(gpu_block_size=64)

_P5 = "p5.48xlarge|p4de.24xlarge"
_A3 = "a3-highgpu-8g|a3-megagpu-8g|a3-ultragpu-8g"
_A4 = "a4-highgpu-8g"
_TRN2 = "neuron-(trn2|trn2n).48xlarge-64"
_TRN2_MESH = mesh(fsdp=-1, model=4)

_V4_AND_V5E = (
    MeshRule("tpu-v4-(1024|2048)", mesh(data=-1, fsdp=16)),
    MeshRule("tpu-v5litepod-256", mesh(data=-1, fsdp=256), _OFFLOAD_DOTS, [accumulate(4)]),
    MeshRule("tpu-v5litepod-256-2", mesh(data=-1, fsdp=256), _OFFLOAD_DOTS),
    MeshRule("tpu-v5litepod-256-4", mesh(data=-1, fsdp=256), _SAVE_DOTS),
)

# By size: what changes on which machines. The first row that matches all of a --mesh_selector counts.
MESH_RULES: Mapping[str, Sequence[MeshRule]] = {
    "1B": (MeshRule(_TRN2, _TRN2_MESH, trainium=True),),
    "3B": (MeshRule(_TRN2, _TRN2_MESH, modifiers=[accumulate(4)], trainium=True),),
    "7B": (
        *_V4_AND_V5E,
        MeshRule("tpu-v6e-256-(2|4|8)", mesh(data=-1, fsdp=256), _OFFLOAD_ATTENTION, [_V6E_FLASH]),
        MeshRule("tpu-v5p-.*", mesh(data=-1, fsdp=64), _SAVE_FLASH_AND_DOTS),
        MeshRule(f"gpu-({_P5})-(256|512|1024)", mesh(data=-1, fsdp=8)),
        MeshRule(f"gpu-({_A3})-(256|512|1024)", mesh(data=-1, fsdp=8), fp8=True),
        MeshRule(f"gpu-({_A4})-(256|512|1024)", mesh(data=-1, fsdp=8), modifiers=[_A4_FLASH], fp8=True),
        MeshRule(_TRN2, _TRN2_MESH, trainium=True),
    ),
    "8B": (
        *_V4_AND_V5E,
        MeshRule("tpu-v5p-.*", mesh(data=-1, fsdp=8)),
        MeshRule(f"gpu-({_P5}|{_A3}|{_A4})-(256|512|1024)", mesh(data=-1, fsdp=8)),
        MeshRule(_TRN2, _TRN2_MESH, trainium=True),
    ),
    "70B": (
        MeshRule("tpu-v5litepod-256-4", mesh(data=-1, fsdp=256), _OFFLOAD_DOTS),
        MeshRule("tpu-v5p-.*", mesh(fsdp=-1), _SAVE_70B_V5P),
        MeshRule("tpu-v6e-256-(4|8)", mesh(data=-1, fsdp=256), _OFFLOAD_ATTENTION, [_V6E_FLASH]),
        MeshRule("tpu-v6e-256", mesh(data=-1, fsdp=256), _OFFLOAD_ATTENTION, [_V6E_FLASH, accumulate(4)]),
        MeshRule(f"gpu-({_P5})-(512|1024)", mesh(data=-1, fsdp=128)),
        MeshRule(f"gpu-({_A3})-(256|512|1024)", mesh(data=-1, fsdp=64), fp8=True),
        MeshRule(f"gpu-({_A4})-(256|512|1024)", mesh(data=-1, fsdp=16), modifiers=[_A4_FLASH], fp8=True),
        MeshRule(_TRN2, _TRN2_MESH, _SAVE_70B_TRN2, trainium=True),
    ),
    "405B": (MeshRule("tpu-v5p-.*", mesh(fsdp=-1), _SAVE_NOTHING),),
}

# An accident of AXLearn's history, kept because dumps are: these share key heads and yet keep the fused
# projection on Trainium.
_FUSED_ON_TRN2 = {("1B", "v3-tiktoken"), ("3B", "v3-tiktoken"), ("8B", "v3-tiktoken")}

# A whole batch is for so many machines; a single one trains on its share.
_NUM_HOSTS = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """One member of the family, and the facts that follow from which one it is."""

    size: str
    version: str
    # Whether attention runs in a fused kernel.
    flash: bool = False
    # Whether matrix products are in fp8 on the machines whose mesh rules say so.
    fp8: bool = False
    # Whether the batch is what one machine trains on.
    single_host: bool = False

    @property
    def name(self) -> str:
        """The recipe's name, such as "fuji-7B-v1-flash-fp8-single-host"."""
        suffixes = {"-flash": self.flash, "-fp8": self.fp8, "-single-host": self.single_host}
        suffix = "".join(name for name, is_on in suffixes.items() if is_on)
        return f"fuji-{self.size}-{self.version}{suffix}"

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return SIZES[self.size].vocab_size or VERSIONS[self.version].vocab_size

    @property
    def max_sequence_length(self) -> int:
        """Tokens in a row of a batch."""
        return SIZES[self.size].max_sequence_length or VERSIONS[self.version].max_sequence_length

    @property
    def batch_size(self) -> int:
        """Rows in a batch."""
        num_rows = VERSIONS[self.version].tokens_per_batch // self.max_sequence_length
        whole = SIZES[self.size].batch_size or num_rows
        return whole // _NUM_HOSTS if self.single_host else whole

    @property
    def max_step(self) -> int:
        """Steps of a whole training run: of whole batches, also where the batch is that of a single machine."""
        of_size, of_version = SIZES[self.size], VERSIONS[self.version]
        total_tokens = of_size.total_tokens.get(self.version, of_version.total_tokens)
        return of_size.max_step or int(total_tokens // of_version.tokens_per_batch)

    @property
    def num_kv_heads(self) -> Optional[int]:
        """Key heads that query heads share; None: each query head has its own."""
        facts = SIZES[self.size]
        return facts.num_kv_heads if self.version in facts.grouped else None


def variants() -> Iterator[Variant]:
    """Yields all members of the family."""
    flags = (False, True)
    for version, (size, facts) in itertools.product(VERSIONS, SIZES.items()):
        if version in facts.versions:
            for flash, fp8, single_host in itertools.product(
                flags, flags[: 1 + facts.fp8], flags[: 1 + facts.single_host]
            ):
                yield Variant(size=size, version=version, flash=flash, fp8=fp8, single_host=single_host)


def trainer_config(variant: Variant) -> SpmdTrainer.Config:
    """Returns all of a recipe that does not depend on the data: `input`, `evalers` and `dir` are still to be set."""
    facts = SIZES[variant.size]
    cfg = common.trainer_config(
        model=_model_config(variant),
        learner=common.learner_config(
            peak_lr=facts.peak_lr, max_step=variant.max_step, weight_decay=facts.weight_decay
        ),
        max_step=variant.max_step,
        save_every_n_steps=facts.save_every,
        mesh_shape=facts.mesh_shape,
        train_dtype=jnp.bfloat16,
        keep_every_n_steps=min(50_000, variant.max_step),
    )
    return cfg.set(mesh_rules=_mesh_rules(variant) or None)


def _model_config(variant: Variant) -> Model.Config:
    of_size, of_version = SIZES[variant.size], VERSIONS[variant.version]
    norm = common.rms_norm_config()
    attention = common.attention_config(
        num_heads=of_size.num_heads,
        num_kv_heads=variant.num_kv_heads,
        rope_theta=of_version.rope_theta,
        attention=common.flash_attention_config() if variant.flash else None,
    )
    return common.model_config(
        vocab_size=variant.vocab_size,
        dim=of_size.dim,
        num_layers=of_size.num_layers,
        layer=common.layer_config(attention=attention, feed_forward_dim=of_size.ffn_dim, norm=norm),
        norm=norm,
        pad_token_id=of_version.pad_token_id,
        eos_token_id=of_version.eos_token_id,
        tied_head=of_size.tied_head,
    )


def _mesh_rules(variant: Variant) -> list[tuple[str, Any]]:
    is_fused = variant.num_kv_heads is None or (variant.size, variant.version) in _FUSED_ON_TRN2
    layout = common.trainium_layout(grouped_qkv=not is_fused, lm_head=not SIZES[variant.size].tied_head)
    return [
        common.mesh_rule_config(rule, trainium_layout=layout, fp8=variant.fp8)
        for rule in MESH_RULES.get(variant.size, ())
    ]
