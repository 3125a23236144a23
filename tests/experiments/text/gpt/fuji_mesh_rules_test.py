"""What each mesh rule of the fuji family makes of a recipe: mesh, rematerialisation, block sizes, precision, layout.

`tests/parity/fuji_*_rules_test.py` train by the same rules.
"""

import logging

import pytest

from axlearn.common.quantized_dot_general import uses_fp8
from axlearn.common.trainer import find_mesh_rule, select_mesh_config
from axlearn.experiments.text.gpt import fuji
from tests.parity.fuji_rules import (
    LAYER,
    OFFLOAD_ATTENTION,
    OFFLOAD_DOTS,
    RULES,
    distinct_rules,
    lowered_for_tpu,
    mesh_of,
    rule_text,
    selected,
)
from tests.parity.runs import recipe

_AXES = ("pipeline", "data", "expert", "fsdp", "seq", "model")
_OFFLOADING = [rule for rule in RULES if rule.remat in (OFFLOAD_DOTS, OFFLOAD_ATTENTION)]
_TRAINIUM = [rule for rule in RULES if rule.trainium]


def test_the_table_has_each_distinct_rule_once():
    found = []
    for rule in RULES:
        own = find_mesh_rule(recipe(rule.recipe), mesh_selector=rule.selector)
        found.append((rule.size, own.pattern, rule_text(own.rule)))
    assert len(set(found)) == len(found)
    assert set(found) == distinct_rules()


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_rule_sets_mesh_rematerialisation_batches_blocks_and_precision(rule):
    cfg = selected(rule)
    assert cfg.mesh_axis_names == _AXES
    assert {axis: n for axis, n in zip(_AXES, mesh_of(rule), strict=True) if n > 1} == rule.axes

    lines = dict(line.split(": ", 1) for line in cfg.debug_string().splitlines() if line.startswith("model."))
    for field, value in rule.remat.items():
        name, _, rest = field.partition(".")
        path = f"{LAYER}.remat_spec['{name}']" + (f".{rest}" if rest else "")
        assert lines[path].strip("'") == value

    forward = cfg.learner.forward_fn_transformation
    assert (1 if forward is None else forward.steps) == rule.micro_batches

    layer = cfg.model.decoder.transformer.layer
    attention = layer.self_attention.attention
    assert (attention.tpu_block_size, attention.gpu_block_size) == rule.blocks
    assert uses_fp8(cfg.model) == rule.fp8

    stack = "StackedTransformerLayer" if rule.trainium else "RepeatedTransformerLayer"
    assert lines["model.decoder.transformer.klass"] == f"'axlearn.common.attention.{stack}'"
    if rule.qkv is not None:
        assert attention.input_linear.input_linear.klass.__name__ == rule.qkv


@pytest.mark.parametrize("rule", _TRAINIUM, ids=str)
def test_trainium_splits_sequences_between_layers_and_the_vocabulary_over_model(rule):
    decoder = selected(rule).model.decoder
    layer = decoder.transformer.layer
    tokens, whole, split = (
        (("data", "fsdp"), None),
        (("data", "fsdp"), None, None),
        (("data", "fsdp"), "model", None),
    )
    weight = ("model", ("expert", "fsdp", "seq"))
    table = decoder.emb.token_emb
    assert table.param_partition_spec == weight
    assert (table.input_partition_spec, table.output_partition_spec) == (tokens, whole)
    assert table.embedding_partition_spec == ("model", None)
    for norm in (layer.self_attention.norm, layer.feed_forward.norm, decoder.output_norm):
        assert (norm.input_partition_spec, norm.output_partition_spec) == (split, whole)
    assert layer.feed_forward.linear2.output_partition_spec == whole
    if decoder.lm_head is not None:
        assert decoder.lm_head.param_partition_spec == weight
    # What the recipe says of layers counts in the stack that replaces the scanned one.
    assert layer.self_attention.norm.eps == 1e-5
    assert decoder.transformer.num_layers == {"7B": 32, "8B": 32, "70B": 80}[rule.size]


@pytest.mark.parametrize("rule", _OFFLOADING, ids=str)
def test_what_a_rule_offloads_waits_in_the_hosts_memory_on_a_tpu(rule):
    assert '"pinned_host"' in lowered_for_tpu(rule)


def test_nothing_is_offloaded_where_no_rule_says_so():
    (rule,) = [rule for rule in RULES if (rule.size, rule.selector) == ("7B", "tpu-v5litepod-256-4")]
    assert '"pinned_host"' not in lowered_for_tpu(rule)


@pytest.mark.parametrize("selector", ["tpu-v6e-256", "gpu-a4-highgpu-8g-256"])
def test_block_sizes_are_nothing_to_set_without_flash_attention_and_that_is_said(selector, caplog):
    cfg = fuji.trainer_config(fuji.Variant(size="70B", version="v1"))
    with caplog.at_level(logging.WARNING):
        select_mesh_config(cfg, mesh_selector=selector)
    assert "FlashAttention" in caplog.text
    assert "block_size" not in cfg.model.debug_string()
