"""Modifiers print what the reference's dumps show, change what they say, and refuse what they cannot change."""

from typing import Optional

import jax
import pytest

from axlearn.common.attention import (
    RepeatedTransformerLayer,
    StackedTransformerLayer,
    TransformerFeedForwardLayer,
)
from axlearn.common.base_layer import RematSpec
from axlearn.common.config import ConfigModifier, InvalidConfigValueError, config_class, config_for_function
from axlearn.common.gradient_accumulation import with_minibatch_steps
from axlearn.common.layers import LayerNorm, Linear, RMSNorm
from axlearn.common.metrics import MetricAccumulator
from axlearn.common.trainer import select_mesh_config
from axlearn.common.trainer_config_modifier import (
    ChainConfigModifier,
    GradientAccumulationModifier,
    MeshShapeModifier,
    ModuleConfigModifier,
    PartitionSpecModifier,
    RematSpecModifier,
    ReplaceLayerConfigModifier,
    ScanChunkModifier,
)
from axlearn.common.utils import HybridMeshShape, replace_layer_config_recursively
from axlearn.experiments.text.gpt import fuji_tiny

_LAYER = "model.decoder.transformer.layer"
_BATCH = ("data", "fsdp")


def _mesh(**axes: int) -> MeshShapeModifier.Config:
    names = ("pipeline", "data", "expert", "fsdp", "seq", "model")
    return MeshShapeModifier.default_config().set(mesh_shape=tuple(axes.get(name, 1) for name in names))


def _chain(*modifiers) -> ChainConfigModifier.Config:
    return ChainConfigModifier.default_config().set(config_modifiers=list(modifiers))


def _accumulation(steps: int) -> GradientAccumulationModifier.Config:
    return GradientAccumulationModifier.default_config().set(grad_acc_steps=steps)


def _remat(**fields) -> RematSpecModifier.Config:
    return RematSpecModifier.default_config().set(remat_policies={_LAYER: RematSpec(**fields)})


def _stacked() -> ModuleConfigModifier.Config:
    return ModuleConfigModifier.default_config().set(
        target_config="model.decoder.transformer", modification=StackedTransformerLayer.default_config()
    )


def _partition_specs() -> PartitionSpecModifier.Config:
    """Activations of norms split by sequence over "model" before, and whole after."""
    whole = (_BATCH, None, None)
    norm = {"input_partition_spec": (_BATCH, "model", None), "output_partition_spec": whole}
    return PartitionSpecModifier.default_config().set(
        partition_specs={
            "model.decoder.emb.token_emb": {
                "param_partition_spec": ("model", ("expert", "fsdp", "seq")),
                "input_partition_spec": (_BATCH, None),
                "output_partition_spec": whole,
                "embedding_partition_spec": ("model", None),
            },
            f"{_LAYER}.self_attention.norm": norm,
            f"{_LAYER}.feed_forward.norm": norm,
            "model.decoder.output_norm": norm,
            f"{_LAYER}.feed_forward.linear2": {"output_partition_spec": whole},
        }
    )


def _rules() -> list:
    """Some of the mesh rules of fuji-7B-v2-flash; None where a rule needs what is not built yet."""
    rules = [(f"rule {i}", None) for i in range(10)]
    rules[3] = (
        "tpu-v5litepod-256-4",
        _chain(
            _mesh(data=-1, fsdp=256),
            _remat(prevent_cse=False, policy=jax.checkpoint_policies.dots_saveable),
        ),
    )
    rules[9] = (
        "neuron-(trn2|trn2n).48xlarge-64",
        _chain(_mesh(fsdp=-1, model=4), _stacked(), _partition_specs()),
    )
    return rules


def _dump_lines(text: str, rule: int) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(f"mesh_rules[{rule}]")]


def test_rules_print_as_the_reference_prints_them(golden, shared_dir):
    cfg = fuji_tiny.trainer_config().set(mesh_rules=_rules())
    text = cfg.debug_string()
    ours = [line for rule in (3, 9) for line in _dump_lines(text, rule)]
    golden("fuji-7B-v2-flash.mesh_rules.txt", "\n".join(ours) + "\n")
    if shared_dir is not None:
        (path,) = shared_dir.glob("golden/*/fuji-7B-v2-flash.txt")
        dump = path.read_text(encoding="utf-8")
        assert ours == [line for rule in (3, 9) for line in _dump_lines(dump, rule)]


