"""Which tensors of a Hugging Face model make which parameter of ours, and how."""

from collections.abc import Mapping, Sequence
from typing import Any, Optional

import numpy as np

from axlearn.common.causal_lm import Model
from axlearn.common.config import error_message
from axlearn.common.hf._config_reader import facts_from_hf
from axlearn.common.hf._facts import DecoderFacts
from axlearn.common.hf._layer_places import LayerPlace, layer_places
from axlearn.common.hf._model_reader import facts_from_model
from axlearn.common.hf._qkv_tensors import pair_adjacent, pair_halves, qkv_rules
from axlearn.common.hf._tensor_rule import Shape, TensorRule, copy_rule


def tensor_rules(model_cfg: Model.Config, hf_config: Mapping[str, Any]) -> list[TensorRule]:
    """Lists how all parameters of a model translate, in the order of the layers.

    Args:
        model_cfg: Our model.
        hf_config: The contents of the config.json of the same model.

    Returns:
        Rules that together make every parameter of ours once, from every tensor of theirs once.

    Raises:
        ValueError: The two configs stand for different models, or one does not translate.
    """
    facts = facts_from_model(model_cfg)
    _check_same(facts, facts_from_hf(hf_config))
    model: Any = model_cfg
    places = layer_places(model.decoder.transformer, path="decoder/transformer", where="decoder.transformer")
    table = (facts.vocab_size, facts.dim)
    rules = [copy_rule("decoder/emb/token_emb/weight", None, "model.embed_tokens.weight", shape=table)]
    for i, place in enumerate(places):
        rules += _layer_rules(facts, place, prefix=f"model.layers.{i}.")
    rules.append(copy_rule("decoder/output_norm/scale", None, "model.norm.weight", shape=(facts.dim,)))
    if not facts.tied_head:
        rules.append(copy_rule("decoder/lm_head/weight", None, "lm_head.weight", shape=table))
    return rules


def parameter_shapes(rules: Sequence[TensorRule]) -> dict[str, Shape]:
    """Returns the shape of every parameter that rules make, with the leading dim that counts layers."""
    counts: dict[str, int] = {}
    for rule in rules:
        counts[rule.path] = counts.get(rule.path, 0) + 1
    return {
        rule.path: rule.shape if rule.layer is None else (counts[rule.path], *rule.shape) for rule in rules
    }


def _check_same(ours: DecoderFacts, theirs: DecoderFacts) -> None:
    for name, value in vars(ours).items():
        other = getattr(theirs, name)
        if value != other:
            raise ValueError(
                error_message(
                    where="model",
                    what=f"{name}={value}",
                    expected=f"{other}, as in config.json",
                    advice="The config of the model and config.json stand for different models.",
                )
            )


def _layer_rules(facts: DecoderFacts, place: LayerPlace, *, prefix: str) -> list[TensorRule]:
    path, layer = place.path, place.index
    norms = [
        copy_rule(f"{path}/{block}/norm/scale", layer, f"{prefix}{name}.weight", shape=(facts.dim,))
        for block, name in (
            ("self_attention", "input_layernorm"),
            ("feed_forward", "post_attention_layernorm"),
        )
    ]
    return [*_attention_rules(facts, place, prefix=f"{prefix}self_attn."), *norms] + [
        rule
        for ours, theirs in (("linear1_0", "gate_proj"), ("linear1_1", "up_proj"), ("linear2", "down_proj"))
        for rule in _linear_rules(facts, f"{path}/feed_forward/{ours}", layer, f"{prefix}mlp.{theirs}")
    ]


def _linear_rules(facts: DecoderFacts, path: str, layer: Optional[int], name: str) -> list[TensorRule]:
    """A dense layer: ours is [in, out], theirs [out, in]."""
    shape = (facts.dim, facts.feed_forward_dim)
    if path.endswith("/linear2"):
        shape = shape[::-1]
    rules = [
        copy_rule(
            f"{path}/weight",
            layer,
            f"{name}.weight",
            shape=shape,
            hf_shape=shape[::-1],
            to_ours=np.transpose,
            to_hf=np.transpose,
        )
    ]
    if facts.feed_forward_bias:
        rules.append(copy_rule(f"{path}/bias", layer, f"{name}.bias", shape=shape[1:]))
    return rules


def _attention_rules(facts: DecoderFacts, place: LayerPlace, *, prefix: str) -> list[TensorRule]:
    path, layer = f"{place.path}/self_attention/attention", place.index
    heads = (facts.num_heads, facts.per_head_dim)
    dim, num_rows = facts.dim, facts.num_heads * facts.per_head_dim
    rules = qkv_rules(facts, place, prefix=prefix)
    if facts.qk_norm:
        rules += [
            copy_rule(
                f"{path}/i_proj/scale_{ours}/norm/scale",
                layer,
                f"{prefix}{theirs}_norm.weight",
                shape=heads[1:],
                to_ours=pair_adjacent,
                to_hf=pair_halves,
            )
            for ours, theirs in (("query", "q"), ("key", "k"))
        ]
    rules.append(
        copy_rule(
            f"{path}/o_proj/weight",
            layer,
            f"{prefix}o_proj.weight",
            shape=(dim, *heads),
            hf_shape=(dim, num_rows),
            to_ours=lambda x: x.reshape(dim, *heads),
            to_hf=lambda x: x.reshape(dim, num_rows),
        )
    )
    if facts.output_bias:
        rules.append(copy_rule(f"{path}/o_proj/bias", layer, f"{prefix}o_proj.bias", shape=(dim,)))
    return rules
