"""Reading what decides the numbers of a decoder from the config of one of our models."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Optional

from axlearn.common.attention import (
    BaseAttentionLogitBiasLayer,
    FusedGroupedQKVLinear,
    FusedQKVLinear,
    GroupedQKVLinear,
    GroupedQueryAttention,
    MultiheadAttention,
    MultiheadInputLinear,
    MultiheadOutputLinear,
    QKVLinear,
    RoFormerQKVLinear,
    ScaleKey,
    ScaleQuery,
    TransformerAttentionLayer,
    TransformerFeedForwardLayer,
    TransformerLayer,
    set_position_biases,
)
from axlearn.common.attention_bias import CausalAttentionBias, SlidingWindowAttentionBias
from axlearn.common.causal_lm import Model
from axlearn.common.config import public_name
from axlearn.common.decoder import Decoder, LmHead
from axlearn.common.embedding import TransformerTextEmbeddings
from axlearn.common.flash_attention.layer import FlashAttention
from axlearn.common.hf._errors import refusal
from axlearn.common.hf._facts import DecoderFacts, RopeFacts
from axlearn.common.hf._layer_places import layer_places
from axlearn.common.hf._model_fields import check_fields
from axlearn.common.hf._rope import rope_from_layer
from axlearn.common.layers import Embedding, Linear, RMSNorm

# Fields of FlashAttention that decide where and in which pieces it computes, and not what.
_FLASH_FIELDS = (
    "tpu_block_size",
    "gpu_block_size",
    "backend_overrides",
    "mha_dim_to_partition_spec",
    "output_dim_to_partition_spec",
)


@dataclasses.dataclass(frozen=True)
class _LayerFacts:
    """The part of `DecoderFacts` that a layer decides."""

    num_heads: int
    num_kv_heads: int
    per_head_dim: int
    feed_forward_dim: int
    norm_eps: float
    rope: RopeFacts
    qkv_bias: bool
    output_bias: bool
    feed_forward_bias: bool
    qk_norm: bool


def facts_from_model(model_cfg: Model.Config) -> DecoderFacts:
    """Reads what decides the numbers of a decoder from the config of a model.

    Args:
        model_cfg: The model.

    Returns:
        The facts.

    Raises:
        ValueError: The model has something that no supported family has; the message names field and value.
    """
    model: Any = model_cfg
    check_fields(
        model_cfg,
        where="model",
        classes=(Model,),
        read=("decoder", "batch_axis_names", "seq_axis_names", "metrics", "scan_chunk"),
    )
    decoder, where = model.decoder, "decoder"
    check_fields(
        decoder,
        where=where,
        classes=(Decoder,),
        read=(
            *("attention_mask", "emb", "transformer", "output_norm", "lm_head", "decoding"),
            *("pad_token_id", "eos_token_id", "num_seq_chunks"),
            *("logits_partition_spec", "hidden_state_partition_spec", "logits_forward_dtype"),
        ),
    )
    _check_ends(decoder)
    places = layer_places(_with_mask(decoder), path="decoder/transformer", where="decoder.transformer")
    # Layers that share a config are looked at once.
    cfgs = {place.where: place.cfg for place in places}
    layers = {path: _layer_facts(cfg, where=path, dim=decoder.dim) for path, cfg in cfgs.items()}
    windows = {path: _window(cfg, where=path) for path, cfg in cfgs.items()}
    _check_equal(layers)
    first = layers[places[0].where]
    output_eps = _norm_eps(decoder.output_norm, where=f"{where}.output_norm")
    if output_eps != first.norm_eps:
        raise refusal(f"{where}.output_norm.eps", output_eps, expected=f"{first.norm_eps}, as in the layers")
    return DecoderFacts(
        vocab_size=decoder.vocab_size,
        dim=decoder.dim,
        num_layers=len(places),
        tied_head=decoder.lm_head is None,
        windows=tuple(windows[place.where] for place in places),
        **vars(first),
    )


def _with_mask(decoder: Any) -> Any:
    """Returns the config of the stack of layers, with the mask that the decoder hands to those without one."""
    mask, transformer = decoder.attention_mask, decoder.transformer.clone()
    if isinstance(mask, BaseAttentionLogitBiasLayer.Config):
        klass: Any = mask.klass
        if klass.position_biases(mask).logit_bias is not None:
            raise refusal("decoder.attention_mask", klass, expected="a mask, without a bias by distance")
    if mask is not None:
        set_position_biases(transformer, mask)
    return transformer


def _check_ends(decoder: Any) -> None:
    """Checks what is in front of the layers and behind them."""
    if decoder.lm_head is not None:
        check_fields(decoder.lm_head, where="decoder.lm_head", classes=(LmHead,))
    if decoder.output_norm is None:
        raise refusal("decoder.output_norm", None, expected=public_name(RMSNorm))
    check_fields(decoder.emb, where="decoder.emb", classes=(TransformerTextEmbeddings,), read=("token_emb",))
    check_fields(decoder.emb.token_emb, where="decoder.emb.token_emb", classes=(Embedding,))


def _check_equal(layers: Mapping[str, _LayerFacts]) -> None:
    """Checks that all layers, by path, agree in what a config.json says once for all."""
    first_path, first = next(iter(layers.items()))
    for path, layer in layers.items():
        for name, value in vars(layer).items():
            if value != getattr(first, name):
                expected = f"{getattr(first, name)}, as in {first_path}"
                raise refusal(f"{path}: {name}", value, expected=expected)


def _layer_facts(layer_cfg: TransformerLayer.Config, *, where: str, dim: int) -> _LayerFacts:
    layer: Any = layer_cfg
    check_fields(layer, where=where, classes=(TransformerLayer,), read=("self_attention", "feed_forward"))
    block, block_where = layer.self_attention, f"{where}.self_attention"
    check_fields(
        block,
        where=block_where,
        classes=(TransformerAttentionLayer,),
        read=("norm", "structure", "attention"),
    )
    _require(block, "structure", "prenorm", where=block_where)
    feed_forward_dim, feed_forward_bias = _feed_forward(
        layer.feed_forward, where=f"{where}.feed_forward", dim=dim
    )
    eps = _norm_eps(block.norm, where=f"{block_where}.norm")
    other_eps = [_norm_eps(layer.feed_forward.norm, where=f"{where}.feed_forward.norm")]
    attention, attention_eps = _attention(block.attention, where=f"{block_where}.attention", dim=dim)
    if any(x != eps for x in other_eps + attention_eps):
        raise refusal(f"{where}: eps of the norms", [eps, *other_eps, *attention_eps], expected="one value")
    return _LayerFacts(
        feed_forward_dim=feed_forward_dim, feed_forward_bias=feed_forward_bias, norm_eps=eps, **attention
    )


def _feed_forward(cfg: Any, *, where: str, dim: int) -> tuple[int, bool]:
    """Returns the width of a feed-forward block, and whether it has biases."""
    check_fields(
        cfg,
        where=where,
        classes=(TransformerFeedForwardLayer,),
        read=("norm", "structure", "activation", "hidden_dim", "linear1", "linear2"),
    )
    _require(cfg, "structure", "prenorm", where=where)
    if tuple(cfg.activation) != ("nn.silu", "linear"):
        raise refusal(f"{where}.activation", cfg.activation, expected="('nn.silu', 'linear')")
    for name in ("linear1", "linear2"):
        check_fields(getattr(cfg, name), where=f"{where}.{name}", classes=(Linear,), read=("bias",))
    if cfg.linear1.bias != cfg.linear2.bias:
        raise refusal(
            f"{where}.linear2.bias", cfg.linear2.bias, expected=f"{cfg.linear1.bias}, as in linear1"
        )
    width = cfg.hidden_dim if isinstance(cfg.hidden_dim, int) else cfg.hidden_dim.instantiate(input_dim=dim)
    return width, cfg.linear1.bias


def _attention(cfg: Any, *, where: str, dim: int) -> tuple[dict[str, Any], list[float]]:
    """Returns fields of `_LayerFacts`, and the eps of the norms of queries and keys where there are any."""
    check_fields(
        cfg,
        where=where,
        classes=(GroupedQueryAttention, MultiheadAttention, FlashAttention),
        read=(
            *("hidden_dim", "input_linear", "output_linear", "query_scale", "key_scale", "causal", "mask"),
            "num_seq_chunks",
            *_FLASH_FIELDS,
        ),
    )
    rope_qkv, rope_where = cfg.input_linear, f"{where}.input_linear"
    check_fields(
        rope_qkv,
        where=rope_where,
        classes=(RoFormerQKVLinear,),
        read=(
            "rope_pos_emb_layer",
            "input_linear",
            "rotary_value",
            "query_scale",
            "key_scale",
            "partial_rope_factor",
        ),
    )
    _require(rope_qkv, "rotary_value", False, where=rope_where)
    if rope_qkv.partial_rope_factor not in (None, 1):
        raise refusal(
            f"{rope_where}.partial_rope_factor", rope_qkv.partial_rope_factor, expected="None or 1.0"
        )
    qkv, qkv_where = rope_qkv.input_linear, f"{rope_where}.input_linear"
    check_fields(
        qkv,
        where=qkv_where,
        classes=(FusedGroupedQKVLinear, GroupedQKVLinear, QKVLinear, FusedQKVLinear),
        read=("num_kv_heads", "layer"),
    )
    check_fields(qkv.layer, where=f"{qkv_where}.layer", classes=(MultiheadInputLinear,), read=("bias",))
    check_fields(
        cfg.output_linear, where=f"{where}.output_linear", classes=(MultiheadOutputLinear,), read=("bias",)
    )
    per_head_dim = (dim if cfg.hidden_dim is None else cfg.hidden_dim) // cfg.num_heads
    norm_eps = _qk_norm_eps(cfg, where=where, per_head_dim=per_head_dim)
    facts = {
        "num_heads": cfg.num_heads,
        "num_kv_heads": qkv.num_kv_heads if "num_kv_heads" in qkv else cfg.num_heads,
        "per_head_dim": per_head_dim,
        "rope": rope_from_layer(rope_qkv.rope_pos_emb_layer, where=f"{rope_where}.rope_pos_emb_layer"),
        "qkv_bias": qkv.layer.bias,
        "output_bias": cfg.output_linear.bias,
        "qk_norm": bool(norm_eps),
    }
    return facts, norm_eps


def _qk_norm_eps(cfg: Any, *, where: str, per_head_dim: int) -> list[float]:
    """Checks how queries and keys are scaled; returns the eps of their norms, none or two."""
    eps, factors = [], []
    for name, klass in (("query_scale", ScaleQuery), ("key_scale", ScaleKey)):
        factor = 1.0
        inner, outer = getattr(cfg.input_linear, name), getattr(cfg, name)
        for scale, scale_where in ((inner, f"{where}.input_linear.{name}"), (outer, f"{where}.{name}")):
            if scale is None:
                continue
            check_fields(scale, where=scale_where, classes=(klass,), read=("norm", "scale_factor"))
            scale_fn = klass.default_scale_factor() if scale.scale_factor is None else scale.scale_factor
            factor *= scale_fn.instantiate()(per_head_dim)
        if outer.norm is not None:
            raise refusal(
                f"{where}.{name}.norm",
                outer.norm.klass,
                expected=f"None: the norm in front of the rotation is input_linear.{name}.norm",
            )
        if inner is not None and inner.norm is not None:
            eps.append(_norm_eps(inner.norm, where=f"{where}.input_linear.{name}.norm"))
        factors.append(factor)
    if not math.isclose(factors[0] * factors[1], per_head_dim**-0.5, rel_tol=1e-9):
        raise refusal(
            f"{where}.query_scale.scale_factor",
            factors[0] * factors[1],
            expected=f"per_head_dim ** -0.5 = {per_head_dim**-0.5} for queries times keys",
        )
    if len(eps) == 1:
        raise refusal(
            f"{where}.input_linear.key_scale",
            cfg.input_linear.key_scale,
            expected="a norm exactly if query_scale has one",
        )
    return eps


def _norm_eps(cfg: Any, *, where: str) -> float:
    check_fields(cfg, where=where, classes=(RMSNorm,), read=("eps",))
    return float(cfg.eps)


def _window(layer_cfg: TransformerLayer.Config, *, where: str) -> Optional[int]:
    """The number of positions that a query of a layer sees; see `DecoderFacts.windows`."""
    layer: Any = layer_cfg
    attention = layer.self_attention.attention
    if attention.causal:
        return None
    mask = attention.mask
    klass = getattr(mask, "klass", None)
    if klass is CausalAttentionBias:
        return None
    if klass is SlidingWindowAttentionBias:
        # Ours does not count the query's own position, theirs does.
        return mask.sliding_window_size + 1
    raise refusal(
        f"{where}.self_attention.attention.mask",
        mask if klass is None else klass,
        expected=f"causal=True, {public_name(CausalAttentionBias)} or {public_name(SlidingWindowAttentionBias)}",
    )


def _require(cfg: Any, name: str, value: Any, *, where: str) -> None:
    if getattr(cfg, name) != value:
        raise refusal(f"{where}.{name}", getattr(cfg, name), expected=repr(value))