def test_accumulation_prints_as_the_reference_prints_it():
    assert _chain(_mesh(data=-1, fsdp=256), _accumulation(4)).debug_string().splitlines()[-4:] == [
        "config_modifiers[1].grad_acc_steps: 4",
        "config_modifiers[1].klass: 'axlearn.common.trainer_config_modifier.GradientAccumulationModifier'",
        "config_modifiers[1].metric_accumulator.klass: 'axlearn.common.metrics.MetricAccumulator'",
        "klass: 'axlearn.common.trainer_config_modifier.ChainConfigModifier'",
    ]


def test_a_mesh_rule_applies_a_chain_in_order():
    cfg = fuji_tiny.trainer_config()
    policy = jax.checkpoint_policies.dots_saveable
    cfg.mesh_rules = [
        ("gpu-.*", (1, -1, 1, 1, 1, 1)),
        (
            "tpu-.*",
            _chain(
                _mesh(fsdp=8),
                _remat(prevent_cse=False, policy=policy),
                _accumulation(4),
                _mesh(data=2, fsdp=4),
            ),
        ),
    ]
    select_mesh_config(cfg, mesh_selector="tpu-v5p-8")
    assert cfg.mesh_shape == (1, 2, 1, 4, 1, 1)
    assert cfg.model.decoder.transformer.layer.remat_spec == RematSpec(prevent_cse=False, policy=policy)
    assert cfg.learner.forward_fn_transformation == config_for_function(with_minibatch_steps).set(
        steps=4, metric_accumulator=MetricAccumulator.default_config()
    )


def test_a_mesh_may_span_slices():
    shape = HybridMeshShape(ici_mesh_shape=(1, -1, 1, 1, 1, 8), dcn_mesh_shape=(2, -1, 1, 1, 1, 1))
    cfg = fuji_tiny.trainer_config()
    MeshShapeModifier.default_config().set(mesh_shape=shape).instantiate()(cfg)
    assert cfg.mesh_shape == shape


def test_accumulation_replaces_an_accumulation_and_nothing_else():
    cfg = fuji_tiny.trainer_config()
    for steps in (4, 2, 1):
        assert _accumulation(steps).instantiate()(cfg) is cfg
        assert cfg.learner.forward_fn_transformation.steps == steps
    cfg.learner.forward_fn_transformation = config_for_function(_identity)
    with pytest.raises(ValueError, match="another transformation is set, which would be lost"):
        _accumulation(2).instantiate()(cfg)
    with pytest.raises(ValueError, match="0 is not a number of micro-batches"):
        _accumulation(0).instantiate()


def _identity():
    return lambda fn: fn


def test_a_module_is_replaced_with_the_values_that_it_had():
    cfg = fuji_tiny.trainer_config()
    old = cfg.model.decoder.transformer.clone()
    assert isinstance(old, RepeatedTransformerLayer.Config)
    _stacked().instantiate()(cfg)
    new = cfg.model.decoder.transformer
    assert new.klass is StackedTransformerLayer
    assert new.num_layers == 3
    assert new.layer == old.layer


def test_layers_of_a_class_are_replaced_wherever_they_are():
    cfg = fuji_tiny.trainer_config()
    norm = LayerNorm.default_config().set(eps=1e-3)
    modifier = ReplaceLayerConfigModifier.default_config().set(target_cls=RMSNorm, source_config=norm)
    cfg.mesh_rules = [("cpu", modifier)]
    select_mesh_config(cfg, mesh_selector="cpu")
    layer = cfg.model.decoder.transformer.layer
    norms = (cfg.model.decoder.output_norm, layer.self_attention.norm, layer.feed_forward.norm)
    assert [(new.klass, new.eps) for new in norms] == [(LayerNorm, 1e-5)] * 3
    # The rule itself is not searched.
    assert cfg.mesh_rules[0][1] == modifier
    modifier.set(target_cls=LayerNorm, exclude_keys=["eps"]).instantiate()(cfg)
    assert cfg.model.decoder.output_norm.eps == 1e-3


class _NamedNorm(RMSNorm):
    """A norm whose `eps` is of another type."""

    @config_class
    class Config(RMSNorm.Config):
        """Configures _NamedNorm."""

        eps: Optional[str] = None


