"""Tests of axlearn.common.flash_attention.layer: its config, what it checks, and when it leaves kernels alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from axlearn.common.attention import GroupedQueryAttention, TransformerLayer
from axlearn.common.attention_bias import (
    CausalAttentionBias,
    SegmentIdAttentionBias,
    SlidingWindowAttentionBias,
)
from axlearn.common.attention_kernels import (
    Window,
    collect_attention_choices,
    describe_attention_choice,
)
from axlearn.common.config import config_class, config_for_function
from axlearn.common.flash_attention._biases import sort_bias
from axlearn.common.flash_attention.layer import FlashAttention, FlashBlockSizeModifier
from axlearn.common.layers import Dropout
from axlearn.common.module import Module, functional
from axlearn.experiments.text.gpt import fuji
from axlearn.experiments.text.gpt.common import flash_attention_config
from tests.common.attention.layer_configs import DIM, normal, random_params
from tests.common.attention.multihead_configs import _attention
from tests.common.flash_attention.kernel_cases import BATCH, CASES, build, forward_and_grads, inputs_of


def _config(cls=FlashAttention, **kwargs) -> GroupedQueryAttention.Config:
    return _attention(cls, causal=True, **kwargs)


def _dump(cfg) -> set[str]:
    return set(cfg.debug_string().splitlines())


def test_the_config_prints_the_lines_of_the_reference_dumps():
    """Those of fuji-test-v2-flash that fuji-test-v2 does not have."""
    found = _dump(flash_attention_config()) - _dump(GroupedQueryAttention.default_config().set(causal=True))
    batch = "('data', 'expert', 'fsdp')"
    assert sorted(found) == [
        "klass: 'axlearn.common.flash_attention.layer.FlashAttention'",
        f"mha_dim_to_partition_spec['bnts']: PartitionSpec({batch}, None, None, None)",
        f"mha_dim_to_partition_spec['bsnh']: PartitionSpec({batch}, None, ('seq', 'model'), None)",
        f"mha_dim_to_partition_spec['btnh']: PartitionSpec({batch}, None, ('seq', 'model'), None)",
        f"output_dim_to_partition_spec['bnts']: PartitionSpec({batch}, 'model', 'seq', None)",
        f"output_dim_to_partition_spec['btnh']: PartitionSpec({batch}, 'seq', 'model', None)",
        "tpu_block_size: 512",
    ]


def test_on_cpu_it_is_bit_for_bit_the_plain_layer():
    plain, flash = (_config(cls).instantiate(parent=None) for cls in (GroupedQueryAttention, FlashAttention))
    params, query = random_params(plain), normal(2, 8, DIM)
    expected, found = (
        functional(layer, None, params, {"query": query}, is_training=False)[0].data
        for layer in (plain, flash)
    )
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tpu_block_size": 100}, r"tpu_block_size=100.\n  Expected a multiple of 128"),
        ({"gpu_block_size": 48}, r"gpu_block_size=48.\n  Expected a power of 2, at least 16, or None"),
        (
            {"backend_overrides": {"splash_blok_q": 128}},
            r"backend_overrides: unknown key 'splash_blok_q'.\n.*Did you mean 'splash_block_q'",
        ),
        (
            {"mha_dim_to_partition_spec": {"btn": PartitionSpec()}},
            r"mha_dim_to_partition_spec: unknown key 'btn'.\n  Expected one of btnh, bsnh, bnts",
        ),
    ],
)
def test_a_value_that_cannot_be_is_refused_when_the_layer_is_built(fields, message):
    with pytest.raises(ValueError, match=message):
        _config(**fields).instantiate(parent=None)


def test_a_kernel_that_does_not_exist_is_refused_with_the_names_of_those_that_do():
    layer = _config(backend_overrides={"implementation": "tpu_splat"}).instantiate(parent=None)
    with pytest.raises(
        ValueError, match=r"'tpu_splat'.\n.*one of tpu_splash, .*, xla\. Did you mean 'tpu_splash'"
    ):
        functional(layer, None, random_params(layer), {"query": normal(1, 8, DIM)}, is_training=False)


def test_softmax_scale_is_a_factor_of_the_logits():
    half = _config(softmax_scale=0.5).instantiate(parent=None)
    plain = _config(GroupedQueryAttention).instantiate(parent=None)
    params, query = random_params(plain), normal(2, 8, DIM)
    found = functional(half, None, params, {"query": query}, is_training=False)[0].data
    params["i_proj"]["q_proj"] = jax.tree.map(lambda x: x * 0.5, params["i_proj"]["q_proj"])
    expected = functional(plain, None, params, {"query": query}, is_training=False)[0].data
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def _choice(layer, *, platform="tpu", is_training=False, method="forward", **inputs):
    with collect_attention_choices(platform=platform) as choices:
        jax.eval_shape(
            lambda params: functional(
                layer, jax.random.PRNGKey(0), params, inputs, method=method, is_training=is_training
            )[0],
            random_params(layer),
        )
    (choice,) = choices
    return choice


def _forward_choice(case="causal, packed", *, is_training=False, inputs=None, **fields):
    cfg = build(CASES[case], implementation="xla").config.clone(**{"backend_overrides": None} | fields)
    query = normal(BATCH, 256, 64)
    return _choice(cfg.instantiate(parent=None), is_training=is_training, query=query, **(inputs or {}))


def test_dropout_and_probabilities_are_left_to_the_plain_maths():
    dropout = Dropout.default_config().set(rate=0.1)
    assert _forward_choice(dropout=dropout).name == "tpu_splash"
    in_training = _forward_choice(dropout=dropout, is_training=True)
    assert in_training.name == "xla"
    assert dict(in_training.refused)["tpu_splash"] == "has no dropout, and the rate is 0.1"
    with_probs = _forward_choice(inputs={"return_aux": {"probs"}})
    assert dict(with_probs.refused)["tpu_flash"] == "does not have the probabilities that are asked for"


def test_probabilities_are_there_when_they_are_asked_for():
    layer = _config(backend_overrides={"implementation": "xla"}).instantiate(parent=None)
    inputs = {"query": normal(1, 4, DIM), "return_aux": {"probs"}}
    probs = functional(layer, None, random_params(layer), inputs, is_training=False)[0].probs
    np.testing.assert_allclose(probs.sum(-1), np.ones(probs.shape[:3]), rtol=1e-5)


def test_decoding_does_not_ask_kernels_whose_masks_count_from_zero():
    layer = build(CASES["causal, packed"], implementation="xla").config.clone(backend_overrides=None)
    layer = layer.instantiate(parent=None)
    states = layer.init_states(batch_size=2, max_len=256)
    choice = _choice(layer, method="extend_step", cached_states=states, query=normal(2, 128, 64))
    assert choice.task.explicit == ("CausalAttentionBias",)
    assert choice.name == "tpu_flash"


class EveryOther(CausalAttentionBias):
    """A causal mask that says by a method of its own that every other key is masked."""

    def bool_value(self):
        """See `BoolAttentionBias.bool_value`."""
        distance = self.target_positions[:, None, :, None] - self.source_positions[:, None, None, :]
        return super().bool_value() & (distance % 2 == 0)


class PaddingSeesNothing(SegmentIdAttentionBias):
    """Segments whose number 0 is padding."""

    def bool_value(self):
        """See `BoolAttentionBias.bool_value`."""
        return super().bool_value() & (self.segment_ids > 0)[:, None, :, None]


def _sees_the_next(target_positions, source_positions):
    return CausalAttentionBias(target_positions + 1, source_positions)


@pytest.mark.parametrize(
    ("mask", "name"),
    [
        (EveryOther.default_config(), "EveryOther"),
        (config_for_function(_sees_the_next), "CausalAttentionBias"),
    ],
)
def test_a_mask_that_computes_itself_or_moves_positions_is_not_taken_for_the_causal_one(mask, name):
    layer = _attention(FlashAttention, mask=mask).instantiate(parent=None)
    choice = _choice(layer, query=normal(2, 128, DIM))
    assert dict(choice.refused)["tpu_splash"] == f"takes no array of biases, as needed for {name}"
    assert choice.task.explicit == (name,)
    assert choice.task.window.is_full


def test_masks_of_several_orders_are_arrays_all_of_them():
    positions = jnp.arange(8)[None]

    def causal(num_chunks):
        return CausalAttentionBias(positions, positions, num_chunks=num_chunks)

    window = SlidingWindowAttentionBias(positions, positions, sliding_window_size=3, num_chunks=4)
    assert sort_bias(causal(4) + window)[:4] == (Window(3, 0), (), None, ())
    assert sort_bias(causal(4) + window).num_chunks == 4
    assert sort_bias(causal(1) + window).explicit == ("CausalAttentionBias", "SlidingWindowAttentionBias")
    assert sort_bias(causal(None) + window).explicit == ("CausalAttentionBias",)
    assert sort_bias(causal(None)).num_chunks == 1


def test_segments_that_compute_their_mask_themselves_are_not_taken_for_plain_ones():
    ids = jnp.ones([2, 8], jnp.int32)
    assert sort_bias(PaddingSeesNothing(ids, ids)).explicit == ("PaddingSeesNothing",)
    assert sort_bias(SegmentIdAttentionBias(ids, ids)).segments is not None


def test_a_choice_is_told_with_the_reasons_of_those_that_refused():
    text = describe_attention_choice(_forward_choice("causal, ALiBi, packed"))
    assert text == (
        "attention by tpu_flash on tpu: 256 queries, 256 keys and 4 heads of 16 (2 of keys) on a device, float32\n"
        "  not by tpu_splash: it takes no array of biases, as needed for ALiBiAttentionBias"
    )


def test_blocks_of_splash_attention_can_be_set_one_by_one():
    overrides = {"splash_block_q": 256, "splash_use_fused_bwd_kernel": True}
    choice = _forward_choice(backend_overrides=overrides)
    assert choice.task.splash_blocks == (("block_q", 256), ("use_fused_bwd_kernel", True))
    case = CASES["causal, packed"]
    layer = build(case, implementation="tpu_splash").config.clone(
        backend_overrides={"implementation": "tpu_splash", **overrides}
    )
    found = forward_and_grads(layer.instantiate(parent=None), inputs_of(case))
    expected = forward_and_grads(build(case), inputs_of(case))
    for actual, reference in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(actual, reference, atol=1e-4 * max(1.0, float(jnp.abs(reference).max())))


def test_the_modifier_sets_block_sizes_of_every_flash_attention_of_a_recipe():
    cfg = fuji.trainer_config(fuji.Variant(size="test", version="v2", flash=True))
    modifier = (
        FlashBlockSizeModifier.default_config().set(tpu_block_size=1024, gpu_block_size=64).instantiate()
    )
    attention = modifier(cfg).model.decoder.transformer.layer.self_attention.attention
    assert (attention.tpu_block_size, attention.gpu_block_size) == (1024, 64)


def test_the_modifier_leaves_attention_of_other_kinds_alone_and_says_so(caplog):
    cfg = fuji.trainer_config(fuji.Variant(size="test", version="v2", flash=False))
    before = cfg.debug_string()
    with caplog.at_level("WARNING"):
        after = FlashBlockSizeModifier.default_config().instantiate()(cfg).debug_string()
    assert after == before
    assert "FlashBlockSizeModifier: no attention layer of this config is a FlashAttention" in caplog.text


class _NoAttention(Module):
    @config_class
    class Config(Module.Config):
        """Has no attention."""


def test_the_modifier_refuses_a_config_without_attention():
    with pytest.raises(
        ValueError, match="FlashBlockSizeModifier: no attention layer in the config of _NoAttention"
    ):
        FlashBlockSizeModifier.default_config().instantiate()(_NoAttention.default_config())


def test_the_modifier_finds_attention_in_a_layer():
    cfg = TransformerLayer.default_config()
    cfg.self_attention.attention = FlashAttention.default_config()
    FlashBlockSizeModifier.default_config().set(tpu_block_size=256).instantiate()(cfg)
    assert cfg.self_attention.attention.tpu_block_size == 256
