"""A decoder-only language model from its facts: attention, layer, stack, embedding and head."""

import math
from typing import Optional, Union

import jax.numpy as jnp

from axlearn.common.attention import (
    FusedGroupedQKVLinear,
    FusedQKVLinear,
    GroupedQueryAttention,
    MultiheadAttention,
    RepeatedTransformerLayer,
    RoFormerQKVLinear,
    TransformerLayer,
    build_remat_spec,
    set_double_shard_weights_config,
)
from axlearn.common.causal_lm import Model
from axlearn.common.config import InstantiableConfig, config_for_function
from axlearn.common.decoder import Decoder, LmHead
from axlearn.common.embedding import TransformerTextEmbeddings
from axlearn.common.kv_cache.kv_cache import KVCache
from axlearn.common.layers import RMSNorm, set_bias_recursively, set_norm_recursively
from axlearn.common.param_init import PARAM_REGEXP_WEIGHT, DefaultInitializer, WeightInitializer
from axlearn.experiments.text.gpt.common._mesh import BATCH_AXIS_NAMES, WEIGHT_AXIS_NAMES


def scale_fn(input_dim: int, *, scale: float, round_up_to_multiples_of: int) -> int:
    """Returns `input_dim * scale`, rounded up to a multiple of `round_up_to_multiples_of`."""
    return math.ceil(input_dim * scale / round_up_to_multiples_of) * round_up_to_multiples_of


def scaled_hidden_dim(*, scale: float, round_up_to_multiples_of: int) -> InstantiableConfig[int]:
    """Returns the config of a feed-forward width that follows the model's width."""
    return config_for_function(scale_fn).set(scale=scale, round_up_to_multiples_of=round_up_to_multiples_of)


def weight_init(*, fan: str, scale: float = 1.0) -> DefaultInitializer.Config:
    """Returns an initializer that draws weights from N(0, scale / fan) and leaves norms and biases at their defaults.

    Args:
        fan: "fan_in" or "fan_out": what the variance is divided by.
        scale: The variance before the division.
    """
    return DefaultInitializer.default_config().set(
        init_by_param_name={
            PARAM_REGEXP_WEIGHT: WeightInitializer.default_config().set(
                fan=fan, distribution="normal", scale=scale
            )
        }
    )


def rms_norm_config(*, eps: float = 1e-5) -> RMSNorm.Config:
    """Returns an RMSNorm that computes in the type of its input."""
    return RMSNorm.default_config().set(eps=eps, forward_dtype=None)


def attention_config(
    *,
    num_heads: int,
    num_kv_heads: Optional[int],
    rope_theta: float,
    kv_cache_dtype: Optional[type] = jnp.bfloat16,
    attention: Optional[MultiheadAttention.Config] = None,
) -> MultiheadAttention.Config:
    """Returns causal attention with a fused projection and rotary positions.

    Args:
        num_heads: Query heads.
        num_kv_heads: Key heads, and value heads, which groups of query heads share
            (https://arxiv.org/abs/2305.13245). None: each query head has its own.
        rope_theta: The base of the rotary wave lengths.
        kv_cache_dtype: The type of cached keys and values. None: that of the activations.
        attention: The kind of attention, such as `flash_attention_config()`. None: the plain one.
    """
    if num_kv_heads is None:
        input_linear = FusedQKVLinear.default_config()
        attention = attention or MultiheadAttention.default_config()
    else:
        input_linear = FusedGroupedQKVLinear.default_config().set(num_kv_heads=num_kv_heads)
        attention = attention or GroupedQueryAttention.default_config()
    qkv_proj = RoFormerQKVLinear.default_config().set(input_linear=input_linear, rotary_value=False)
    qkv_proj.rope_pos_emb_layer.set(theta=rope_theta)
    return attention.set(
        num_heads=num_heads,
        causal=True,
        kv_cache=KVCache.default_config().set(cache_dtype=kv_cache_dtype),
        input_linear=qkv_proj,
    )


def layer_config(
    *,
    attention: MultiheadAttention.Config,
    feed_forward_dim: Union[int, InstantiableConfig[int]],
    norm: RMSNorm.Config,
) -> TransformerLayer.Config:
    """Returns a pre-norm transformer layer with a SwiGLU feed-forward (https://arxiv.org/abs/2002.05202)."""
    layer = TransformerLayer.default_config()
    layer.self_attention.set(attention=attention, structure="prenorm")
    layer.feed_forward.set(
        hidden_dim=feed_forward_dim,
        activation=("nn.silu", "linear"),
        structure="prenorm",
        residual_weight=1.0,
    )
    set_double_shard_weights_config(
        layer,
        batch_axis_names=BATCH_AXIS_NAMES,
        fsdp_axis_names=WEIGHT_AXIS_NAMES,
        tp_axis_names="model",
        seq_axis_names="seq",
    )
    set_bias_recursively(layer, bias=False)
    set_norm_recursively(layer, norm)
    return layer


def model_config(
    *,
    vocab_size: int,
    dim: int,
    num_layers: int,
    layer: TransformerLayer.Config,
    norm: RMSNorm.Config,
    pad_token_id: int = 0,
    eos_token_id: int = 1,
    remat: bool = True,
    tied_head: bool = True,
) -> Model.Config:
    """Returns a causal language model: a scanned stack of one layer between a token embedding and a head.

    Args:
        vocab_size: Rows of the embedding.
        dim: The model's width.
        num_layers: Layers in the stack.
        layer: The config of one layer.
        norm: The norm between the last layer and the head.
        pad_token_id: The id that fills a row behind its last token.
        eos_token_id: The id behind the last token of a document.
        remat: Whether the backward pass keeps of each layer only the projections and the attention's context,
            and recomputes the rest.
        tied_head: Whether the head is the transposed embedding; otherwise it has weights of its own.
    """
    stack = RepeatedTransformerLayer.default_config().set(num_layers=num_layers, layer=layer)
    if remat:
        stack.layer.set(remat_spec=build_remat_spec(stack))
    emb = TransformerTextEmbeddings.default_config()
    emb.token_emb.set(param_partition_spec=(None, "model"), param_init=weight_init(fan="fan_out"))
    decoder = Decoder.default_config().set(
        attention_mask=None,
        vocab_size=vocab_size,
        dim=dim,
        dropout_rate=0.0,
        emb=emb,
        transformer=stack,
        output_norm=norm,
        pad_token_id=pad_token_id,
        eos_token_id=eos_token_id,
        logits_partition_spec=(BATCH_AXIS_NAMES, "seq", "model"),
    )
    if not tied_head:
        decoder.lm_head = LmHead.default_config().set(param_partition_spec=(None, "model"))
    return Model.default_config().set(
        decoder=decoder,
        batch_axis_names=None,
        dtype=jnp.float32,
        param_init=weight_init(fan="fan_in"),
    )
