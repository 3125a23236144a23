"""Rotary positions: as fields of a config.json, as facts, as the config of a layer."""

import math
from collections.abc import Mapping
from typing import Any, Optional

from axlearn.common.attention import (
    LinearScaledSinusoidalPositionalEmbedding,
    Llama3SinusoidalPositionalEmbedding,
    RoFormerSinusoidalPositionalEmbedding,
    YaRNSinusoidalPositionalEmbedding,
)
from axlearn.common.base_layer import BaseLayer
from axlearn.common.hf._errors import refusal
from axlearn.common.hf._facts import LinearRope, Llama3Rope, RopeFacts, RopeScaling, YarnRope
from axlearn.common.hf._fields import Fields
from axlearn.common.hf._model_fields import check_fields

# The default of every family.
_DEFAULT_THETA = 10000.0
_TYPES = "one of default, linear, llama3, yarn"


def rope_from_hf(hf_config: Mapping[str, Any]) -> RopeFacts:
    """Reads rotary positions from a config.json.

    transformers 5 writes `rope_parameters`, earlier versions `rope_theta` and `rope_scaling`. Either will do, and
    both if they agree.

    Args:
        hf_config: The contents of a config.json.

    Returns:
        The facts.

    Raises:
        ValueError: A field is missing, has an unknown value, or the two forms disagree.
    """
    forms = []
    if hf_config.get("rope_parameters") is not None:
        forms.append(_read_form(hf_config, "rope_parameters"))
    if hf_config.get("rope_scaling") is not None or not forms:
        forms.append(_read_form(hf_config, "rope_scaling"))
    elif "rope_theta" in hf_config:
        forms.append(RopeFacts(theta=Fields(hf_config).number("rope_theta"), scaling=forms[0].scaling))
    if any(form != forms[0] for form in forms):
        raise refusal(
            "config.json: rope_parameters",
            hf_config["rope_parameters"],
            expected=f"the same as rope_theta={hf_config.get('rope_theta')} and "
            f"rope_scaling={hf_config.get('rope_scaling')} beside it",
        )
    return forms[0]


def _read_form(hf_config: Mapping[str, Any], name: str) -> RopeFacts:
    values = hf_config.get(name) or {}
    if not isinstance(values, Mapping) or any(isinstance(value, Mapping) for value in values.values()):
        raise refusal(f"config.json: {name}", values, expected="one kind of positions for all layers")
    fields = Fields(values, where=name)
    theta = Fields(hf_config).number("rope_theta", _DEFAULT_THETA)
    max_seq_length = Fields(hf_config).integer("max_position_embeddings", 0)
    return RopeFacts(
        theta=fields.number("rope_theta", theta), scaling=_read_scaling(fields, max_seq_length=max_seq_length)
    )


def _read_scaling(fields: Fields, *, max_seq_length: int) -> Optional[RopeScaling]:
    kind = fields.text("rope_type", fields.text("type", "default"))
    fields.refuse_unless("partial_rotary_factor", (None, 1))
    fields.refuse_unless("mrope_section", (None,))
    if kind == "default":
        return None
    if kind == "linear":
        return LinearRope(factor=fields.number("factor"))
    if kind == "llama3":
        return Llama3Rope(
            factor=fields.number("factor"),
            low_freq_factor=fields.number("low_freq_factor"),
            high_freq_factor=fields.number("high_freq_factor"),
            original_max_seq_length=fields.integer("original_max_position_embeddings"),
        )
    if kind == "yarn":
        return _read_yarn(fields, max_seq_length=max_seq_length)
    raise refusal(fields.path("rope_type"), kind, expected=_TYPES)


def _read_yarn(fields: Fields, *, max_seq_length: int) -> YarnRope:
    # Without rounding, the ramp between the two kinds of frequencies would begin elsewhere.
    fields.refuse_unless("truncate", (None, True))
    factor = fields.number("factor")
    attention_factor = fields.optional_number("attention_factor")
    mscale, mscale_all_dim = (fields.optional_number(name) for name in ("mscale", "mscale_all_dim"))
    if attention_factor is None and mscale and mscale_all_dim:
        attention_factor = _log_scale(factor, mscale) / _log_scale(factor, mscale_all_dim)
    original = fields.integer("original_max_position_embeddings", max_seq_length)
    if not original:
        raise refusal(
            fields.path("original_max_position_embeddings"), None, expected="the length of the first training"
        )
    return YarnRope(
        factor=factor,
        beta_fast=fields.number("beta_fast", 32.0),
        beta_slow=fields.number("beta_slow", 1.0),
        original_max_seq_length=original,
        attention_factor=_normal_form(attention_factor, factor=factor),
    )


