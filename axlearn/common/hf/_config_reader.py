"""Reading a config.json."""

from collections.abc import Mapping
from typing import Any, Optional

from axlearn.common.config import error_message, nearest_names
from axlearn.common.hf._errors import refusal
from axlearn.common.hf._facts import DecoderFacts
from axlearn.common.hf._families import Family
from axlearn.common.hf._fields import Fields
from axlearn.common.hf._rope import rope_from_hf

# What a missing field stands for where the families differ, from the documentation of their config classes.
_DEFAULT_NUM_KV_HEADS = {Family.LLAMA: None, Family.QWEN2: 32, Family.QWEN3: 32, Family.MISTRAL: 8}
_DEFAULT_HEAD_DIM = {Family.LLAMA: None, Family.QWEN2: None, Family.QWEN3: 128, Family.MISTRAL: None}
_DEFAULT_NORM_EPS = 1e-6
_DEFAULT_WINDOW = 4096
_DEFAULT_MAX_WINDOW_LAYERS = 28

# Fields that change the numbers of a model, with the values at which they do not.
_NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": (None, "silu", "swish"),
    "partial_rotary_factor": (None, 1),
    "pretraining_tp": (None, 1),
    "quantization_config": (None,),
    "compression_config": (None,),
    "add_cross_attention": (None, False),
    "is_encoder_decoder": (None, False),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "use_mrope": (None, False),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
}
_FULL, _SLIDING = "full_attention", "sliding_attention"


def family_from_hf(hf_config: Mapping[str, Any]) -> Family:
    """Finds the family of a config.json.

    Args:
        hf_config: Its contents.

    Returns:
        The family.

    Raises:
        ValueError: It is none of ours, or the model is none that predicts the next token.
    """
    model_type = hf_config.get("model_type")
    families = {family.value: family for family in Family}
    if model_type not in families:
        nearest = nearest_names(model_type, list(families)) if isinstance(model_type, str) else None
        raise ValueError(
            error_message(
                where="config.json: model_type",
                what="missing" if model_type is None else f"unsupported {model_type!r}",
                expected=f"one of {', '.join(families)}",
                nearest=nearest,
            )
        )
    family = families[model_type]
    architectures = hf_config.get("architectures")
    if architectures not in (None, [], [family.architecture]):
        raise refusal("config.json: architectures", architectures, expected=f"{[family.architecture]}")
    return family


def facts_from_hf(hf_config: Mapping[str, Any]) -> DecoderFacts:
    """Reads what decides the numbers of a decoder from a config.json.

    Args:
        hf_config: Its contents, as transformers 4 or 5 writes it. A missing field has the default of its family.

    Returns:
        The facts.

    Raises:
        ValueError: A size is missing, a field has a wrong type, or one that changes numbers has a value that is
            not supported; the message names it. Fields that change nothing are not looked at.
    """
    family = family_from_hf(hf_config)
    fields = Fields(hf_config)
    _refuse_what_changes_numbers(fields, family)
    dim, num_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    num_kv_heads = fields.optional_integer("num_key_value_heads", _DEFAULT_NUM_KV_HEADS[family]) or num_heads
    if num_heads % num_kv_heads:
        raise ValueError(
            error_message(
                where="config.json: num_key_value_heads",
                what=f"{num_kv_heads}",
                expected=f"a divisor of num_attention_heads={num_heads}",
            )
        )
    num_layers = fields.integer("num_hidden_layers")
    has_biases = family in (Family.LLAMA, Family.QWEN3) and fields.boolean("attention_bias", False)
    return DecoderFacts(
        vocab_size=fields.integer("vocab_size"),
        dim=dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        per_head_dim=_per_head_dim(fields, family, dim=dim, num_heads=num_heads),
        feed_forward_dim=fields.integer("intermediate_size"),
        norm_eps=fields.number("rms_norm_eps", _DEFAULT_NORM_EPS),
        rope=rope_from_hf(hf_config),
        tied_head=fields.boolean("tie_word_embeddings", False),
        qkv_bias=has_biases or family is Family.QWEN2,
        output_bias=has_biases,
        feed_forward_bias=family is Family.LLAMA and fields.boolean("mlp_bias", False),
        qk_norm=family is Family.QWEN3,
        windows=_windows(hf_config, family, num_layers=num_layers),
    )


def _refuse_what_changes_numbers(fields: Fields, family: Family) -> None:
    for name, legal in _NEUTRAL_VALUES.items():
        fields.refuse_unless(name, legal)
    if family is not Family.LLAMA:
        fields.refuse_unless("mlp_bias", (None, False))
    if family is Family.MISTRAL:
        fields.refuse_unless("attention_bias", (None, False))
    if family is Family.LLAMA:
        fields.refuse_unless(
            "sliding_window", (None,), advice="transformers ignores it; a Llama with windows is a Mistral"
        )


def _per_head_dim(fields: Fields, family: Family, *, dim: int, num_heads: int) -> int:
    per_head_dim = fields.optional_integer("head_dim", _DEFAULT_HEAD_DIM[family])
    if per_head_dim is None and dim % num_heads:
        raise ValueError(
            error_message(
                where="config.json: hidden_size",
                what=f"{dim} without head_dim",
                expected=f"a multiple of num_attention_heads={num_heads}",
            )
        )
    per_head_dim = per_head_dim or dim // num_heads
    if per_head_dim % 2:
        raise ValueError(
            error_message(
                where="config.json: head_dim",
                what=f"{per_head_dim}",
                expected="an even size, for rotary positions",
            )
        )
    return per_head_dim


def _windows(hf_config: Mapping[str, Any], family: Family, *, num_layers: int) -> tuple[Optional[int], ...]:
    """The window of each layer; see `DecoderFacts.windows`."""
    fields = Fields(hf_config)
    kinds = _layer_types(hf_config, num_layers=num_layers)
    is_switched_on = family is Family.MISTRAL
    if family in (Family.QWEN2, Family.QWEN3):
        is_switched_on = fields.boolean("use_sliding_window", False)
    window = fields.optional_integer("sliding_window", _DEFAULT_WINDOW) if is_switched_on else None
    if kinds is None:
        first = 0
        if family in (Family.QWEN2, Family.QWEN3) and window is not None:
            first = fields.integer("max_window_layers", _DEFAULT_MAX_WINDOW_LAYERS, minimum=0)
        kinds = [_FULL if i < first or window is None else _SLIDING for i in range(num_layers)]
    is_legal = _SLIDING not in kinds if window is None else family is not Family.MISTRAL or _FULL not in kinds
    if not is_legal:
        raise refusal(
            "config.json: layer_types",
            hf_config.get("layer_types"),
            expected=f"{_FULL if window is None else _SLIDING} in every layer, from the other fields",
        )
    return tuple(window if kind == _SLIDING else None for kind in kinds)


def _layer_types(hf_config: Mapping[str, Any], *, num_layers: int) -> Optional[list[str]]:
    kinds = hf_config.get("layer_types")
    if kinds is None:
        return None
    is_legal = isinstance(kinds, list) and all(kind in (_FULL, _SLIDING) for kind in kinds)
    if not is_legal or len(kinds) != num_layers:
        raise refusal(
            "config.json: layer_types", kinds, expected=f"{num_layers} times {_FULL!r} or {_SLIDING!r}"
        )
    return kinds
