"""Grouped-query attention by fused kernels, and the modifier of their block sizes."""

import functools
from typing import Any, Optional

import jax
from absl import logging
from jax.sharding import PartitionSpec

from axlearn.common.attention import GroupedQueryAttention, MultiheadAttention
from axlearn.common.attention_bias import BaseAttentionBias
from axlearn.common.attention_kernels import (
    SPLASH_BLOCK_FIELDS,
    AttentionArrays,
    AttentionChoice,
    AttentionTask,
    choose_kernel,
    describe_attention_choice,
)
from axlearn.common.base_layer import BaseLayer
from axlearn.common.config import (
    ConfigBase,
    ConfigModifier,
    InstantiableConfig,
    config_class,
    error_message,
    nearest_names,
)
from axlearn.common.flash_attention._biases import sort_bias, with_both_segment_ids
from axlearn.common.flash_attention._placement import (
    Placement,
    axes_of,
    find_placement,
    num_devices_here,
    num_kv_repeats,
    num_shards,
    platform_here,
    run_placed,
)
from axlearn.common.flash_attention.remat import FLASH_RESIDUALS
from axlearn.common.utils import maybe_shard

# Lanes of a TPU's vector registers: blocks of its kernels are a multiple of it.
_TPU_BLOCK_UNIT = 128
# The smallest side of a matrix product in Triton.
_MIN_GPU_BLOCK = 16
# The size of `jax.experimental.pallas.ops.gpu.attention` by default.
_DEFAULT_GPU_BLOCK = 128

# What partition specs may be for: queries and contexts, keys and values, logits and their biases.
_DIMS = ("btnh", "bsnh", "bnts")
# The prefix of fields of splash attention's BlockSizes among the overrides.
_SPLASH = "splash_"
_IMPLEMENTATION = "implementation"


