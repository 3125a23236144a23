"""Models of the Hugging Face hub as recipes: from a config.json to configs of ours."""

from collections.abc import Mapping
from typing import Any, Optional

import jax.numpy as jnp

from axlearn.common.attention import (
    ScaleKey,
    ScaleQuery,
    StackedTransformerLayer,
    TransformerLayer,
    build_remat_spec,
    constant_scale_fn,
    enable_sliding_window_attention,
)
from axlearn.common.attention_bias import SlidingWindowAttentionBias
from axlearn.common.causal_lm import Model
from axlearn.common.config import InstantiableConfig, config_for_function, error_message
from axlearn.common.decoder import LmHead
from axlearn.common.hf import DecoderFacts, facts_from_hf, rope_layer_config, text_fields_from_hf
from axlearn.common.input_fake import FakeLmInput
from axlearn.common.layers import RMSNorm
from axlearn.common.trainer import SpmdTrainer
from axlearn.experiments.text.gpt import common

# No token has this id: where a config.json names no end of text, none is ever found.
NO_TOKEN_ID = -1


def model_config(
    hf_config: Mapping[str, Any], *, remat: bool = True, kv_cache_dtype: Optional[type] = None
) -> Model.Config:
    """Returns the model that a config.json describes.

    Layers that are all alike become a `RepeatedTransformerLayer`, others (Qwen with windows in some layers) a
    `StackedTransformerLayer`. Norms compute in float32, as they do there.

    Args:
        hf_config: The contents of a config.json of a Llama, Qwen2, Qwen3 or Mistral.
        remat: See `common.model_config`.
        kv_cache_dtype: Type of the keys and values that decoding keeps. None: that of the parameters.

    Returns:
        The model. Of several `eos_token_id` it has the first. Where there is none it is -1, which no token has;
        where there is no `pad_token_id`, that is `eos_token_id`, or else 0.

    Raises:
        ValueError: The config.json has something that is not supported; see `facts_from_hf`.
    """
    facts = facts_from_hf(hf_config)
    pad_token_id, eos_token_id = _token_ids(hf_config)
    norm = _norm_config(facts)
    layers = {
        window: _layer_config(facts, norm=norm, window=window, kv_cache_dtype=kv_cache_dtype)
        for window in set(facts.windows)
    }
    cfg = common.model_config(
        vocab_size=facts.vocab_size,
        dim=facts.dim,
        num_layers=facts.num_layers,
        layer=layers[facts.windows[0]],
        norm=norm,
        pad_token_id=pad_token_id,
        eos_token_id=eos_token_id,
        remat=remat,
    )
    if len(layers) > 1:
        cfg.decoder.transformer = _stack_config([layers[window] for window in facts.windows], remat=remat)
    if not facts.tied_head:
        cfg.decoder.lm_head = LmHead.default_config()
    return cfg


def _token_ids(hf_config: Mapping[str, Any]) -> tuple[int, int]:
    """Returns the ids of padding and of the end of a text."""
    fields = text_fields_from_hf(hf_config)
    eos_token_id = fields.eos_ids[0] if fields.eos_ids else NO_TOKEN_ID
    return fields.pad_id if fields.pad_id is not None else max(eos_token_id, 0), eos_token_id


def trainer_config(
    model: Model.Config,
    *,
    recipe: InstantiableConfig,
    run_dir: str,
    vocab_cfg: Optional[InstantiableConfig],
    max_len: Optional[int],
) -> SpmdTrainer.Config:
    """Returns a recipe with another model: its learner, mesh, evaluations and text stay as they are.

    Args:
        model: The model, from `model_config`.
        recipe: The config of any trainer of language models on text.
        run_dir: The run directory.
        vocab_cfg: Builds the model's tokenizer, which every input of the recipe gets in place of its own. None:
            there is none, and the recipe reads no text.
        max_len: The most tokens of a row that the model was made for; longer rows of the recipe are shortened. None:
            not known.

    Raises:
        ValueError: The recipe's inputs read no text, or read it although there is no tokenizer.
    """
    cfg: Any = recipe.clone(model=model, dir=run_dir)
    inputs = {"input": cfg.input}
    inputs |= {f"evalers[{name!r}].input": evaler.input for name, evaler in cfg.evalers.items()}
    for path, input_cfg in inputs.items():
        _adapt_input(input_cfg, model, vocab_cfg=vocab_cfg, max_len=max_len, path=path)
    return cfg


