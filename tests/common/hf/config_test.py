"""Reading and writing config.json: versions, defaults, families, and what is refused."""

import dataclasses
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axlearn.common.hf import (
    DecoderFacts,
    Family,
    LinearRope,
    Llama3Rope,
    RopeFacts,
    YarnRope,
    facts_from_hf,
    facts_from_model,
    family_for,
    hf_config_from_facts,
    hf_config_from_model,
)
from axlearn.experiments.text.gpt import hf
from tests.common.hf.published_configs import PUBLISHED

BASE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def _config(model_type: str = "llama", **fields) -> dict:
    return {"model_type": model_type, **BASE, **fields}


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        (None, None),
        ({"rope_type": "default"}, None),
        ({"type": "linear", "factor": 2}, LinearRope(factor=2.0)),
        (LLAMA3, Llama3Rope(8.0, 1.0, 4.0, original_max_seq_length=16)),
        ({"type": "yarn", "factor": 4.0}, YarnRope(4.0, 32.0, 1.0, original_max_seq_length=64)),
        (
            {"rope_type": "yarn", "factor": 4.0, "beta_fast": 8, "beta_slow": 2, "attention_factor": 1.5}
            | {"original_max_position_embeddings": 16},
            YarnRope(4.0, 8.0, 2.0, original_max_seq_length=16, attention_factor=1.5),
        ),
    ],
)
def test_the_forms_of_transformers_4_and_5_say_the_same(scaling, expected):
    old = facts_from_hf(_config(rope_theta=500000, rope_scaling=scaling))
    rope_parameters = {"rope_theta": 500000.0, **(scaling or {"rope_type": "default"})}
    new = facts_from_hf(_config(rope_parameters=rope_parameters))
    both = _config(rope_theta=500000, rope_scaling=scaling, rope_parameters=rope_parameters)
    assert old.rope == new.rope == facts_from_hf(both).rope == RopeFacts(500000.0, expected)


def test_yarn_takes_its_attention_factor_from_two_weights_of_the_logarithm():
    scaling = {"type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.3}
    # What transformers 5.23.0 computes from these numbers.
    assert facts_from_hf(_config(rope_scaling=scaling)).rope.scaling.attention_factor == pytest.approx(
        1.0532376815143234, rel=1e-11
    )


def test_an_attention_factor_that_is_the_default_of_yarn_is_none():
    scaling = {"type": "yarn", "factor": 4.0, "attention_factor": 0.1 * math.log(4) + 1}
    facts = facts_from_hf(_config(rope_scaling=scaling))
    assert facts.rope.scaling.attention_factor is None
    assert facts_from_model(hf.model_config(_config(rope_scaling=scaling))) == facts


def test_a_missing_field_has_the_default_of_its_family():
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 40, "num_hidden_layers": 2}
    found = {}
    for family in ("llama", "qwen2", "qwen3", "mistral"):
        facts = facts_from_hf({"model_type": family, "num_attention_heads": 32, **sizes})
        assert (facts.norm_eps, facts.rope, facts.tied_head) == (1e-6, RopeFacts(10000.0), False)
        found[family] = (facts.num_kv_heads, facts.per_head_dim, facts.windows)
    # As AutoConfig of transformers 5.23.0 fills them in.
    assert found == {
        "llama": (32, 2, (None, None)),
        "qwen2": (32, 2, (None, None)),
        "qwen3": (32, 128, (None, None)),
        "mistral": (8, 2, (4096, 4096)),
    }


@pytest.mark.parametrize(
    ("fields", "windows"),
    [
        ({"max_window_layers": 0}, (8, 8, 8, 8)),
        ({"max_window_layers": 2}, (None, None, 8, 8)),
        ({"max_window_layers": 4}, (None, None, None, None)),
        ({"layer_types": ["sliding_attention", "full_attention"] * 2}, (8, None, 8, None)),
        ({"use_sliding_window": False, "max_window_layers": 0}, (None,) * 4),
        ({"sliding_window": None, "max_window_layers": 0}, (None,) * 4),
    ],
)
def test_windows_of_qwen_are_those_of_transformers(fields, windows):
    config = _config("qwen2", **{"use_sliding_window": True, "sliding_window": 8, **fields})
    assert facts_from_hf(config).windows == windows
    config = _config("qwen3", use_sliding_window=True, max_window_layers=3)
    assert facts_from_hf(config).windows == (None, None, None, 4096)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_round_trip(name):
    config, _ = PUBLISHED[name]
    facts = facts_from_hf(config)
    model = hf.model_config(config)
    assert facts_from_model(model) == facts
    written = hf_config_from_model(model, max_position_embeddings=4096, family=Family(config["model_type"]))
    assert facts_from_hf(json.loads(json.dumps(written))) == facts
    # Qwen names the size of a window that is switched off.
    left_out = {"pretraining_tp", "use_mrope", "sliding_window"}
    assert {key: written.get(key) for key in config if key not in left_out} == {
        key: value for key, value in config.items() if key not in left_out
    }


_positive = st.floats(1.0, 64.0)
_scalings = st.one_of(
    st.none(),
    st.builds(LinearRope, factor=_positive),
    st.builds(
        Llama3Rope,
        factor=_positive,
        low_freq_factor=st.floats(0.5, 1.0),
        high_freq_factor=st.floats(2.0, 8.0),
        original_max_seq_length=st.integers(1, 8192),
    ),
    st.builds(
        YarnRope,
        factor=_positive,
        beta_fast=st.floats(8.0, 64.0),
        beta_slow=st.floats(0.5, 2.0),
        original_max_seq_length=st.integers(1, 8192),
        # Our layer has the ratio to the default, so that rounding comes in; config.json files have few digits.
        attention_factor=st.one_of(st.none(), st.integers(1500, 2000).map(lambda x: x / 1000)),
    ),
)