class FlashAttention(GroupedQueryAttention):
    """Grouped-query attention that never has the logits as an array, where a kernel can do that.

    It computes what `GroupedQueryAttention` does. Which kernel of the platform does it is decided while tracing, by
    `attention_kernels.choose_kernel`: the first that honours everything that is asked for, masks, segments, windows,
    caps, sinks and biases. Where none does, among them on CPU and for incremental decoding, the maths of
    `GroupedQueryAttention` does. The log says which and why, once.

    On a mesh of several devices a kernel runs on each of them, on the part that `mha_dim_to_partition_spec` gives it.
    """

    @config_class
    class Config(GroupedQueryAttention.Config):
        """Configures `FlashAttention`."""

        # Number of queries, and of keys, that a TPU kernel holds at a time at most: a multiple of 128. Less is taken
        # where it does not divide the length of the sequence.
        tpu_block_size: int = 512
        # The same for Pallas kernels on GPU: a power of 2, at least 16. None: 128.
        gpu_block_size: Optional[int] = None
        # What to take instead of what is chosen: at "implementation" the name of a kernel or "xla"; at "splash_" plus
        # the name of a field of splash attention's BlockSizes its value. None: nothing.
        backend_overrides: Optional[dict[str, Any]] = None
        # Factor of the logits. None: 1; `query_scale` and `key_scale` scale queries and keys.
        softmax_scale: Optional[float] = None
        # How queries ("btnh"), keys and values ("bsnh") and logit biases ("bnts") lie on the mesh while attention
        # runs. The batch and the heads of keys lie as those of the queries, and biases as queries and keys do, where
        # specs differ. Empty: unknown, which leaves a mesh of several devices to XLA.
        mha_dim_to_partition_spec: dict[str, PartitionSpec] = {}
        # How the contexts ("btnh") lie on the mesh after it.
        output_dim_to_partition_spec: dict[str, PartitionSpec] = {}

    def __init__(self, cfg: Config, *, parent: Optional[BaseLayer]):
        super().__init__(cfg, parent=parent)
        _check_block_sizes(cfg, where=self.path())
        for name in ("mha_dim_to_partition_spec", "output_dim_to_partition_spec"):
            _check_keys(getattr(cfg, name), legal=_DIMS, where=f"{self.path()}.{name}")
        overrides = cfg.backend_overrides or {}
        legal = (_IMPLEMENTATION, *(_SPLASH + name for name in SPLASH_BLOCK_FIELDS))
        _check_keys(overrides, legal=legal, where=f"{self.path()}.backend_overrides")

    def _compute_attention(
        self, *, query: jax.Array, key: jax.Array, value: jax.Array, bias: BaseAttentionBias, need_probs: bool
    ) -> tuple[jax.Array, Optional[jax.Array]]:
        cfg: FlashAttention.Config = self.config
        if cfg.softmax_scale is not None:
            query = query * cfg.softmax_scale
        specs = cfg.mha_dim_to_partition_spec
        placement = find_placement(specs, query_shape=query.shape, key_shape=key.shape)
        choice = self._choose(query, key, bias=bias, placement=placement, need_probs=need_probs)
        _log_once(self.path(), describe_attention_choice(choice))
        if choice.kernel is not None:
            arrays = self._arrays(query, key, value, bias=bias)
            attend = functools.partial(choice.kernel.attend, choice.task)
            context, probs = run_placed(attend, arrays, placement=placement), None
        else:
            context, probs = super()._compute_attention(
                query=maybe_shard(query, specs.get("btnh")),
                key=maybe_shard(key, specs.get("bsnh")),
                value=maybe_shard(value, specs.get("bsnh")),
                bias=bias,
                need_probs=need_probs,
            )
            # Kernels name what their backward passes need. This one needs no context, but who asks for that to be
            # saved wants as much as possible not to be computed again.
            context = self._remat_name(context, FLASH_RESIDUALS)
        return maybe_shard(context, cfg.output_dim_to_partition_spec.get("btnh")), probs

    def _choose(
        self,
        query: jax.Array,
        key: jax.Array,
        *,
        bias: BaseAttentionBias,
        placement: Placement,
        need_probs: bool,
    ) -> AttentionChoice:
        """Which kernel computes this, as an AttentionTask of what is on one device."""
        cfg: FlashAttention.Config = self.config
        overrides = dict(cfg.backend_overrides or {})
        name = overrides.pop(_IMPLEMENTATION, None)
        sorted_bias = sort_bias(bias)
        head_shards = num_shards(placement.heads)
        num_kv_heads = self.num_kv_heads * num_kv_repeats(
            num_heads=cfg.num_heads, num_kv_heads=self.num_kv_heads, num_head_shards=head_shards
        )
        task = AttentionTask(
            platform=platform_here(),
            dtype=query.dtype,
            target_len=query.shape[1] // num_shards(placement.target),
            source_len=key.shape[1] // num_shards(placement.source),
            num_heads=cfg.num_heads // head_shards,
            num_kv_heads=num_kv_heads // head_shards,
            per_head_dim=self.per_head_dim,
            num_target_shards=num_shards(placement.target),
            num_source_shards=num_shards(placement.source),
            target_axes=axes_of(placement.target),
            source_axes=axes_of(placement.source),
            num_chunks=sorted_bias.num_chunks,
            is_placed=num_devices_here() == 1 or "btnh" in cfg.mha_dim_to_partition_spec,
            window=sorted_bias.window,
            mask_fns=sorted_bias.mask_fns,
            has_segment_ids=sorted_bias.segments is not None,
            is_self_segmented=sorted_bias.is_self_segmented,
            explicit=sorted_bias.explicit,
            logit_cap=cfg.atten_logit_cap,
            has_sink=bool(cfg.logit_sink),
            dropout_rate=(self.dropout.config.rate or 0.0) if self.is_training else 0.0,
            need_probs=need_probs,
            tpu_block_size=cfg.tpu_block_size,
            gpu_block_size=cfg.gpu_block_size or _DEFAULT_GPU_BLOCK,
            splash_blocks=tuple(
                (name.removeprefix(_SPLASH), size) for name, size in sorted(overrides.items())
            ),
            residual_name=f"{type(self).__name__}.{FLASH_RESIDUALS}",
        )
        return choose_kernel(task, name=name, where=f"{self.path()}.backend_overrides")

    def _arrays(
        self, query: jax.Array, key: jax.Array, value: jax.Array, *, bias: BaseAttentionBias
    ) -> AttentionArrays:
        segments = sort_bias(bias).segments
        return AttentionArrays(
            query=query,
            key=key,
            value=value,
            bias=with_both_segment_ids(bias),
            target_segment_ids=None if segments is None else segments.segment_ids,
            source_segment_ids=None if segments is None else segments.source_segment_ids,
            sink=self.parameters["sink"] if self.config.logit_sink else None,
        )


