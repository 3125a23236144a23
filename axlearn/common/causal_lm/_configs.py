"""Functions that configure common language models."""

import math
from typing import Any, Optional, Union

from axlearn.common.attention import (
    BaseStackedTransformerLayer,
    MultiheadAttention,
    TransformerLayer,
)
from axlearn.common.config import InstantiableConfig
from axlearn.common.decoder import Decoder
from axlearn.common.embedding import TransformerTextEmbeddings
from axlearn.common.layers import Embedding, LayerNorm, set_dropout_rate_recursively, set_norm_recursively
from axlearn.common.param_init import PARAM_REGEXP_WEIGHT, DefaultInitializer, WeightInitializer


def gpt_decoder_config(
    *,
    stack_cfg: BaseStackedTransformerLayer.Config,
    num_layers: int,
    hidden_dim: int,
    num_heads: int,
    vocab_size: int,
    max_position_embeddings: Optional[int] = None,
    activation_function: Union[str, tuple[str, str]] = "nn.gelu",
    layer_norm_epsilon: float = 1e-5,
    dropout_rate: float = 0.0,
    feed_forward_dim: Optional[Union[int, InstantiableConfig[int]]] = None,
    layer_cfg: Optional[TransformerLayer.Config] = None,
    attention_cfg: Optional[MultiheadAttention.Config] = None,
) -> Decoder.Config:
    """Configures a decoder of the GPT-2 shape: learned positions, layer norms before each block, a tied head.

    Args:
        stack_cfg: The stack, such as `RepeatedTransformerLayer.default_config()`.
        num_layers: Layers in the stack.
        hidden_dim: Dimension of the hidden states.
        num_heads: Heads of each attention; divides hidden_dim.
        vocab_size: Number of ids.
        max_position_embeddings: Learned position embeddings; None: none, the attention knows positions by
            itself.
        activation_function: Of the feed-forward layers; a pair makes them gated.
        layer_norm_epsilon: Of every norm.
        dropout_rate: Of every dropout, in [0, 1).
        feed_forward_dim: Width of the feed-forward layers; None: 4 * hidden_dim.
        layer_cfg: The layer to fill in; None: a `TransformerLayer`.
        attention_cfg: The attention; None: that of the layer.

    Returns:
        The config.

    Reference:
        Radford et al., Language Models are Unsupervised Multitask Learners, 2019, section 2.3.
    """
    layer: Any = (TransformerLayer.default_config() if layer_cfg is None else layer_cfg).clone()
    if attention_cfg is not None:
        layer.self_attention.attention = attention_cfg
    layer.self_attention.attention.set(num_heads=num_heads, causal=True)
    layer.feed_forward.set(
        hidden_dim=4 * hidden_dim if feed_forward_dim is None else feed_forward_dim,
        activation=activation_function,
    )
    norm = LayerNorm.default_config().set(eps=layer_norm_epsilon)
    set_norm_recursively(layer, norm)
    emb = TransformerTextEmbeddings.default_config()
    if max_position_embeddings is not None:
        emb.pos_emb = Embedding.default_config().set(num_embeddings=max_position_embeddings)
    cfg = Decoder.default_config().set(
        attention_mask=None,
        transformer=stack_cfg.clone(num_layers=num_layers, layer=layer),
        dim=hidden_dim,
        vocab_size=vocab_size,
        emb=emb,
        output_norm=norm,
        dropout_rate=dropout_rate,
    )
    set_dropout_rate_recursively(cfg, dropout_rate)
    return cfg


def residual_initializer_cfg(num_layers: int, *, std: float = 0.02) -> DefaultInitializer.Config:
    """Configures the initializer of weights that write into the residual stream.

    Args:
        num_layers: Transformer layers; each writes twice.
        std: The standard deviation of weights elsewhere.

    Returns:
        A normal distribution with the standard deviation `std / sqrt(2 * num_layers)`, to be set as the
        `param_init` of output projections and of second feed-forward layers.

    Reference:
        Radford et al., Language Models are Unsupervised Multitask Learners, 2019, section 2.3.
    """
    return DefaultInitializer.default_config().set(
        init_by_param_name={
            PARAM_REGEXP_WEIGHT: WeightInitializer.default_config().set(
                fan=None, scale=std / math.sqrt(2 * num_layers), distribution="normal"
            )
        }
    )
