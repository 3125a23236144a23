"""The modifier that turns float8 on: what it changes, and what it refuses."""

import pytest

from axlearn.common.config import config_for_function
from axlearn.common.layers import Linear, for_each_config
from axlearn.common.learner import CompositeLearner, Learner
from axlearn.common.optimizers import adamw_optimizer
from axlearn.common.pipeline import Pipeline
from axlearn.common.quantized_dot_general import (
    DenseGeneralBaseLayer,
    DotGeneralQuantizationType,
    QuantizedDotGeneral,
)
from axlearn.common.trainer_config_modifier import FP8ConfigModifier
from axlearn.common.update_transformation import OverrideInplaceUpdateTransformation
from axlearn.experiments.text.gpt import fuji_tiny
from tests.common.trainer.tiny_recipe import trainer_config as bigram_config

_RULES = [
    ".*/input_scale",
    ".*/kernel_scale",
    ".*/output_grad_scale",
    ".*/input_amax_history",
    ".*/kernel_amax_history",
    ".*/output_grad_amax_history",
]


def _modifier() -> FP8ConfigModifier.Config:
    return FP8ConfigModifier.default_config().set(fp8_amax_history_length=128)


def _dense_layers(cfg) -> list[DenseGeneralBaseLayer.Config]:
    found = []
    for_each_config(cfg, lambda x: found.append(x) if isinstance(x, DenseGeneralBaseLayer.Config) else None)
    return found


def test_it_prints_as_the_golden_files_do():
    assert str(_modifier()) == (
        "fp8_amax_history_length: 128\nklass: 'axlearn.common.trainer_config_modifier.FP8ConfigModifier'"
    )


def test_all_dense_layers_multiply_in_float8_and_the_optimizer_leaves_scales_alone():
    plain, cfg = fuji_tiny.trainer_config(), fuji_tiny.trainer_config()
    assert _modifier().instantiate()(cfg) is cfg
    layers = _dense_layers(cfg.model)
    # The projections of queries, keys and values, that of the context, and two in the feed-forward.
    assert len(layers) == 4
    for layer in layers:
        quantized = layer.quantized_dot_general
        assert quantized.klass is QuantizedDotGeneral
        assert quantized.quantization_type == DotGeneralQuantizationType.FP_8
        assert quantized.fp8_amax_history_length == 128
    optimizer = cfg.learner.optimizer
    assert isinstance(optimizer, OverrideInplaceUpdateTransformation.Config)
    assert optimizer.rules == _RULES
    assert str(optimizer.transformation) == str(plain.learner.optimizer)
    # Nothing else has changed.
    for layer in layers:
        layer.quantized_dot_general = None
    cfg.learner.optimizer = optimizer.transformation
    assert str(cfg) == str(plain)


def test_twice_is_once():
    once, twice = fuji_tiny.trainer_config(), fuji_tiny.trainer_config()
    modifier = _modifier().instantiate()
    modifier(once), modifier(modifier(twice))
    assert str(once) == str(twice)


def test_every_part_of_a_composite_learner_leaves_scales_alone():
    cfg = fuji_tiny.trainer_config()
    part = Learner.default_config().set(
        optimizer=config_for_function(adamw_optimizer).set(learning_rate=0.1, b1=0.9, b2=0.9, eps=1e-8)
    )
    cfg.learner = CompositeLearner.default_config().set(
        learners={"head": part, "rest": part}, rules=[(".*emb.*", "head"), (".*", "rest")]
    )
    _modifier().instantiate()(cfg)
    assert [x.optimizer.rules for x in cfg.learner.learners.values()] == [_RULES, _RULES]


def test_a_model_without_dense_layers_is_refused():
    with pytest.raises(ValueError, match="FP8ConfigModifier: model: there is no dense layer") as e:
        _modifier().instantiate()(bigram_config())
    assert "Take the modifier away" in str(e.value)


def test_a_learner_that_would_take_new_values_for_gradients_is_refused():
    cfg = fuji_tiny.trainer_config().set(dir="unused", evalers={}, mesh_shape=(1, 8, 1, 1, 1, 1))
    _modifier().instantiate()(cfg)
    cfg.learner.optimizer = cfg.learner.optimizer.transformation
    with pytest.raises(ValueError, match=r"learner.optimizer: the optimizer would change '.*_amax_history'"):
        cfg.instantiate(parent=None)


def test_a_pipeline_refuses_layers_in_float8():
    layer = Linear.default_config().set(input_dim=4, output_dim=4)
    layer.quantized_dot_general = QuantizedDotGeneral.default_config().set(
        quantization_type=DotGeneralQuantizationType.FP_8
    )
    cfg = Pipeline.default_config().set(name="pipeline", layer=layer, num_layers=2, num_microbatches=2)
    with pytest.raises(ValueError, match=r"pipeline\.layer: has products in float8"):
        cfg.instantiate(parent=None)
