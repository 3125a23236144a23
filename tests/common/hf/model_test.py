"""Reading our models: what does not matter is passed over, what no family can express is refused by name."""

import jax.numpy as jnp
import pytest

from axlearn.common.attention import (
    ALiBiAttentionLogitBiasLayer,
    CausalAttentionLogitBiasLayer,
    FusedGroupedQKVLinear,
    MultiheadAttention,
    ScaleKey,
    ScaleQuery,
    StackedTransformerLayer,
    constant_scale_fn,
)
from axlearn.common.attention_bias import (
    CausalAttentionBias,
    LeftRightWindowAttentionBias,
    SlidingWindowAttentionBias,
)
from axlearn.common.config import config_for_function, with_same_fields
from axlearn.common.hf import Family, facts_from_model, hf_config_from_model
from axlearn.common.layers import Embedding, LayerNorm, set_dropout_rate_recursively
from axlearn.common.logit_modifiers import scale_by
from axlearn.experiments.text.gpt import common, fuji_tiny, hf
from tests.parity.hf_models import read_config


def _model():
    return fuji_tiny.trainer_config().model


def _attention(model):
    return model.decoder.transformer.layer.self_attention.attention


def test_what_leaves_the_numbers_alone_is_passed_over():
    model = _model()
    facts = facts_from_model(model)
    model.set(batch_axis_names=("data",), scan_chunk=8, dtype=jnp.bfloat16, param_init=None)
    model.decoder.set(
        logits_partition_spec=None, pad_token_id=3, eos_token_id=5, name="decoder", num_seq_chunks=4
    )
    model.decoder.output_norm.forward_dtype = jnp.float32
    set_dropout_rate_recursively(model, 0.1)
    _attention(model).set(kv_cache=None, param_partition_spec=("model",), num_seq_chunks=4)
    model.decoder.transformer.layer.feed_forward.hidden_dim = 512
    assert facts_from_model(model) == facts


def test_flash_attention_is_the_same_maths():
    model = _model()
    facts = facts_from_model(model)
    block = model.decoder.transformer.layer.self_attention
    flash = common.flash_attention_config().set(
        tpu_block_size=1024, backend_overrides={"implementation": "xla"}
    )
    block.attention = with_same_fields(flash, old=block.attention)
    assert facts_from_model(model) == facts
    block.attention.softmax_scale = 0.5
    with pytest.raises(ValueError, match="softmax_scale"):
        facts_from_model(model)


def test_masks_and_scales_may_be_written_in_several_ways():
    model = _model()
    facts = facts_from_model(model)
    _attention(model).set(causal=None, mask=CausalAttentionBias.default_config())
    assert facts_from_model(model) == facts
    _attention(model).mask = None
    for mask in (CausalAttentionBias, CausalAttentionLogitBiasLayer):
        model.decoder.attention_mask = mask.default_config()
        assert facts_from_model(model) == facts
    # The factor in front of the rotation rather than behind it.
    one = config_for_function(constant_scale_fn).set(value=1)
    _attention(model).input_linear.query_scale = ScaleQuery.default_config()
    _attention(model).query_scale.scale_factor = one
    assert facts_from_model(model) == facts


def _set(path, value):
    """Makes a function that sets one field of a model."""

    def change(model):
        *parents, name = path.split(".")
        for parent in parents:
            model = getattr(model, parent)
        model.set(**{name: value})

    return change


_LAYER = "decoder.transformer.layer"
_ATTENTION = f"{_LAYER}.self_attention.attention"


def _norm_of_queries_only(model):
    norm = model.decoder.output_norm
    _attention(model).input_linear.query_scale = ScaleQuery.default_config().set(
        norm=norm, scale_factor=config_for_function(constant_scale_fn).set(value=1)
    )


def _norms_behind_the_rotation(model):
    for name, scale in (("query_scale", ScaleQuery), ("key_scale", ScaleKey)):
        _attention(model).set(**{name: scale.default_config().set(norm=model.decoder.output_norm)})


