"""The tables of fuji: that they hang together, and how to extend them."""

import dataclasses
import math
import re

import pytest

from axlearn.common.attention import GroupedQKVLinear
from axlearn.common.config import config_for_function
from axlearn.common.trainer import select_mesh_config
from axlearn.common.utils import flatten_items
from axlearn.experiments.text.gpt import common, fuji
from axlearn.experiments.text.gpt.common import MeshRule

VARIANTS = {variant.name: variant for variant in fuji.variants()}


def test_each_version_has_its_sizes():
    by_version = {
        version: [size for size, facts in fuji.SIZES.items() if version in facts.versions]
        for version in fuji.VERSIONS
    }
    assert by_version == {
        "v1": ["test", "7B", "70B"],
        "v2": ["test", "7B", "70B"],
        "v3": ["test", "1B", "3B", "7B", "70B", "405B"],
        "v3-tiktoken": ["test", "1B", "3B", "8B", "70B", "405B"],
    }
    assert len(VARIANTS) == 96


def test_tables_name_only_what_is_in_other_tables():
    for facts in fuji.SIZES.values():
        assert {*facts.versions, *facts.grouped, *facts.total_tokens} <= set(fuji.VERSIONS)
    assert set(fuji.MESH_RULES) <= set(fuji.SIZES)
    assert {(variant.size, variant.version) for variant in VARIANTS.values()} >= fuji._FUSED_ON_TRN2


def test_all_mesh_rules_are_expressions_over_the_six_axes():
    for rules in fuji.MESH_RULES.values():
        for rule in rules:
            re.compile(rule.instance_types)
            assert len(rule.mesh_shape) == len(common.MESH_AXIS_NAMES)
            assert sum(size == -1 for size in rule.mesh_shape) == 1


@pytest.mark.parametrize(
    ("name", "batch_size", "max_sequence_length", "max_step"),
    [
        ("fuji-7B-v1", 2048, 2048, 262144),
        ("fuji-70B-v1", 2048, 2048, 367001),
        ("fuji-70B-v2-flash", 1024, 4096, 524288),
        ("fuji-8B-v3-tiktoken-single-host", 16, 8192, 983040),
        ("fuji-7B-v2-flash-fp8-single-host", 8, 4096, 524288),
        ("fuji-test-v3", 32, 64, 3000),
    ],
)
def test_batch_and_length_follow_from_the_tables(name, batch_size, max_sequence_length, max_step):
    variant = VARIANTS[name]
    assert (variant.batch_size, variant.max_sequence_length, variant.max_step) == (
        batch_size,
        max_sequence_length,
        max_step,
    )


def _num_parameters(variant: fuji.Variant) -> int:
    """By the formulas of the papers: embedding, head, attention, feed-forward, norms."""
    facts, model = fuji.SIZES[variant.size], fuji.trainer_config(variant).model.decoder
    dim, num_kv_heads = facts.dim, variant.num_kv_heads or facts.num_heads
    ffn_dim = model.transformer.layer.feed_forward.hidden_dim
    if not isinstance(ffn_dim, int):
        ffn_dim = ffn_dim.set(input_dim=dim).instantiate()
    attention = dim * dim * (2 + 2 * num_kv_heads / facts.num_heads)
    layer = attention + 3 * dim * ffn_dim + 2 * dim
    return int(variant.vocab_size * dim * (1 if facts.tied_head else 2) + facts.num_layers * layer + dim)