def _normal_form(attention_factor: Optional[float], *, factor: float) -> Optional[float]:
    """None for the paper's factor; others rounded to 12 digits.

    That is far more than float32 has, and few enough to be the same after a division and a multiplication.
    """
    if attention_factor is None:
        return None
    rounded, default = (float(f"{x:.12g}") for x in (attention_factor, _log_scale(factor)))
    return None if rounded == default else rounded


def _log_scale(factor: float, weight: float = 1.0) -> float:
    """What YaRN multiplies sines and cosines by; https://arxiv.org/abs/2309.00071, equation 22."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def rope_to_hf(rope: RopeFacts) -> dict[str, Any]:
    """Writes rotary positions as fields of a config.json.

    Args:
        rope: The facts.

    Returns:
        `rope_parameters` for transformers 5, and the same as `rope_theta` and `rope_scaling` for earlier versions.
    """
    scaling = _scaling_to_hf(rope.scaling)
    return {
        "rope_parameters": {"rope_theta": rope.theta, **(scaling or {"rope_type": "default"})},
        "rope_scaling": scaling,
        "rope_theta": rope.theta,
    }


def _scaling_to_hf(scaling: Optional[RopeScaling]) -> Optional[dict[str, Any]]:
    if scaling is None:
        return None
    if isinstance(scaling, LinearRope):
        return {"rope_type": "linear", "factor": scaling.factor}
    fields: dict[str, Any] = {
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_max_seq_length,
    }
    if isinstance(scaling, Llama3Rope):
        return {
            "rope_type": "llama3",
            **fields,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
        }
    if scaling.attention_factor is not None:
        fields["attention_factor"] = scaling.attention_factor
    return {"rope_type": "yarn", **fields, "beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}


def rope_layer_config(rope: RopeFacts) -> BaseLayer.Config:
    """Returns the layer that computes the sines and cosines."""
    scaling = rope.scaling
    if scaling is None:
        return RoFormerSinusoidalPositionalEmbedding.default_config().set(theta=rope.theta)
    if isinstance(scaling, LinearRope):
        return LinearScaledSinusoidalPositionalEmbedding.default_config().set(
            theta=rope.theta, scaling_factor=scaling.factor
        )
    if isinstance(scaling, Llama3Rope):
        return Llama3SinusoidalPositionalEmbedding.default_config().set(
            theta=rope.theta,
            scaling_factor=scaling.factor,
            low_freq_factor=scaling.low_freq_factor,
            high_freq_factor=scaling.high_freq_factor,
            original_max_seq_length=scaling.original_max_seq_length,
        )
    cfg = YaRNSinusoidalPositionalEmbedding.default_config().set(
        theta=rope.theta,
        scaling_factor=scaling.factor,
        beta_fast=scaling.beta_fast,
        beta_slow=scaling.beta_slow,
        original_max_seq_length=scaling.original_max_seq_length,
    )
    if scaling.attention_factor is not None:
        # The layer multiplies by the paper's factor itself.
        cfg.attn_factor = scaling.attention_factor / _log_scale(scaling.factor)
    return cfg


def rope_from_layer(cfg: BaseLayer.Config, *, where: str) -> RopeFacts:
    """Reads rotary positions from the config of the layer that computes the sines and cosines.

    Args:
        cfg: The config.
        where: Its path, for messages.

    Returns:
        The facts.

    Raises:
        ValueError: No config.json can say the same.
    """
    classes = (
        RoFormerSinusoidalPositionalEmbedding,
        LinearScaledSinusoidalPositionalEmbedding,
        Llama3SinusoidalPositionalEmbedding,
        YaRNSinusoidalPositionalEmbedding,
    )
    layer: Any = cfg
    values = ("theta", "scaling_factor", "low_freq_factor", "high_freq_factor", "original_max_seq_length")
    check_fields(cfg, where=where, classes=classes, read=(*values, "beta_fast", "beta_slow", "attn_factor"))
    return RopeFacts(theta=float(layer.theta), scaling=_scaling_from_layer(layer))


def _scaling_from_layer(layer: Any) -> Optional[RopeScaling]:
    if layer.klass is RoFormerSinusoidalPositionalEmbedding:
        return None
    factor = float(layer.scaling_factor)
    if layer.klass is LinearScaledSinusoidalPositionalEmbedding:
        return LinearRope(factor=factor)
    if layer.klass is Llama3SinusoidalPositionalEmbedding:
        return Llama3Rope(
            factor=factor,
            low_freq_factor=float(layer.low_freq_factor),
            high_freq_factor=float(layer.high_freq_factor),
            original_max_seq_length=layer.original_max_seq_length,
        )
    attention_factor = _normal_form(layer.attn_factor * _log_scale(factor), factor=factor)
    return YarnRope(
        factor=factor,
        beta_fast=float(layer.beta_fast),
        beta_slow=float(layer.beta_slow),
        original_max_seq_length=layer.original_max_seq_length,
        attention_factor=attention_factor,
    )
