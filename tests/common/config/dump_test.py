"""The dump, line by line, against lines of the reference dumps."""

import dataclasses
import enum
from typing import Any, NamedTuple, Optional

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from axlearn.common.config import (
    REQUIRED,
    ConfigBase,
    ConfigOr,
    Configurable,
    InstantiableConfig,
    Required,
    config_class,
    config_for_class,
    config_for_function,
    register_formatter,
)


def _in_module(module, *objects):
    """Gives test classes and functions the modules whose names the reference dumps print."""
    for obj in objects:
        obj.__module__ = module


@dataclasses.dataclass
class RematSpec:
    prevent_cse: bool = True
    policy: Optional[ConfigOr[Any]] = None
    note: str = dataclasses.field(default="hidden", metadata={"skip_serialization": True})


def _save_and_offload_only_these_names_regex(
    names_which_can_be_saved, names_which_can_be_offloaded, offload_src, offload_dst
): ...


def partition_by_path_rank(path_rank_to_partition): ...


def tfds_input(*, is_training: bool, replace_newlines_with: str, split: str, vocab_cfg: Any = None): ...


def clip_by_global_norm(max_norm=None, *, drop_norm=None, eps=1e-8): ...


def chain(*args): ...


def scale_fn(input_dim: int, *, scale: float, round_up_to_multiples_of: int): ...


class WeightInitializer(Configurable):
    @config_class
    class Config(Configurable.Config):
        fan: Optional[str] = None
        distribution: str = "uniform"
        scale: Required[float] = REQUIRED


class DefaultInitializer(Configurable):
    @config_class
    class Config(Configurable.Config):
        init_by_param_name: dict[str, InstantiableConfig] = {}


class RMSNorm(Configurable):
    @config_class
    class Config(Configurable.Config):
        input_dim: Required[int] = REQUIRED
        eps: float = 1e-8
        forward_dtype: Optional[jnp.dtype] = jnp.float32


class TransformerFeedForwardLayer(Configurable):
    @config_class
    class Config(Configurable.Config):
        hidden_dim: Required[ConfigOr[int]] = REQUIRED
        activation: Required[tuple[str, ...]] = REQUIRED
        norm: InstantiableConfig = RMSNorm.default_config()
        residual_weight: float = 0.5


class TransformerLayer(Configurable):
    @config_class
    class Config(Configurable.Config):
        remat_spec: Optional[RematSpec] = None
        feed_forward: InstantiableConfig = TransformerFeedForwardLayer.default_config()
        param_partition_spec: Any = None


_in_module("axlearn.common.attention._remat", _save_and_offload_only_these_names_regex)
_in_module("axlearn.common.attention._layer", TransformerLayer)
_in_module("axlearn.common.attention._feed_forward", TransformerFeedForwardLayer)
_in_module("axlearn.common.input_base", partition_by_path_rank)
_in_module("axlearn.common.optimizers", chain, clip_by_global_norm)
_in_module("axlearn.experiments.text.gpt.common", scale_fn, tfds_input)
_in_module("axlearn.common.param_init", DefaultInitializer, WeightInitializer)
_in_module("axlearn.common.layers._norm", RMSNorm)


@config_class
class Holder(ConfigBase):
    model: Any = None
    input: Any = None
    learner: Any = None
    evalers: Any = None
    batch_axis_names: Any = "data"
    train_dtype: Any = None
    remat: Any = None


LAYER = """\
feed_forward.activation[0]: 'nn.silu'
feed_forward.activation[1]: 'linear'
feed_forward.hidden_dim.fn: 'axlearn.experiments.text.gpt.common.scale_fn'
feed_forward.hidden_dim.round_up_to_multiples_of: 16
feed_forward.hidden_dim.scale: 2.6666666666666665
feed_forward.klass: 'axlearn.common.attention.TransformerFeedForwardLayer'
feed_forward.norm.eps: 1e-05
feed_forward.norm.forward_dtype: None
feed_forward.norm.klass: 'axlearn.common.layers.RMSNorm'
feed_forward.residual_weight: 1.0
klass: 'axlearn.common.attention.TransformerLayer'
param_partition_spec[0][0]: 'expert'
param_partition_spec[0][1]: 'fsdp'
param_partition_spec[0][2]: 'seq'
param_partition_spec[1]: 'model'
param_partition_spec[2]: None
remat_spec['prevent_cse']: False
remat_spec['policy'].fn: 'axlearn.common.attention._save_and_offload_only_these_names_regex'
remat_spec['policy'].names_which_can_be_offloaded: None
remat_spec['policy'].names_which_can_be_saved: '.*([qkvo]_proj|context)'
remat_spec['policy'].offload_dst: 'pinned_host'
remat_spec['policy'].offload_src: 'device'"""

