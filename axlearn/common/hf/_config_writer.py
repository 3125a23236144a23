"""Writing a config.json."""

from collections.abc import Sequence
from typing import Any, Optional, Union

from axlearn.common.causal_lm import Model
from axlearn.common.hf._facts import DecoderFacts
from axlearn.common.hf._families import Family, family_for
from axlearn.common.hf._model_reader import facts_from_model
from axlearn.common.hf._rope import rope_to_hf

TokenIds = Union[int, Sequence[int], None]


def hf_config_from_model(
    model_cfg: Model.Config,
    *,
    max_position_embeddings: int,
    bos_token_id: Optional[int] = None,
    eos_token_id: TokenIds = None,
    pad_token_id: Optional[int] = None,
    dtype: str = "float32",
    family: Optional[Family] = None,
) -> dict[str, Any]:
    """Writes the config.json of one of our models, such that transformers 4 and 5 load the same model from it.

    Args:
        model_cfg: The model.
        max_position_embeddings: The longest sequence that it is meant for, in tokens.
        bos_token_id: The id in front of a text. None: there is none.
        eos_token_id: The id behind a text, or several. None: there is none.
        pad_token_id: The id that fills rows. None: there is none.
        dtype: The type that the tensors are stored in, such as "bfloat16".
        family: The family to write it in. None: the simplest that can express it.

    Returns:
        The contents of the config.json, with keys in alphabetical order.

    Raises:
        ValueError: The family, or no family, can express the model; the message names field and value.
    """
    return hf_config_from_facts(
        facts_from_model(model_cfg),
        max_position_embeddings=max_position_embeddings,
        bos_token_id=bos_token_id,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
        dtype=dtype,
        family=family,
    )


def hf_config_from_facts(
    facts: DecoderFacts,
    *,
    max_position_embeddings: int = 2048,
    bos_token_id: Optional[int] = None,
    eos_token_id: TokenIds = None,
    pad_token_id: Optional[int] = None,
    dtype: str = "float32",
    family: Optional[Family] = None,
) -> dict[str, Any]:
    """Writes the config.json of a decoder; see `hf_config_from_model`.

    Args:
        facts: The decoder.
        max_position_embeddings: See `hf_config_from_model`.
        bos_token_id: See `hf_config_from_model`.
        eos_token_id: See `hf_config_from_model`.
        pad_token_id: See `hf_config_from_model`.
        dtype: See `hf_config_from_model`.
        family: See `hf_config_from_model`.

    Returns:
        The contents of the config.json.

    Raises:
        ValueError: The family, or no family, can express the decoder.
    """
    family = family_for(facts, family=family)
    fields: dict[str, Any] = {
        "architectures": [family.architecture],
        "attention_dropout": 0.0,
        "bos_token_id": bos_token_id,
        "eos_token_id": list(eos_token_id) if isinstance(eos_token_id, Sequence) else eos_token_id,
        "hidden_act": "silu",
        "hidden_size": facts.dim,
        "initializer_range": 0.02,
        "intermediate_size": facts.feed_forward_dim,
        "max_position_embeddings": max_position_embeddings,
        "model_type": family.value,
        "num_attention_heads": facts.num_heads,
        "num_hidden_layers": facts.num_layers,
        "num_key_value_heads": facts.num_kv_heads,
        "pad_token_id": pad_token_id,
        "rms_norm_eps": facts.norm_eps,
        "tie_word_embeddings": facts.tied_head,
        # transformers 5 calls it dtype and reads both.
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": facts.vocab_size,
        **rope_to_hf(facts.rope),
        **_head_dim(facts, family),
        **_biases(facts, family),
        **_windows(facts, family),
    }
    return dict(sorted(fields.items()))


def _head_dim(facts: DecoderFacts, family: Family) -> dict[str, Any]:
    # Qwen2's config has no such field by default, but transformers heeds it where there is one.
    is_implied = facts.per_head_dim * facts.num_heads == facts.dim
    return {} if family is Family.QWEN2 and is_implied else {"head_dim": facts.per_head_dim}


def _biases(facts: DecoderFacts, family: Family) -> dict[str, Any]:
    if family is Family.LLAMA:
        return {"attention_bias": facts.qkv_bias, "mlp_bias": facts.feed_forward_bias}
    return {"attention_bias": facts.qkv_bias} if family is Family.QWEN3 else {}


def _windows(facts: DecoderFacts, family: Family) -> dict[str, Any]:
    sizes = {window for window in facts.windows if window is not None}
    window = sizes.pop() if sizes else None
    if family is Family.LLAMA:
        return {}
    if family is Family.MISTRAL:
        return {"sliding_window": window}
    is_full = [x is None for x in facts.windows]
    return {
        "layer_types": ["full_attention" if x else "sliding_attention" for x in is_full],
        # For versions of transformers that do not know layer_types: so many layers at the bottom have no window.
        "max_window_layers": is_full.index(False) if window else facts.num_layers,
        "sliding_window": window,
        "use_sliding_window": window is not None,
    }
