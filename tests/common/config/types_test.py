"""Values against annotations."""

import collections.abc
import dataclasses
import enum
from collections.abc import Callable, Sequence
from typing import Any, Literal, NewType, Optional, Protocol, TypeVar, Union

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
    InvalidConfigValueError,
    Required,
    config_class,
    config_for_function,
)

T = TypeVar("T")
Steps = NewType("Steps", int)


class Mode(enum.Enum):
    ROW = "row"


class Layer(Configurable):
    @config_class
    class Config(Configurable.Config):
        dim: int = 1


class Linear(Layer):
    pass


class Other(Configurable):
    pass


class HasLoss(Protocol):
    def loss(self) -> float: ...


@dataclasses.dataclass
class Remat:
    prevent_cse: bool = True
    policy: Optional[ConfigOr[Callable]] = None


def scale(x: int) -> int:
    return x


LAYER = Layer.default_config()
LINEAR = Linear.default_config()
OTHER = Other.default_config()
SCALE = config_for_function(scale)

# Annotation, values that suit it, values that do not.
CASES = [
    (int, [1, -5], [1.5, "1", True, None, REQUIRED, [1]]),
    (float, [1.5, 1, float("inf"), np.float64(2.0)], ["1", True, None]),
    (bool, [True, False], [1, 0, "true", None]),
    (str, ["x", ""], [1, None, ["x"]]),
    (Optional[int], [None, 3], ["x", 1.5]),
    (int | None, [None, 3], ["x"]),
    (Required[int], [3, REQUIRED], [None, "x"]),
    (Union[int, str], [1, "x"], [1.5, None]),
    (Literal["a", 2], ["a", 2], ["b", 3, 2.0]),
    (Mode, [Mode.ROW], ["row", "ROW"]),
    (Sequence[str], [["a"], ("a", "b"), []], ["ab", [1], ["a", None], {"a": 1}]),
    (collections.abc.Sequence[int], [[1], (1,)], [["a"], 3]),
    (list[int], [[1], []], [(1,), [1.5]]),
    (tuple[int, ...], [(1, 2), ()], [[1], (1, "x")]),
    (tuple[int, str], [(1, "x")], [(1,), (1, 2), ("x", 1)]),
    (tuple, [(1, "x")], [[1]]),
    (dict[str, int], [{"a": 1}, {}], [{"a": "b"}, {1: 1}, [1]]),
    (dict[str, list[Optional[int]]], [{"a": [1, None]}], [{"a": [1, "x"]}]),
    (dict, [{1: "x"}], ["x"]),
    (Callable[[int], int], [scale, jax.nn.silu, len], [1, SCALE]),
    (type, [int, Layer, jnp.float32], [1, LAYER]),
    (type[Layer], [Layer, Linear], [Other, LAYER]),
    (Layer.Config, [LAYER, LINEAR], [OTHER, Layer, None, {}]),
    (InstantiableConfig, [LAYER, SCALE], [Layer, 1]),
    (InstantiableConfig[Layer], [LAYER, LINEAR, SCALE], [OTHER, Layer]),
    (ConfigOr[int], [1, SCALE], ["x"]),
    (Optional[dict[str, ConfigOr[int]]], [None, {"a": 1, "b": SCALE}], [{"a": "x"}]),
    (Remat, [Remat(), Remat(policy=SCALE)], [{}, Remat(prevent_cse=3), Remat(policy=3)]),
    (Optional[jnp.dtype], [None, jnp.bfloat16, np.float32, np.dtype("int8")], ["float32", 32, str]),
    (PartitionSpec, [PartitionSpec("a"), ("a", None)], ["a", None]),
    (Steps, [3], ["x"]),
    (Any, [1, None, [LAYER]], []),
    (object, [1, None], []),
    (T, [1, None], []),
    (HasLoss, [1, LAYER], []),
    ("int", [1], ["x"]),
    ("Optional[Layer.Config]", [None, LAYER], [3]),
    ("list['Layer.Config']", [[LAYER]], [[3]]),
    ("NoSuchName", [1, "x"], []),
    (Union[int, "NoSuchName"], [1, "x"], []),
]


def _config_with(annotation):
    cls = type("Holder", (ConfigBase,), {"__annotations__": {"value": annotation}, "__module__": __name__})
    return config_class(cls)


@pytest.mark.parametrize(("annotation", "good", "bad"), CASES, ids=lambda x: None)
def test_values_are_accepted_as_annotations_say(annotation, good, bad):
    cls = _config_with(annotation)
    for value in good:
        assert cls(value=value).value == value
    for value in bad:
        with pytest.raises(InvalidConfigValueError):
            cls(value=value)


def test_a_default_of_the_wrong_type_is_refused_when_the_first_config_is_made():
    @config_class
    class Bad(ConfigBase):
        names: list[str] = ["a", 1]

    with pytest.raises(InvalidConfigValueError, match=r"default names\[1\]=1 \(int\)"):
        Bad()


def test_a_default_of_none_makes_none_legal():
    @config_class
    class Sloppy(ConfigBase):
        size: int = None

    assert Sloppy(size=3).set(size=None).size is None


@pytest.mark.parametrize(
    ("annotation", "value", "expected"),
    [
        (dict[str, list[int]], {"a": [1, "x"]}, "value['a'][1]='x' (str) has the wrong type"),
        (dict[str, int], {1: 1}, "Expected keys that are str, not 1"),
        (Optional[int], "4", "Expected int or None. Did you mean 4?"),
        (tuple[int, ...], [1], "Expected tuple[int, ...]. Did you mean (1,)?"),
        (int, 4.0, "Did you mean 4?"),
        (Layer.Config, Linear, "Write Linear.default_config() in place of the class"),
        (Mode, "row", "Expected Mode (Mode.ROW)"),
        (Literal["a", "b"], "c", "Expected 'a' or 'b'"),
        (Union[list[int], str], ["x"], "value[0]='x' (str)"),
        (Remat, Remat(prevent_cse=3), "value['prevent_cse']=3 (int)"),
    ],
)
def test_messages_say_where_and_what_was_expected(annotation, value, expected):
    with pytest.raises(InvalidConfigValueError) as error:
        _config_with(annotation)(value=value)
    assert expected in str(error.value)


def test_numpys_floats_become_pythons():
    assert type(_config_with(float)(value=np.float64(0.5)).value) is float