TRAINER = """\
batch_axis_names: None
evalers['train'].fn: 'axlearn.experiments.text.gpt.common.tfds_input'
evalers['train'].is_training: False
evalers['train'].replace_newlines_with: '\\n'
evalers['train'].split: 'train[:8192]'
input.fn: 'axlearn.common.input_base.partition_by_path_rank'
input.path_rank_to_partition[(None, 1)]: PartitionSpec(('data', 'expert', 'fsdp'),)
input.path_rank_to_partition[(None, 2)]: PartitionSpec(('data', 'expert', 'fsdp'), 'seq')
learner.args[0].eps: 1e-08
learner.args[0].fn: 'axlearn.common.optimizers.clip_by_global_norm'
learner.args[0].max_norm: 1
learner.fn: 'axlearn.common.optimizers.chain'
model.init_by_param_name['.*weight$'].distribution: 'normal'
model.init_by_param_name['.*weight$'].fan: 'fan_out'
model.init_by_param_name['.*weight$'].klass: 'axlearn.common.param_init.WeightInitializer'
model.init_by_param_name['.*weight$'].scale: 1.0
model.klass: 'axlearn.common.param_init.DefaultInitializer'
train_dtype: 'jax.numpy.bfloat16'"""


def _layer():
    policy = config_for_function(_save_and_offload_only_these_names_regex).set(
        names_which_can_be_saved=".*([qkvo]_proj|context)",
        names_which_can_be_offloaded=None,
        offload_src="device",
        offload_dst="pinned_host",
    )
    cfg = TransformerLayer.default_config().set(
        remat_spec=RematSpec(prevent_cse=False, policy=policy),
        param_partition_spec=(("expert", "fsdp", "seq"), "model", None),
    )
    cfg.feed_forward.set(residual_weight=1.0, activation=("nn.silu", "linear"))
    cfg.feed_forward.hidden_dim = config_for_function(scale_fn).set(
        scale=2.6666666666666665, round_up_to_multiples_of=16
    )
    cfg.feed_forward.norm.set(eps=1e-5, forward_dtype=None)
    return cfg


def _trainer():
    batch = ("data", "expert", "fsdp")
    weights = WeightInitializer.default_config().set(scale=1.0, fan="fan_out", distribution="normal")
    return Holder(
        model=DefaultInitializer.default_config().set(init_by_param_name={".*weight$": weights}),
        input=config_for_function(partition_by_path_rank).set(
            path_rank_to_partition={(None, 1): PartitionSpec(batch), (None, 2): PartitionSpec(batch, "seq")}
        ),
        learner=config_for_function(chain).set(
            args=[config_for_function(clip_by_global_norm).set(max_norm=1)]
        ),
        evalers={
            "train": config_for_function(tfds_input).set(
                is_training=False, replace_newlines_with="\n", split="train[:8192]"
            )
        },
        batch_axis_names=None,
        train_dtype=jnp.bfloat16,
    )


@pytest.mark.parametrize(("build", "text"), [(_layer, LAYER), (_trainer, TRAINER)], ids=["layer", "trainer"])
def test_a_config_prints_the_lines_of_the_reference(build, text):
    assert str(build()) == text
    assert str(build().freeze()) == text
    assert str(build().clone()) == text


def test_the_expected_lines_stand_in_the_reference_dump(reference_dump):
    values = {line.partition(": ")[2] for line in reference_dump}
    for line in [*LAYER.splitlines(), *TRAINER.splitlines()]:
        if not line.startswith(("evalers", "input")):
            assert line.partition(": ")[2] in values, line
    for line in LAYER.splitlines():
        if line.startswith(("feed_forward", "remat_spec")):
            assert f"model.decoder.transformer.layer.{line}" in reference_dump


class Direction(enum.Enum):
    UP = "up"


class Pair(NamedTuple):
    left: Any
    right: Any = None


@config_class
class Values(ConfigBase):
    value: Any = 0
    three: Any = 3
    none: Any = None


def _lines(value):
    return [line for line in str(Values(value=value)).splitlines() if not line.startswith("three")]