@st.composite
def _facts(draw) -> DecoderFacts:
    """Decoders that some family can express."""
    qk_norm, biases = draw(st.booleans()), draw(st.sampled_from(["none", "qkv", "all"]))
    num_layers, window = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    num_kv_heads = draw(st.integers(1, 3))
    windows = [None] * num_layers
    if qk_norm or biases == "qkv":
        biases = "all" if qk_norm and biases == "qkv" else biases
        windows = [draw(st.sampled_from([None, window])) for _ in range(num_layers)]
    elif biases == "none" and draw(st.booleans()):
        windows = [window] * num_layers
    is_llama = not qk_norm and biases != "qkv" and windows[0] is None
    return DecoderFacts(
        vocab_size=draw(st.integers(1, 300)),
        dim=draw(st.integers(1, 5)) * 12,
        num_layers=num_layers,
        num_heads=num_kv_heads * draw(st.integers(1, 2)),
        num_kv_heads=num_kv_heads,
        per_head_dim=2 * draw(st.integers(1, 8)),
        feed_forward_dim=draw(st.integers(1, 99)),
        norm_eps=draw(st.sampled_from([1e-5, 1e-6])),
        rope=RopeFacts(theta=draw(st.floats(100.0, 1e7)), scaling=draw(_scalings)),
        tied_head=draw(st.booleans()),
        qkv_bias=biases != "none",
        output_bias=biases == "all",
        feed_forward_bias=is_llama and draw(st.booleans()),
        qk_norm=qk_norm,
        windows=tuple(windows),
    )


@settings(max_examples=40, deadline=None)
@given(facts=_facts())
def test_facts_survive_model_and_config_json(facts):
    # A config.json to begin with, by way of a model of ours whose class of family differs.
    first = hf_config_from_facts(facts)
    assert facts_from_hf(first) == facts
    model = hf.model_config(first, remat=False)
    assert facts_from_model(model) == facts
    second = hf_config_from_model(model, max_position_embeddings=64, eos_token_id=[2, 3])
    assert facts_from_hf(second) == facts
    assert second["eos_token_id"] == [2, 3]


def test_the_simplest_family_is_chosen_and_another_on_request():
    llama = facts_from_hf(_config())
    assert family_for(llama) is Family.LLAMA
    assert family_for(llama, family=Family.MISTRAL) is Family.MISTRAL
    assert family_for(dataclasses.replace(llama, windows=(8,) * 4)) is Family.MISTRAL
    assert family_for(dataclasses.replace(llama, qkv_bias=True)) is Family.QWEN2
    assert family_for(dataclasses.replace(llama, qk_norm=True, windows=(8, None, 8, None))) is Family.QWEN3


def test_ids_of_padding_and_of_the_end_of_text():
    def ids(**fields):
        decoder = hf.model_config(_config(**fields)).decoder
        return decoder.pad_token_id, decoder.eos_token_id

    assert ids(eos_token_id=2) == (2, 2)
    assert ids(eos_token_id=[7, 8], pad_token_id=5) == (5, 7)
    assert ids(eos_token_id=3, pad_token_id=-1) == (3, 3)
    assert ids(eos_token_id=None) == (0, hf.NO_TOKEN_ID)


REFUSED = {
    "no model_type": {**BASE},
    "another model_type": _config("qwen"),
    "another architecture": _config(architectures=["LlamaForSequenceClassification"]),
    "a missing size": {name: value for name, value in _config().items() if name != "intermediate_size"},
    "a size of the wrong type": _config(hidden_size="32"),
    "a negative size": _config(num_hidden_layers=-1),
    "heads that do not share": _config(num_key_value_heads=3),
    "heads that do not divide": _config(hidden_size=33),
    "odd heads": _config(head_dim=7),
    "another activation": _config(hidden_act="gelu"),
    "partial rotation": _config(partial_rotary_factor=0.5),
    "partial rotation in rope_parameters": _config(
        rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}
    ),
    "split matrices": _config(pretraining_tp=2),
    "quantized": _config(quantization_config={"quant_method": "gptq"}),
    "a soft cap": _config(final_logit_softcapping=30.0),
    "a window of a Llama": _config(sliding_window=8),
    "biases of a Mistral": _config("mistral", attention_bias=True),
    "feed-forward biases of a Qwen": _config("qwen2", mlp_bias=True),
    "an unknown scaling": _config(rope_scaling={"rope_type": "longrope", "factor": 2.0}),
    "a scaling without its factor": _config(rope_scaling={"type": "linear", "fctor": 2.0}),
    "a negative factor": _config(rope_scaling={"type": "linear", "factor": -2.0}),
    "yarn without rounding": _config(rope_scaling={"type": "yarn", "factor": 2.0, "truncate": False}),
    "two forms that disagree": _config(
        rope_theta=1e4, rope_parameters={"rope_type": "default", "rope_theta": 5e5}
    ),
    "positions by layer": _config(rope_parameters={"full_attention": {"rope_type": "default"}}),
    "unknown layers": _config("qwen3", layer_types=["linear_attention"] * 4),
    "too few layers": _config("qwen3", layer_types=["full_attention"] * 3),
    "windows that are switched off": _config(
        "qwen3", use_sliding_window=False, sliding_window=8, layer_types=["sliding_attention"] * 4
    ),
}


def test_what_cannot_be_translated_is_refused_by_name(golden):
    lines = []
    for title, config in REFUSED.items():
        with pytest.raises(ValueError) as caught:
            facts_from_hf(config)
        lines += [f"# {title}", str(caught.value), ""]
    golden("errors/hf/config.txt", "\n".join(lines))