def test_rules_survive_layers_that_cannot_be_replaced():
    cfg = fuji_tiny.trainer_config()
    cfg.mesh_rules = [("cpu", (1, 1, 1, -1, 1, 1))]
    modifier = ReplaceLayerConfigModifier.default_config().set(
        target_cls=RMSNorm, source_config=_NamedNorm.default_config()
    )
    with pytest.raises(InvalidConfigValueError, match="eps"):
        modifier.instantiate()(cfg)
    assert [pattern for pattern, _ in cfg.mesh_rules] == ["cpu"]


def test_layers_inside_of_containers_are_replaced_and_counted():
    cfg = StackedTransformerLayer.default_config()
    cfg.layer = [cfg.layer.clone(), cfg.layer.clone()]
    new = Linear.default_config().set(bias=False, output_dim=7)
    count = replace_layer_config_recursively(
        cfg, target_cls=Linear, source_config=new, exclude_keys=["bias", "output_dim"]
    )
    assert count == 4
    linears = [
        linear for layer in cfg.layer for linear in (layer.feed_forward.linear1, layer.feed_forward.linear2)
    ]
    assert [(linear.bias, linear.output_dim) for linear in linears] == [(False, 7)] * 4
    # What the old ones said otherwise is kept.
    assert (
        linears[0].param_partition_spec
        == TransformerFeedForwardLayer.default_config().linear1.param_partition_spec
    )


def test_the_root_cannot_be_replaced_and_excluded_fields_must_be_there():
    cfg = Linear.default_config()
    with pytest.raises(ValueError, match="the config to search is itself"):
        replace_layer_config_recursively(cfg, target_cls=Linear, source_config=cfg)
    with pytest.raises(ValueError, match="has no field 'bais'"):
        replace_layer_config_recursively(
            RepeatedTransformerLayer.default_config(),
            target_cls=Linear,
            source_config=cfg,
            exclude_keys=["bais"],
        )


@pytest.mark.parametrize(
    ("modifier", "message"),
    [
        (
            RematSpecModifier.default_config().set(
                remat_policies={"model.decoder.transfomer.layer": RematSpec()}
            ),
            "RematSpecModifier.remat_policies: model.decoder: there is no 'transfomer'.\n"
            "  Did you mean 'model.decoder.transformer'?",
        ),
        (
            RematSpecModifier.default_config().set(remat_policies={"learner.optimizer": RematSpec()}),
            "RematSpecModifier.remat_policies: ",
        ),
        (
            RematSpecModifier.default_config().set(remat_policies={"max_step": RematSpec()}),
            "RematSpecModifier.remat_policies: max_step: 500 is no config.",
        ),
        (
            PartitionSpecModifier.default_config().set(
                partition_specs={_LAYER + ".feed_forward.linear1": {"param_partition_specs": None}}
            ),
            f"PartitionSpecModifier.partition_specs: {_LAYER}.feed_forward.linear1: ",
        ),
        (_stacked().set(target_config="model.decoder.transformr"), "ModuleConfigModifier.target_config: "),
        (
            ReplaceLayerConfigModifier.default_config().set(
                target_cls=LayerNorm, source_config=RMSNorm.default_config()
            ),
            "ReplaceLayerConfigModifier.target_cls: the config has no axlearn.common.layers.LayerNorm.",
        ),
    ],
)
def test_what_leads_nowhere_is_an_error_that_names_the_nearest(modifier, message):
    cfg = fuji_tiny.trainer_config()
    before = cfg.clone()
    with pytest.raises(ValueError) as e:
        modifier.instantiate()(cfg)
    assert str(e.value).startswith(message)
    assert cfg == before


class _Renaming(ConfigModifier):
    """A modifier that is not ours."""

    @config_class
    class Config(ConfigModifier.Config):
        title: str = "renamed"

    def __call__(self, cfg):
        return cfg.set(name=self.config.title)


def test_a_chain_takes_modifiers_of_others():
    cfg = fuji_tiny.trainer_config()
    assert _chain(_Renaming.default_config(), _accumulation(2)).instantiate()(cfg).name == "renamed"


def test_the_loss_in_chunks_is_set_and_only_where_a_model_knows_it():
    cfg = fuji_tiny.trainer_config()
    modifier = ScanChunkModifier.default_config().set(scan_chunk=64).instantiate()
    assert modifier(cfg).model.scan_chunk == 64
    cfg.model = cfg.model.decoder
    with pytest.raises(ValueError, match=r"(?s)ScanChunkModifier.*: model: .*unknown field 'scan_chunk'"):
        modifier(cfg)