def _check_block_sizes(cfg: FlashAttention.Config, *, where: str) -> None:
    size = cfg.tpu_block_size
    if size < _TPU_BLOCK_UNIT or size % _TPU_BLOCK_UNIT:
        what, expected = f"tpu_block_size={size}", f"a multiple of {_TPU_BLOCK_UNIT}"
        raise ValueError(error_message(where=where, what=what, expected=expected))
    size = _DEFAULT_GPU_BLOCK if cfg.gpu_block_size is None else cfg.gpu_block_size
    if size < _MIN_GPU_BLOCK or size & (size - 1):
        what, expected = f"gpu_block_size={size}", f"a power of 2, at least {_MIN_GPU_BLOCK}, or None"
        raise ValueError(error_message(where=where, what=what, expected=expected))


def _check_keys(found: dict[str, Any], *, legal: tuple[str, ...], where: str) -> None:
    for name in found:
        if name not in legal:
            raise ValueError(
                error_message(
                    where=where,
                    what=f"unknown key {name!r}",
                    expected=f"one of {', '.join(legal)}",
                    nearest=nearest_names(name, legal),
                )
            )


@functools.lru_cache(maxsize=1024)
def _log_once(path: str, text: str) -> None:
    logging.info("%s: %s", path, text)


class FlashBlockSizeModifier(ConfigModifier):
    """Sets the block sizes of every `FlashAttention` of a config.

    Recipes with and without flash attention share their mesh rules, and a block size changes no result. So a config
    whose attention layers are of another kind stays as it is, with a warning; one without any attention is an error.
    """

    @config_class
    class Config(ConfigModifier.Config):
        """Configures `FlashBlockSizeModifier`."""

        # As in `FlashAttention.Config`.
        tpu_block_size: int = 512
        gpu_block_size: Optional[int] = None

    def __call__(self, cfg: InstantiableConfig) -> InstantiableConfig:
        """Sets `tpu_block_size` and `gpu_block_size`.

        Args:
            cfg: A trainer's config, or any with attention layers below it; changed in place.

        Returns:
            `cfg`.

        Raises:
            ValueError: If there is no attention layer.
        """
        name = type(self).__name__
        layers = attention_configs(cfg)
        if not layers:
            owner: Any = cfg
            raise ValueError(
                error_message(
                    where=name,
                    what=f"no attention layer in the config of {owner.klass.__qualname__}",
                    expected="a config with a FlashAttention.Config below it",
                    advice="Drop the modifier",
                )
            )
        flash_layers = [layer for layer in layers if isinstance(layer, FlashAttention.Config)]
        for layer in flash_layers:
            layer.set(tpu_block_size=self.config.tpu_block_size, gpu_block_size=self.config.gpu_block_size)
        if not flash_layers:
            logging.warning(
                "%s: no attention layer of this config is a FlashAttention: nothing to set.", name
            )
        return cfg


def attention_configs(cfg: ConfigBase) -> list[MultiheadAttention.Config]:
    """Returns the configs of all attention layers at or below `cfg`, except those that its mesh rules may put there."""
    found: list[MultiheadAttention.Config] = []

    def enter_fn(path: str, value: Any, default_items: Any) -> Any:
        if path == "mesh_rules":
            return []
        if isinstance(value, MultiheadAttention.Config):
            found.append(value)
        return default_items

    cfg.visit(visit_fn=lambda path, value: None, enter_fn=enter_fn)
    return found