def _without_rotation(model):
    _attention(model).input_linear = FusedGroupedQKVLinear.default_config().set(num_kv_heads=2)


def _layers_that_differ(model):
    layers = [model.decoder.transformer.layer.clone() for _ in range(2)]
    layers[1].feed_forward.hidden_dim = 100
    model.decoder.transformer = StackedTransformerLayer.default_config().set(num_layers=2, layer=layers)


def _window_of_one_layer(model):
    layers = [model.decoder.transformer.layer.clone() for _ in range(2)]
    layers[1].self_attention.attention.set(
        causal=None, mask=SlidingWindowAttentionBias.default_config(sliding_window_size=7)
    )
    model.decoder.transformer = StackedTransformerLayer.default_config().set(num_layers=2, layer=layers)


def _some_biases(model):
    model.decoder.transformer.layer.feed_forward.linear1.bias = True


def _only_output_bias(model):
    _attention(model).output_linear.bias = True


REFUSED = {
    "a soft cap": _set(f"{_ATTENTION}.atten_logit_cap", 50.0),
    "a sink": _set(f"{_ATTENTION}.logit_sink", True),
    "post-norm": _set(f"{_LAYER}.self_attention.structure", "postnorm"),
    "half a residual": _set(f"{_LAYER}.feed_forward.residual_weight", 0.5),
    "another activation": _set(f"{_LAYER}.feed_forward.activation", ("nn.gelu", "linear")),
    "no gate": _set(f"{_LAYER}.feed_forward.activation", "nn.silu"),
    "rotated values": _set(f"{_ATTENTION}.input_linear.rotary_value", True),
    "partial rotation": _set(f"{_ATTENTION}.input_linear.partial_rope_factor", 0.5),
    "no rotation": _without_rotation,
    "layer norm": _set("decoder.output_norm", LayerNorm.default_config()),
    "no norm at the end": _set("decoder.output_norm", None),
    "another eps": _set("decoder.output_norm.eps", 1e-3),
    "learned positions": _set("decoder.emb.pos_emb", Embedding.default_config().set(num_embeddings=8)),
    "scaled logits": _set(
        "decoder.output_logits_modifier", config_for_function(scale_by).set(temperature=2.0)
    ),
    "another attention": _set(_ATTENTION, type("Mine", (MultiheadAttention,), {}).default_config()),
    "another scale": _set(
        f"{_ATTENTION}.query_scale.scale_factor", config_for_function(constant_scale_fn).set(value=0.5)
    ),
    "a norm of queries only": _norm_of_queries_only,
    "norms behind the rotation": _norms_behind_the_rotation,
    "a mask that sees the future": lambda model: _attention(model).set(
        causal=None, mask=LeftRightWindowAttentionBias.default_config(left_size=3, right_size=1)
    ),
    "a bias of all layers": _set(
        "decoder.attention_mask", ALiBiAttentionLogitBiasLayer.default_config().set(num_heads=4)
    ),
    "no mask": _set(f"{_ATTENTION}.causal", False),
    "layers that differ": _layers_that_differ,
    "some feed-forward biases": _some_biases,
    "only an output bias": _only_output_bias,
    "windows without QK-norm and biases, in one layer": _window_of_one_layer,
}


def test_what_no_family_can_express_is_refused_by_name(golden):
    lines = []
    for title, change in REFUSED.items():
        model = _model()
        change(model)
        with pytest.raises(ValueError) as caught:
            hf_config_from_model(model, max_position_embeddings=64)
        lines += [f"# {title}", str(caught.value), ""]
    golden("errors/hf/model.txt", "\n".join(lines))


def test_a_family_that_is_asked_for_must_be_able_to_express_the_model():
    with pytest.raises(ValueError, match=r"not qwen2 .a norm in input_linear.query_scale; input"):
        hf_config_from_model(
            hf.model_config(read_config("qwen3")), max_position_embeddings=64, family=Family.QWEN2
        )
