"""The modifier that splits positions over devices: what it sets, and what it refuses."""

import pytest
from jax.sharding import PartitionSpec as P

from axlearn.common.attention import (
    GroupedQueryAttention,
    SigmoidAttention,
    TransformerAttentionLayer,
    TransformerFeedForwardLayer,
)
from axlearn.common.flash_attention.layer import FlashAttention
from axlearn.common.trainer import select_mesh_config
from axlearn.common.trainer_config_modifier import (
    ChainConfigModifier,
    ContextParallelMethod,
    ContextParallelModifier,
    MeshShapeModifier,
)
from axlearn.common.utils import HybridMeshShape, replace_layer_config_recursively
from axlearn.experiments.text.gpt import fuji_tiny
from axlearn.experiments.text.gpt.common import flash_attention_config, mesh_shape_from_axes

_BATCH = ("data", "expert", "fsdp")


def _recipe(**axes):
    return fuji_tiny.trainer_config().set(mesh_shape=mesh_shape_from_axes(**axes))


def _apply(cfg, **fields):
    return ContextParallelModifier.default_config().set(**fields).instantiate()(cfg)


def _attention(cfg):
    return cfg.model.decoder.transformer.layer.self_attention.attention


def _lines(cfg) -> set[str]:
    return set(cfg.debug_string().splitlines())


@pytest.mark.parametrize(("method", "key_seq"), [("ALL_GATHER", None), ("RING", "seq")])
def test_it_sets_attention_its_placement_and_the_order_and_nothing_else(method, key_seq):
    plain = _recipe(data=2, seq=4)
    cfg = _apply(plain.clone(), method=ContextParallelMethod[method])
    attention = _attention(cfg)
    queries = P(_BATCH, "seq", "model", None)
    assert attention.klass is FlashAttention
    assert attention.mha_dim_to_partition_spec == {
        "btnh": queries,
        "bsnh": P(_BATCH, key_seq, "model", None),
        "bnts": P(_BATCH, "model", "seq", key_seq),
    }
    assert attention.output_dim_to_partition_spec["btnh"] == queries
    assert cfg.model.decoder.num_seq_chunks == 8
    assert (cfg.model.batch_axis_names, cfg.model.seq_axis_names) == (_BATCH, "seq")
    changed = {line.split(":")[0] for line in _lines(cfg) ^ _lines(plain)}
    where = "model.decoder.transformer.layer.self_attention.attention"
    new_fields = ("klass", "tpu_block_size", "mha_dim_to_partition_spec", "output_dim_to_partition_spec")
    own = ("model.decoder.num_seq_chunks", "model.batch_axis_names", "model.seq_axis_names")
    unexpected = [
        path for path in changed if not path.startswith((*(f"{where}.{name}" for name in new_fields), *own))
    ]
    assert not unexpected


def test_flash_attention_keeps_what_it_has():
    cfg = _recipe(seq=2)
    replace_layer_config_recursively(
        cfg.model,
        target_cls=GroupedQueryAttention,
        source_config=flash_attention_config().set(tpu_block_size=1024),
    )
    assert _attention(_apply(cfg, num_chunks=1)).tpu_block_size == 1024
    assert cfg.model.decoder.num_seq_chunks is None
    assert _attention(cfg).mha_dim_to_partition_spec["btnh"] == P(_BATCH, "seq", "model", None)


@pytest.mark.parametrize(
    ("mesh_shape", "fields", "expected"),
    [
        (mesh_shape_from_axes(seq=4), {"num_chunks": 16}, 16),
        (mesh_shape_from_axes(seq=4), {"num_chunks": 1}, None),
        (mesh_shape_from_axes(data=-1), {}, None),
        (mesh_shape_from_axes(data=2, seq=-1), {"num_chunks": 4}, 4),
        (mesh_shape_from_axes(model=4), {"seq_axis": "model", "head_axis_names": "seq"}, 8),
        (HybridMeshShape(mesh_shape_from_axes(seq=2), mesh_shape_from_axes(seq=2)), {}, 8),
    ],
)
def test_the_order_is_that_of_the_mesh_unless_it_is_given(mesh_shape, fields, expected):
    cfg = _apply(fuji_tiny.trainer_config().set(mesh_shape=mesh_shape), **fields)
    assert cfg.model.decoder.num_seq_chunks == expected


def test_a_mesh_rule_sets_the_mesh_and_then_this():
    chain = ChainConfigModifier.default_config().set(
        config_modifiers=[
            MeshShapeModifier.default_config().set(mesh_shape=mesh_shape_from_axes(fsdp=-1, seq=8)),
            ContextParallelModifier.default_config().set(method=ContextParallelMethod.RING),
        ]
    )
    cfg = fuji_tiny.trainer_config().set(mesh_rules=[("tpu-.*", chain)])
    select_mesh_config(cfg, mesh_selector="tpu-v5p-128")
    assert cfg.model.decoder.num_seq_chunks == 16
    assert _attention(cfg).mha_dim_to_partition_spec["bsnh"] == P(_BATCH, "seq", "model", None)


def _with_sigmoid(cfg):
    attention = SigmoidAttention.default_config().set(seq_len=256, num_heads=4)
    cfg.model.decoder.transformer.layer.self_attention.attention = attention


def _with_cross_attention(cfg):
    cfg.model.decoder.transformer.layer.cross_attention = TransformerAttentionLayer.default_config()


def _without_attention(cfg):
    cfg.model.decoder.transformer.layer = TransformerFeedForwardLayer.default_config()


_SELF_ATTENTION = (
    "self-attention by axlearn.common.attention.MultiheadAttention or "
    "axlearn.common.attention.GroupedQueryAttention or axlearn.common.flash_attention.layer.FlashAttention"
)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (_with_sigmoid, "the model has axlearn.common.attention.SigmoidAttention"),
        (_with_cross_attention, "the model attends to another sequence (cross_attention)"),
        (_without_attention, "the model has no attention layer"),
    ],
)
def test_attention_that_it_cannot_split_is_refused(change, problem):
    cfg = _recipe(seq=2)
    change(cfg)
    with pytest.raises(ValueError) as e:
        _apply(cfg)
    assert str(e.value) == f"ContextParallelModifier: {problem}.\n  Expected {_SELF_ATTENTION}."


@pytest.mark.parametrize(
    ("axes", "fields", "message"),
    [
        (
            {"seq": -1},
            {},
            "ContextParallelModifier.num_chunks: None, and the mesh (1, 1, 1, 1, -1, 1) does not say how many devices "
            "'seq' has.\n  Expected a number of chunks, or a mesh that says so, set before this.",
        ),
        (
            {"seq": 4},
            {"num_chunks": 4},
            "ContextParallelModifier.num_chunks: 4 chunks for 4 devices along 'seq'.\n"
            "  Expected a multiple of 8, so that all have equal work, or 1.",
        ),
        (
            {"seq": 4},
            {"num_chunks": 3},
            "ContextParallelModifier.num_chunks: 3 chunks in head-tail order.\n  Expected an even number, twice the "
            "number of devices that split a row, or 1 for the order of the text.",
        ),
        (
            {},
            {"seq_axis": "context"},
            "ContextParallelModifier.seq_axis: the mesh has no axis 'context'.\n"
            "  Expected one of pipeline, data, expert, fsdp, seq, model.",
        ),
    ],
)
def test_orders_and_axes_that_cannot_be_are_refused(axes, fields, message):
    with pytest.raises(ValueError) as e:
        _apply(_recipe(**axes), **fields)
    assert str(e.value) == message