@pytest.mark.parametrize(
    ("name", "num_parameters"),
    # Of Llama 2 7B, 70B; Llama 3.2 1B, 3B; Llama 3 8B, 70B, 405B, by their released weights. Llama 2 has an untied
    # head and a vocabulary of 32000 where fuji-7B ties it and has 32768, fuji-70B-v2 has 32768.
    [
        ("fuji-7B-v2", 6738415616 - 2 * 32000 * 4096 + 32768 * 4096),
        ("fuji-70B-v2", 68976648192 - 2 * 32000 * 8192 + 2 * 32768 * 8192),
        ("fuji-1B-v3-tiktoken", 1235814400),
        ("fuji-3B-v3-tiktoken", 3212749824),
        ("fuji-8B-v3-tiktoken", 8030261248),
        ("fuji-70B-v3-tiktoken", 70553706496),
        ("fuji-405B-v3-tiktoken", 405853388800),
    ],
)
def test_models_have_as_many_parameters_as_the_released_ones(name, num_parameters):
    variant = VARIANTS[name]
    model = fuji.trainer_config(variant).model.set(name="model").instantiate(parent=None)
    specs = flatten_items(model.create_parameter_specs_recursively())
    counted = sum(math.prod(spec.shape) for _, spec in specs)
    assert counted == num_parameters == _num_parameters(variant)


def test_fp8_variants_differ_from_their_base_only_where_a_rule_says_fp8():
    same = [
        name
        for name, variant in VARIANTS.items()
        if variant.fp8
        and fuji.trainer_config(variant) == fuji.trainer_config(dataclasses.replace(variant, fp8=False))
    ]
    # As in the reference's dumps: sizes without rules for such machines, and 8B, whose rule is a plain mesh.
    assert len(same) == 24
    assert not any("-7B-" in name or "-70B-" in name for name in same)
    assert len([variant for variant in VARIANTS.values() if variant.fp8]) == 44


@pytest.mark.parametrize(
    ("name", "is_grouped"),
    [
        ("fuji-7B-v2", False),
        ("fuji-7B-v3", True),
        ("fuji-70B-v1", False),
        ("fuji-70B-v3-tiktoken", True),
        ("fuji-1B-v3", True),
        ("fuji-1B-v3-tiktoken", False),
        ("fuji-8B-v3-tiktoken", False),
    ],
)
def test_trainium_takes_grouped_projections_apart_but_for_three_sizes(name, is_grouped):
    cfg = fuji.trainer_config(VARIANTS[name])
    select_mesh_config(cfg, mesh_selector="neuron-trn2.48xlarge-64")
    attention = cfg.model.decoder.transformer.layer.self_attention.attention
    assert (attention.input_linear.input_linear.klass is GroupedQKVLinear) == is_grouped


def test_a_size_and_a_machine_are_a_row_each(monkeypatch):
    facts = dataclasses.replace(fuji.SIZES["7B"], versions=("v2",), num_layers=40, dim=5120, num_heads=40)
    monkeypatch.setitem(fuji.SIZES, "13B", facts)
    rule = MeshRule("tpu-v9-.*", common.mesh_shape_from_axes(fsdp=-1), modifiers=[common.accumulate(2)])
    monkeypatch.setitem(fuji.MESH_RULES, "13B", (rule,))
    names = [variant.name for variant in fuji.variants() if variant.size == "13B"]
    assert len(names) == 8
    cfg = fuji.trainer_config(fuji.Variant(size="13B", version="v2", flash=True))
    select_mesh_config(cfg, mesh_selector="tpu-v9-64")
    assert cfg.mesh_shape == (1, 1, 1, -1, 1, 1)
    assert cfg.learner.forward_fn_transformation.steps == 2
    assert cfg.model.decoder.dim == 5120


def test_a_version_is_a_row_and_a_mention_at_its_sizes(monkeypatch):
    facts = dataclasses.replace(fuji.VERSIONS["v3"], vocab_size=1000, rope_theta=1e6)
    monkeypatch.setitem(fuji.VERSIONS, "v4", facts)
    size = dataclasses.replace(fuji.SIZES["8B"], versions=("v3-tiktoken", "v4"))
    monkeypatch.setitem(fuji.SIZES, "8B", size)
    assert "fuji-8B-v4-flash" in {variant.name for variant in fuji.variants()}
    assert fuji.trainer_config(fuji.Variant(size="8B", version="v4")).model.decoder.vocab_size == 1000
    tokenizer = config_for_function(fuji.vocab).set(sentencepiece_model_name="bpe_128k_c4.model")
    assert fuji.VERSIONS["v4"].tokenizer == tokenizer
