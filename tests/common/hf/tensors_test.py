"""Which tensors make which parameter: against loops over single numbers, and as a bijection."""

import math

import ml_dtypes
import numpy as np
import pytest

from axlearn.common.attention import FusedGroupedQKVLinear, FusedQKVLinear, GroupedQKVLinear, QKVLinear
from axlearn.common.hf import check_tensor_names, facts_from_hf, parameter_shapes, tensor_rules
from axlearn.common.utils import flatten_items
from axlearn.experiments.text.gpt import hf
from tests.common.hf.published_configs import PUBLISHED
from tests.parity.hf_models import (
    NAMES,
    OUR_MODELS,
    export,
    instantiate,
    read_config,
    read_tensors,
)


def _rules(name: str):
    config = read_config(name)
    return tensor_rules(hf.model_config(config, remat=False), config)


def _ours_by_path(name: str, path_end: str) -> dict[str, np.ndarray]:
    """Our parts of the last layer whose paths have this end, by path."""
    tensors = read_tensors(name)
    return {
        rule.path: rule.to_ours({x: tensors[x] for x in rule.hf_shapes})
        for rule in _rules(name)
        if rule.path.endswith(path_end)
    }


def test_every_number_of_the_projections_is_where_the_definitions_say():
    """Theirs pairs dim i of a head with dim i + h / 2, ours dim 2 i with dim 2 i + 1; heads are q, then k, v."""
    tensors, facts = read_tensors("llama-bias"), facts_from_hf(read_config("llama-bias"))
    (weight,) = _ours_by_path("llama-bias", "qkv_proj/weight").values()
    (bias,) = _ours_by_path("llama-bias", "qkv_proj/bias").values()
    h = facts.per_head_dim
    head = 0
    for name, num_heads in (("q", facts.num_heads), ("k", facts.num_kv_heads), ("v", facts.num_kv_heads)):
        theirs = {x: tensors[f"model.layers.1.self_attn.{name}_proj.{x}"] for x in ("weight", "bias")}
        for n in range(num_heads):
            for i in range(h):
                # Where dim i of a head comes from.
                row = n * h + (i if name == "v" else i // 2 + (i % 2) * (h // 2))
                np.testing.assert_array_equal(weight[:, head, i], theirs["weight"][row])
                assert bias[head, i] == theirs["bias"][row]
            head += 1
    assert weight.shape == (facts.dim, head, h)


def test_every_number_of_the_other_matrices_is_where_the_definitions_say():
    tensors, facts = read_tensors("qwen3"), facts_from_hf(read_config("qwen3"))
    prefix = "model.layers.1."
    (o_proj,) = _ours_by_path("qwen3", "o_proj/weight").values()
    for n in range(facts.num_heads):
        columns = slice(n * facts.per_head_dim, (n + 1) * facts.per_head_dim)
        np.testing.assert_array_equal(o_proj[:, n], tensors[f"{prefix}self_attn.o_proj.weight"][:, columns])
    for ours, theirs in (("linear1_0", "gate"), ("linear1_1", "up"), ("linear2", "down")):
        (weight,) = _ours_by_path("qwen3", f"{ours}/weight").values()
        np.testing.assert_array_equal(weight.T, tensors[f"{prefix}mlp.{theirs}_proj.weight"])
    for ours, theirs in (("scale_query", "q"), ("scale_key", "k")):
        (scale,) = _ours_by_path("qwen3", f"{ours}/norm/scale").values()
        half = facts.per_head_dim // 2
        norm = tensors[f"{prefix}self_attn.{theirs}_norm.weight"]
        np.testing.assert_array_equal(scale[0::2], norm[:half])
        np.testing.assert_array_equal(scale[1::2], norm[half:])


@pytest.mark.parametrize("name", [*NAMES, *OUR_MODELS])
def test_rules_make_all_parameters_from_all_tensors(name):
    if name in OUR_MODELS:
        model, _, config, tensors = export(name)
        rules = tensor_rules(OUR_MODELS[name](), config)
    else:
        model, tensors = instantiate(hf.model_config(read_config(name), remat=False)), read_tensors(name)
        rules = _rules(name)
    specs = model.create_parameter_specs_recursively()
    assert parameter_shapes(rules) == {path: tuple(spec.shape) for path, spec in flatten_items(specs)}
    assert check_tensor_names(rules, {x: tensor.shape for x, tensor in tensors.items()}) == {}
    assert sorted(x for rule in rules for x in rule.hf_shapes) == sorted(tensors)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_types_and_bits_survive_both_ways(dtype):
    rng = np.random.default_rng(0)
    for rule in _rules("llama-bias"):
        tensors = {name: rng.normal(size=shape).astype(dtype) for name, shape in rule.hf_shapes.items()}
        ours = rule.to_ours(tensors)
        assert (ours.shape, ours.dtype, ours.flags.c_contiguous) == (rule.shape, np.dtype(dtype), True)
        back = rule.to_hf(ours)
        assert {name: array.shape for name, array in back.items()} == dict(rule.hf_shapes)
        for name, array in back.items():
            assert array.flags.c_contiguous
            assert array.tobytes() == tensors[name].tobytes()


def test_all_kinds_of_projections_hold_the_same_heads():
    """As one weight with all heads, as three weights, and as a stack of three."""
    config = read_config("qwen2") | {"num_key_value_heads": 4}
    rng = np.random.default_rng(0)
    tensors, parts = {}, {}
    for projection in (FusedGroupedQKVLinear, GroupedQKVLinear, QKVLinear, FusedQKVLinear):
        cfg = hf.model_config(config, remat=False)
        attention = cfg.decoder.transformer.layer.self_attention.attention
        attention.input_linear.input_linear = projection.default_config()
        if "num_kv_heads" in attention.input_linear.input_linear:
            attention.input_linear.input_linear.num_kv_heads = 4
        rules = tensor_rules(cfg, config)
        if not tensors:
            tensors = {x: rng.normal(size=shape) for rule in rules for x, shape in rule.hf_shapes.items()}
        found = {rule.path: rule.to_ours(tensors) for rule in rules if rule.layer == 1}
        parts[projection] = {
            path.rpartition("/i_proj/i_proj/")[2]: x for path, x in found.items() if "/i_proj/" in path
        }
        specs = instantiate(cfg).create_parameter_specs_recursively()
        assert parameter_shapes(rules) == {path: tuple(spec.shape) for path, spec in flatten_items(specs)}
    for param in ("weight", "bias"):
        one = np.split(parts[FusedGroupedQKVLinear][f"qkv_proj/{param}"], 3, axis=-2)
        stack = parts[FusedQKVLinear][f"qkv_proj/{param}"]
        for i, name in enumerate("qkv"):
            for other in (GroupedQKVLinear, QKVLinear):
                np.testing.assert_array_equal(parts[other][f"{name}_proj/{param}"], one[i])
            np.testing.assert_array_equal(stack[i], one[i])


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_as_many_parameters_as_their_cards_say(name):
    config, num_params = PUBLISHED[name]
    rules = tensor_rules(hf.model_config(config), config)
    assert sum(math.prod(shape) for rule in rules for shape in rule.hf_shapes.values()) == num_params
    assert sum(math.prod(shape) for shape in parameter_shapes(rules).values()) == num_params


def test_configs_of_different_models_are_refused():
    config = read_config("llama2")
    with pytest.raises(
        ValueError, match=r"model: num_layers=3\.\n  Expected 2, as in config.json\. The config"
    ):
        tensor_rules(hf.model_config(config | {"num_hidden_layers": 3}), config)


def _shapes(name: str) -> dict[str, tuple[int, ...]]:
    return {key: tensor.shape for key, tensor in read_tensors(name).items()}


def test_tensors_that_are_not_needed_are_named_with_the_reason():
    shapes = _shapes("llama3")
    extra = {
        "lm_head.weight": shapes["model.embed_tokens.weight"],
        "model.layers.1.self_attn.rotary_emb.inv_freq": (4,),
        "model.rotary_emb.inv_freq": (4,),
    }
    frequencies = "the frequencies of rotary positions follow from config.json"
    assert check_tensor_names(_rules("llama3"), shapes | extra) == {
        "lm_head.weight": "the head is tied to the token embedding",
        "model.layers.1.self_attn.rotary_emb.inv_freq": frequencies,
        "model.rotary_emb.inv_freq": frequencies,
    }


def test_missing_unknown_and_misshapen_tensors_are_named(golden):
    messages = []

    def check(title, name, *, drop=(), **changes):
        shapes = {key: value for key, value in _shapes(name).items() if key not in drop}
        with pytest.raises(ValueError) as caught:
            check_tensor_names(
                _rules(name), shapes | {key.replace("__", "."): v for key, v in changes.items()}
            )
        messages.extend([f"# {title}", str(caught.value), ""])

    check("one missing", "llama2", drop=["model.norm.weight"])
    check("one unknown", "llama2", **{"model.layers.0.self_attn.q_proj.bias": (32,)})
    check("one of another shape", "llama2", **{"model.embed_tokens.weight": (100, 32)})
    check(
        "two misspelt, one of another shape",
        "llama2",
        drop=["model.norm.weight", "lm_head.weight"],
        **{
            "model.norm.wieght": (32,),
            "lm_head.wieght": (96, 32),
            "model.layers.0.mlp.up_proj.weight": (32, 40),
        },
    )
    check("the head of another vocabulary", "llama3", **{"lm_head.weight": (100, 32)})
    check(
        "a layer too many",
        "qwen3",
        **{f"model.layers.2.mlp.{x}_proj.weight": (40, 32) for x in ("up", "gate")},
    )
    check("nothing there", "qwen3-tied", drop=list(_shapes("qwen3-tied")))
    golden("errors/hf/tensors.txt", "\n".join(messages))