def _adapt_input(
    input_cfg: Any,
    model: Any,
    *,
    vocab_cfg: Optional[InstantiableConfig],
    max_len: Optional[int],
    path: str,
) -> None:
    """Gives an input the tokenizer and the row length of a model."""
    source: Any = input_cfg
    row_len_field = "source_length"
    if isinstance(input_cfg, FakeLmInput.Config):
        source.vocab_size = model.decoder.vocab_size
    else:
        source, row_len_field = getattr(input_cfg, "source", None), "max_sequence_length"
        _check_reads_text(source, vocab_cfg, path=path)
        source.vocab_cfg = vocab_cfg
    if max_len is not None and getattr(source, row_len_field) > max_len:
        setattr(source, row_len_field, max_len)


def _check_reads_text(source: Any, vocab_cfg: Optional[InstantiableConfig], *, path: str) -> None:
    if source is None or "vocab_cfg" not in source:
        raise ValueError(
            error_message(
                where=path,
                what="the recipe's data have no tokenizer that could be replaced",
                expected="packed text, or made-up data",
                advice="Name another recipe, such as fuji-tiny.",
            )
        )
    if vocab_cfg is None:
        raise ValueError(
            error_message(
                where=path,
                what="the recipe reads text, and the model comes without a tokenizer",
                advice="Give a tokenizer, or --data_dir=FAKE for made-up data.",
            )
        )


def _norm_config(facts: DecoderFacts) -> RMSNorm.Config:
    return RMSNorm.default_config().set(eps=facts.norm_eps, forward_dtype=jnp.float32)


def _stack_config(layers: list[TransformerLayer.Config], *, remat: bool) -> StackedTransformerLayer.Config:
    stack = StackedTransformerLayer.default_config().set(num_layers=len(layers), layer=layers)
    if remat:
        for layer in stack.layer:
            layer.set(remat_spec=build_remat_spec(stack))
    return stack


def _layer_config(
    facts: DecoderFacts, *, norm: RMSNorm.Config, window: Optional[int], kv_cache_dtype: Optional[type]
) -> TransformerLayer.Config:
    attention: Any = common.attention_config(
        num_heads=facts.num_heads,
        num_kv_heads=facts.num_kv_heads,
        rope_theta=facts.rope.theta,
        kv_cache_dtype=kv_cache_dtype,
    )
    attention.input_linear.rope_pos_emb_layer = rope_layer_config(facts.rope)
    if facts.num_heads * facts.per_head_dim != facts.dim:
        attention.hidden_dim = facts.num_heads * facts.per_head_dim
    if facts.qk_norm:
        # The usual factor of queries stays behind the rotation.
        one = config_for_function(constant_scale_fn).set(value=1)
        attention.input_linear.set(
            query_scale=ScaleQuery.default_config().set(norm=norm, scale_factor=one),
            key_scale=ScaleKey.default_config().set(norm=norm),
        )
    layer: Any = common.layer_config(attention=attention, feed_forward_dim=facts.feed_forward_dim, norm=norm)
    attention = layer.self_attention.attention
    attention.input_linear.input_linear.layer.bias = facts.qkv_bias
    attention.output_linear.bias = facts.output_bias
    for name in ("linear1", "linear2"):
        getattr(layer.feed_forward, name).bias = facts.feed_forward_bias
    if window == 1:
        # A query that sees only itself: there is no past to keep, and no cache of that length.
        attention.set(causal=None, mask=SlidingWindowAttentionBias.default_config(sliding_window_size=0))
    elif window is not None:
        # Ours does not count the query's own position, theirs does.
        enable_sliding_window_attention(layer, window - 1)
    return layer
