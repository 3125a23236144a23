"""Configs as JSON: equal after the round trip, and nothing followed that may not be."""

import dataclasses
import enum
import json
from typing import Any, NamedTuple, Optional

import attrs
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from axlearn.common.config import (
    REQUIRED,
    ConfigBase,
    ConfigJsonError,
    Configurable,
    InvalidConfigValueError,
    Required,
    config_class,
    config_for_class,
    config_for_function,
    config_from_json,
    config_to_json,
)

PREFIXES = ("axlearn.", __name__)


class Mode(enum.Enum):
    ROW = "row"


class Level(enum.IntEnum):
    HIGH = 3


class Point(NamedTuple):
    x: Any
    y: Any = None


@dataclasses.dataclass(frozen=True)
class Spec:
    prevent_cse: bool = True
    policy: Any = None


@attrs.frozen
class Box:
    content: Any


def scale(x: Any, *args: Any, factor: float = 1.0, **kwargs: Any): ...


class Plain:
    def __init__(self, size: Any = 3): ...


class Layer(Configurable):
    @config_class
    class Config(Configurable.Config):
        dim: Required[int] = REQUIRED
        value: Any = None
        name: Optional[str] = None


LAYER = Layer.default_config()

VALUES = [
    None,
    True,
    0,
    1,
    1.0,
    2**70,
    1e-300,
    float("inf"),
    float("-inf"),
    float("nan"),
    "",
    "ü\n'\"",
    [],
    (),
    {},
    [1, (2, [3]), ()],
    {"a": 1, "b": {"c": (1,)}},
    {(None, 1): "x", 2: "y", "$tuple": [1], None: 0, Mode.ROW: 1},
    {"$ref": "os:system"},
    REQUIRED,
    Mode.ROW,
    Level.HIGH,
    Point(1, [LAYER]),
    Spec(policy=config_for_function(scale).set(x=1)),
    Box([1]),
    (range(2, 9, 3),),
    int,
    Layer,
    Layer.Config,
    scale,
    LAYER.clone(dim=4, value=LAYER),
    config_for_function(scale).set(args=[1, LAYER], kwargs={"k": (1,)}),
    config_for_class(Plain).set(size=LAYER),
    jnp.float32,
    jnp.bfloat16,
    np.float32,
    ml_dtypes.bfloat16,
    np.dtype("int8"),
    np.dtype(jnp.bfloat16),
    PartitionSpec(),
    PartitionSpec(("data", "fsdp"), None, "model"),
    jax.nn.silu,
    jax.nn.relu,
    jax.nn.gelu,
    jax.checkpoint_policies.dots_saveable,
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.nothing_saveable,
]


def _round_trip(cfg):
    return config_from_json(config_to_json(cfg), import_prefixes=PREFIXES)


