"""The models of gala and honeycrisp, put together from our layers, print the lines of the reference's dumps."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axlearn.common.attention import (
    ALiBiAttentionLogitBiasLayer,
    FusedGroupedQKVLinear,
    FusedQKVLinear,
    GroupedQueryAttention,
    MultiheadAttention,
    RoFormerQKVLinear,
)
from axlearn.common.base_layer import BaseLayer
from axlearn.common.causal_lm import Model
from axlearn.common.kv_cache.kv_cache import KVCache
from axlearn.common.module import functional
from axlearn.common.summary import is_summary
from axlearn.common.utils import flatten_items
from axlearn.experiments.text.gpt import common
from tests.fixtures_reference import numpy_params


def _model(*, attention: MultiheadAttention.Config, dim: int, ffn_multiple: int, **kwargs) -> Model.Config:
    norm = common.rms_norm_config()
    attention.set(causal=True, kv_cache=KVCache.default_config().set(cache_dtype=jnp.bfloat16))
    attention.query_scale.norm = attention.key_scale.norm = norm
    layer = common.layer_config(
        attention=attention,
        feed_forward_dim=common.scaled_hidden_dim(scale=8 / 3, round_up_to_multiples_of=ffn_multiple),
        norm=norm,
    )
    return common.model_config(dim=dim, layer=layer, norm=norm, **kwargs)


def _rotary(input_linear, theta: float) -> RoFormerQKVLinear.Config:
    cfg = RoFormerQKVLinear.default_config().set(input_linear=input_linear, rotary_value=False)
    cfg.rope_pos_emb_layer.theta = theta
    return cfg


_TEST_SIZE = {"dim": 8, "ffn_multiple": 16, "vocab_size": 32, "num_layers": 4}


def _gala_test() -> Model.Config:
    attention = MultiheadAttention.default_config().set(
        num_heads=4, input_linear=_rotary(FusedQKVLinear.default_config(), 1e4)
    )
    return _model(attention=attention, **_TEST_SIZE)


def _honeycrisp_test() -> Model.Config:
    input_linear = FusedGroupedQKVLinear.default_config().set(num_kv_heads=2)
    attention = GroupedQueryAttention.default_config().set(
        num_heads=4, input_linear=_rotary(input_linear, 5e5)
    )
    cfg = _model(attention=attention, **_TEST_SIZE)
    cfg.decoder.emb.token_emb.param_partition_spec = (common.WEIGHT_AXIS_NAMES, "model")
    cfg.decoder.transformer.layer.feed_forward.set(
        add_dead_neuron_summary=True, add_value_rms_norm_summary=["linear2_outputs"]
    )
    cfg.metrics.metrics["lm"].z_loss_scale = 1e-6
    return cfg


def _gala_7b_alibi() -> Model.Config:
    attention = MultiheadAttention.default_config().set(
        num_heads=32, input_linear=FusedQKVLinear.default_config()
    )
    cfg = _model(attention=attention, dim=4096, ffn_multiple=256, vocab_size=32768, num_layers=32)
    cfg.decoder.attention_mask = ALiBiAttentionLogitBiasLayer.default_config().set(num_heads=32)
    layer = cfg.decoder.transformer.layer
    layer.self_attention.structure = layer.feed_forward.structure = "hybridnorm"
    return cfg


# What the dump says of the kernel for attention, of which the model's numbers do not depend.
_KERNEL_FIELDS = ("mha_dim_to_partition_spec", "output_dim_to_partition_spec", "tpu_block_size")
_ATTENTION = "model.decoder.transformer.layer.self_attention.attention."


def _without_kernel(lines: list[str]) -> list[str]:
    prefixes = tuple(f"{_ATTENTION}{name}" for name in (*_KERNEL_FIELDS, "klass:"))
    return [line for line in lines if not line.startswith(prefixes)]


# Makes the config; the SHA-256 of the reference's lines, which ties them to it where its text is not at hand; and
# that of the whole `_init` file.
_MODELS = {
    "gala-test-sp-rp": (
        _gala_test,
        "bce027763b686be933a1eb19496447aa1f84e52f4e54b85a84ca337cd90151a9",
        "3cefd36b9db7274d2a08282c7e46a30a87bff19f921c756fe127a66f6ffbf583",
    ),
    "honeycrisp-test-sp-rp": (
        _honeycrisp_test,
        "bf57bce102f546c544dd7e45a5af51e22ddf5cd0988a3f081af6dc0545b51141",
        "7dfb6b13ef3633509a0ba263748651d575fe6401683c72f33f62a08ed58680b3",
    ),
    "gala-7B-hybridnorm-alibi-flash-sp-rp": (
        _gala_7b_alibi,
        "13f120e6e8f97668af6458c91a634ebc7413ea4e7fef1190869151c1332a6767",
        "df8a9a010fdbe7709939e25956e78595340ea860d3dfe3415bca901ba9e34679",
    ),
}


@pytest.mark.parametrize("name", _MODELS)
def test_the_model_prints_as_in_the_reference_dump(name, shared_dir):
    make, expected_sum, _ = _MODELS[name]
    cfg = make()
    lines = [f"model.{line}" for line in cfg.debug_string().split("\n")]
    if "flash" in name:
        lines = _without_kernel(lines)
    if shared_dir is not None:
        text = (
            shared_dir / "golden" / "axlearn.experiments.text.gpt.pajama_trainer" / f"{name}.txt"
        ).read_text()
        expected = [line for line in text.split("\n") if line.startswith("model.")]
        assert lines == (_without_kernel(expected) if "flash" in name else expected)
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == expected_sum


def _init_lines(layer: BaseLayer, prefix: str = "") -> list[str]:
    """One line a parameter, in the order of the module tree, as the reference's `_init` files print them."""
    lines = []
    for name, spec in layer._complete_layer_parameter_specs().items():
        initializer = spec.initializer or layer.param_init()
        text = initializer.debug_string(name=name, shape=spec.shape, axes=spec.fan_axes)
        lines.append(f"{prefix}{name}: {text}")
    for name, child in layer._child_layers().items():
        lines += _init_lines(child, f"{prefix}{name}/")
    return lines


@pytest.mark.parametrize("name", _MODELS)
def test_parameters_are_those_of_the_reference(name):
    make, _, init_sum = _MODELS[name]
    model = make().set(name="model").instantiate(parent=None)
    assert hashlib.sha256("\n".join(_init_lines(model)).encode()).hexdigest() == init_sum


def test_honeycrisp_reports_dead_neurons_and_the_size_of_what_its_layers_add():
    model = _honeycrisp_test().set(name="model").instantiate(parent=None)
    ids = np.random.default_rng(0).integers(0, 32, size=[2, 8])
    batch = {"input_ids": jnp.asarray(ids), "target_labels": jnp.asarray(np.roll(ids, -1, axis=1))}

    def loss(params):
        (value, _), collection = functional(model, None, params, {"input_batch": batch}, is_training=True)
        return value, collection.summaries

    # Its layers run in a loop and are rematerialised: summaries find their way out of both.
    params = numpy_params(model)
    (_, summaries), _ = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    found = dict(flatten_items(summaries, is_leaf=is_summary))
    for i in range(4):
        prefix = f"decoder/transformer/repeat/layer{i}/feed_forward"
        assert 0 <= found[f"{prefix}/dead_neurons"].value() < 1
        assert found[f"{prefix}/linear2_outputs/rms_norm"].value() > 0