@pytest.mark.parametrize(
    ("value", "lines"),
    [
        (None, ["value: None"]),
        (False, ["value: False"]),
        ("", ["value: ''"]),
        ("a\n'b'", ["value: \"a\\n'b'\""]),
        (1e-05, ["value: 1e-05"]),
        (float("inf"), ["value: inf"]),
        (Direction.UP, ["value: <Direction.UP: 'up'>"]),
        ([], []),
        ({}, []),
        ((), []),
        ({2: None, "a": [None]}, ["value[2]: None", "value['a'][0]: None"]),
        (Pair(1), ["value['left']: 1", "value['right']: None"]),
        ((range(2),), ["value[0][0]: 0", "value[0][1]: 1"]),
        (len, ["value: <built-in function len>"]),
        (jnp.float32, ["value: 'jax.numpy.float32'"]),
        (np.float32, ["value: 'numpy.float32'"]),
        (np.dtype("bfloat16" if hasattr(np, "bfloat16") else jnp.bfloat16), ["value: dtype('bfloat16')"]),
        (PartitionSpec(), ["value: PartitionSpec()"]),
        (PartitionSpec(("data", "fsdp"), None), ["value: PartitionSpec(('data', 'fsdp'), None)"]),
        (PartitionSpec("expert", "fsdp"), ["value: PartitionSpec('expert', 'fsdp')"]),
        (jax.checkpoint_policies.dots_saveable, ["value: 'jax._src.ad_checkpoint.dots_saveable'"]),
        (
            jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
            ["value: 'jax._src.ad_checkpoint.dots_with_no_batch_dims_saveable'"],
        ),
        (
            jax.checkpoint_policies.nothing_saveable,
            ["value: 'jax._src.ad_checkpoint.nothing_saveable'"],
        ),
        (jnp.tanh, ["value: 'jax.numpy.tanh'"]),
        (lambda: 0, [f"value: '{__name__}.<lambda>'"]),
        (RematSpec(), ["value['prevent_cse']: True"]),
        (REQUIRED, ["value: REQUIRED"]),
    ],
    ids=lambda x: None,
)
def test_leaves_print_in_a_fixed_way(value, lines):
    assert _lines(value) == lines


def test_a_field_is_omitted_where_it_still_holds_a_default_that_says_nothing():
    assert str(Values()) == "three: 3\nvalue: 0"
    assert str(Values(none=None)) == "three: 3\nvalue: 0"
    assert str(Values(three=None)) == "three: None\nvalue: 0"
    assert Values().debug_string(omit_default_values=(3,)) == "none: None\nvalue: 0"


def test_separators_can_be_chosen():
    assert Values().debug_string(kv_separator="=", field_separator=" ") == "three=3 value=0"


def test_a_registered_formatter_makes_a_leaf_of_a_value():
    class Temperature:
        def __init__(self, degrees):
            self.degrees = degrees

    register_formatter(lambda x: isinstance(x, Temperature), lambda x: f"{x.degrees} degrees")
    assert _lines([Temperature(20)]) == ["value[0]: 20 degrees"]


def test_a_nested_config_prints_by_its_own_rules():
    @config_class
    class Terse(Values):
        def to_flat_dict(self, *, omit_default_values=(None, REQUIRED)):
            return {"": f"{len(self)} fields"}

    assert _lines([Terse()]) == ["value[0].: '3 fields'"]


def test_visit_walks_in_the_order_of_the_dump_without_leaving_out():
    cfg = Values(value={"b": Values(value=Pair(1, [2])), "a": RematSpec()})
    seen, left = [], []
    cfg.visit(lambda key, value: seen.append((key, value)), exit_fn=lambda key, value: left.append(key))
    assert seen == [
        ("none", None),
        ("three", 3),
        ("value['b'].none", None),
        ("value['b'].three", 3),
        ("value['b'].value['left']", 1),
        ("value['b'].value['right'][0]", 2),
        ("value['a']['prevent_cse']", True),
        ("value['a']['policy']", None),
        ("value['a']['note']", "hidden"),
    ]
    assert left == [
        "value['b'].value['right']",
        "value['b'].value",
        "value['b']",
        "value['a']",
        "value",
        "",
    ]


def test_enter_fn_chooses_what_is_walked():
    cfg = Values(value=[Values(), 5])
    seen = []

    def enter(key, value, items):
        if key == "value[0]":
            return None
        return [item for item in items if item[0] != "three"] if items is not None else None

    cfg.visit(lambda key, value: seen.append(key), enter_fn=enter)
    assert seen == ["none", "value[0]", "value[1]"]


def test_visiting_reaches_configs_in_dataclasses_in_place():
    cfg = _layer()

    def rename(key, value, items):
        if isinstance(value, ConfigBase) and "offload_src" in value:
            value.offload_src = "elsewhere"
        return items

    cfg.visit(lambda key, value: None, enter_fn=rename)
    assert cfg.remat_spec.policy.offload_src == "elsewhere"


def test_to_dict_gives_plain_data():
    class Plain:
        def __init__(self, size: int = 3): ...

    cfg = Values(value=[config_for_class(Plain), Pair(jnp.float32)], three={"a": RematSpec()})
    assert cfg.to_dict() == {
        "none": None,
        "three": {"a": {"prevent_cse": True, "policy": None, "note": "hidden"}},
        "value": [{"klass": f"{__name__}.Plain", "size": 3}, Pair("jax.numpy.float32", None)],
    }