@pytest.mark.parametrize("value", VALUES, ids=lambda x: None)
def test_every_kind_of_value_comes_back_equal_and_of_the_same_type(value):
    cfg = LAYER.clone(dim=1, value=value)
    again = _round_trip(cfg)
    assert again == cfg
    assert type(again.value) is type(value)
    assert str(again) == str(cfg)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(Mode),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(
            st.text("$ab", max_size=3) | st.integers() | st.tuples(st.none(), st.integers()),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(value=PLAIN)
def test_plain_data_of_any_shape_comes_back_equal(value):
    cfg = LAYER.clone(value=value)
    assert _round_trip(cfg) == cfg
    assert repr(_round_trip(cfg)) == repr(cfg)


def test_the_text_is_strict_json_with_public_names():
    text = config_to_json(LAYER.clone(value=[float("inf"), jax.nn.silu]))

    def refuse(constant):
        raise AssertionError(constant)

    document = json.loads(text, parse_constant=refuse)
    assert document["format"] == "axlearn.config/1"
    assert document["config"] == {
        "$config": f"{__name__}:Layer.Config",
        "dim": {"$required": True},
        "klass": {"$ref": f"{__name__}:Layer"},
        "name": None,
        "value": [{"$float": "inf"}, {"$ref": "jax.nn:silu"}],
    }


def test_what_comes_back_can_be_changed_whether_or_not_it_was_frozen():
    cfg = _round_trip(LAYER.clone(value=LAYER).freeze())
    assert cfg.set(dim=3).value.set(dim=2).dim == 2


def test_fields_that_the_text_lacks_have_their_defaults():
    document = json.loads(config_to_json(LAYER.clone(dim=1)))
    del document["config"]["name"]
    assert config_from_json(json.dumps(document), import_prefixes=PREFIXES) == LAYER.clone(dim=1)


def test_everything_that_cannot_be_written_is_named_with_its_path():
    def local():
        pass

    cfg = LAYER.clone(value={"a": [lambda: 0], "b": LAYER.clone(value=Spec(policy=local))})
    with pytest.raises(ConfigJsonError) as error:
        config_to_json(cfg)
    message = str(error.value)
    assert message.startswith("2 values cannot be written as JSON:\n")
    assert f"  value['a'][0]: {__name__}:test_everything" in message
    assert f"  value['b'].value['policy']: {__name__}:test_everything" in message
    assert message.count("cannot be found again by its name") == 2


def _with_value(node):
    document = json.loads(config_to_json(LAYER))
    document["config"]["value"] = [node]
    return json.dumps(document)


@pytest.mark.parametrize(
    "node",
    [
        {"$ref": "os:system"},
        {"$ref": "builtins:eval"},
        {"$ref": "builtins:__import__"},
        {"$ref": "subprocess:Popen"},
        {"$ref": f"{__name__}:json.loads"},
        {"$ref": f"{__name__}:PartitionSpec"},
        {"$ref": f"{__name__}:scale.__globals__"},
        {"$ref": f"{__name__}:Layer.__init__"},
        {"$ref": f"{__name__}:NoSuchThing"},
        {"$ref": f"{__name__}:"},
        {"$ref": f"{__name__}_evil:x"},
        {"$ref": "axlearn.common.no_such_module:x"},
        {"$ref": "axlearn.common.config._json:json.loads"},
        {"$ref": "jax.nn:_eval"},
        {"$ref": "jax.nn:initializers"},
        {"$ref": "jax.numpy:load"},
        {"$ref": "numpy:load"},
        {"$ref": 3},
        {"$ref": None},
        {"$config": f"{__name__}:Layer"},
        {"$config": "os:system"},
        {"$config": f"{__name__}:Layer.Config", "no_such_field": 1, "klass": {"$ref": f"{__name__}:Layer"}},
        {"$config": f"{__name__}:Layer.Config", "dim": "four", "klass": {"$ref": f"{__name__}:Layer"}},
        {"$config": f"{__name__}:Layer.Config"},
        {"$function": "os:system", "command": "true"},
        {"$function": f"{__name__}:Layer"},
        {"$class": f"{__name__}:scale"},
        {"$class": "subprocess:Popen"},
        {"$dataclass": f"{__name__}:Layer", "fields": {}},
        {"$dataclass": f"{__name__}:Spec"},
        {"$dataclass": f"{__name__}:Spec", "fields": {"x": 1}},
        {"$namedtuple": f"{__name__}:Spec", "fields": {}},
        {"$enum": f"{__name__}:Mode", "name": "COLUMN"},
        {"$enum": f"{__name__}:Layer", "name": "ROW"},
        {"$float": "1"},
        {"$dtype": "no_such_dtype"},
        {"$range": "abc"},
        {"$partition_spec": 3},
        {"$resolve": "os:system"},
        {"$no_such_tag": 1},
    ],
    ids=str,
)
def test_names_that_may_not_be_followed_and_nodes_that_make_no_sense_are_refused_with_their_path(node):
    with pytest.raises(ConfigJsonError, match=r"^value\[0\]"):
        config_from_json(_with_value(node), import_prefixes=PREFIXES)


def test_only_prefixes_that_were_allowed_are_imported():
    with pytest.raises(ConfigJsonError, match="allow its package with import_prefixes"):
        config_from_json(config_to_json(LAYER))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"format": "other"}',
        '{"format": "axlearn.config/1"}',
        "NaN{",
        "[" * 100_000,
        "1" * 5_000,
    ],
    ids=lambda text: text[:20],
)
def test_other_texts_are_refused(text):
    with pytest.raises(ConfigJsonError):
        config_from_json(text)


def test_types_are_checked_when_read():
    @config_class
    class Local(ConfigBase):
        size: int = 1

    with pytest.raises(ConfigJsonError, match="Local cannot be found again"):
        config_to_json(Local())
    with pytest.raises(InvalidConfigValueError):
        Local(size="x")
