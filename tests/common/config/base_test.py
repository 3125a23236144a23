"""Fields, assignment by value, freezing, provenance."""

import collections
import copy
import dataclasses
import enum
import functools
import inspect
import pickle
import threading
from typing import Any, NamedTuple, Optional

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axlearn.common.config import (
    REQUIRED,
    ConfigBase,
    FrozenConfigError,
    InvalidConfigClassError,
    InvalidConfigNameError,
    InvalidConfigValueError,
    MissingConfigClassDecoratorError,
    NonConfigFieldError,
    Required,
    UnknownFieldError,
    config_class,
    register_validator,
)


class Color(enum.Enum):
    RED = "red"


class Point(NamedTuple):
    x: Any
    y: Any


@dataclasses.dataclass(frozen=True)
class Spec:
    items: Any = None
    weight: float = 1.0


@attrs.define
class Box:
    content: Any


@config_class
class Inner(ConfigBase):
    # Anything.
    value: Any = 1
    # More of it.
    rest: Any = None


@config_class
class Outer(ConfigBase):
    inner: Inner = Inner()
    parts: list[Any] = []
    name: Optional[str] = None
    size: Required[int] = REQUIRED

    def double(self) -> int:
        return 2 * self.size


@config_class
class Derived(Outer):
    size: int = 8
    extra: str = "x"


def test_fields_are_those_of_the_class_and_its_bases():
    cfg = Derived()
    assert cfg.keys() == ["extra", "inner", "name", "parts", "size"]
    assert dict(cfg.items()) == {"extra": "x", "inner": Inner(), "name": None, "parts": [], "size": 8}
    assert "extra" in cfg
    assert "double" not in cfg
    assert len(cfg) == 5
    assert cfg.double() == 16
    assert Outer().size is REQUIRED


def test_a_new_config_takes_values_by_name():
    assert Derived(size=3, extra="y") == Derived().set(size=3, extra="y")


def test_every_config_has_its_own_copy_of_the_defaults():
    first = Outer()
    first.parts.append(1)
    first.inner.value = 2
    assert Outer().parts == []
    assert Outer().inner.value == 1


def test_assignment_stores_a_copy_and_reading_returns_what_is_stored():
    inner, items = Inner(), [Inner(), {"key": [1]}, (Inner(),)]
    cfg = Outer(inner=inner, parts=items)
    inner.value = "changed"
    items[0].value = "changed"
    items[1]["key"].append(2)
    items[2][0].value = "changed"
    assert cfg == Outer(parts=[Inner(), {"key": [1]}, (Inner(),)])
    cfg.inner.value = 5
    assert cfg.inner is cfg.inner
    assert cfg.inner.value == 5


@pytest.mark.parametrize(
    "value",
    [
        Spec(items=[Inner()]),
        Point(Inner(), [1]),
        Box([Inner()]),
        collections.defaultdict(list, a=[1]),
        collections.OrderedDict(a=[Inner()]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_containers_of_every_kind_are_copied_with_their_contents(value):
    cfg = Inner(value=value)
    assert cfg.value == value
    assert type(cfg.value) is type(value)
    assert cfg.value is not value
    assert copy.deepcopy(cfg) == cfg


def test_what_cannot_change_is_not_copied():
    for value in (int, len, Color.RED, inspect.getmembers, "".join, (1, (2, "x"))):
        assert Inner(value=value).value is value


@pytest.mark.parametrize(
    ("value", "path"),
    [
        (object(), ""),
        ([1, object()], "[1]"),
        ({"a": ({1, 2},)}, "['a'][0]"),
        (Spec(items=[b"bytes"]), "['items'][0]"),
        (functools.partial(int), ""),
        (range(3), ""),
    ],
    ids=["object", "in list", "set in dict", "bytes in dataclass", "partial", "range"],
)
def test_values_of_unknown_kinds_are_refused_wherever_they_are(value, path):
    with pytest.raises(InvalidConfigValueError) as error:
        Inner().set(value=value)
    assert f"Inner: value{path} is of type" in str(error.value)


def test_a_range_is_accepted_inside_of_a_container():
    assert Inner(value=(range(3),)).value == (range(3),)


def test_a_registered_validator_admits_and_refuses_values_of_its_kind():
    class Interval:
        def __init__(self, low, high):
            self.low, self.high = low, high

    def check_order(value):
        if value.low > value.high:
            raise InvalidConfigValueError("wrong order")

    register_validator(match_fn=lambda x: isinstance(x, Interval), validate_fn=check_order)
    assert Inner(value=[Interval(1, 2)]).value[0].high == 2
    with pytest.raises(InvalidConfigValueError, match="wrong order"):
        Inner(value=Interval(2, 1))


def test_unknown_names_are_refused_for_reading_and_writing():
    cfg = Outer()
    for attempt in (
        lambda: cfg.nmae,
        lambda: cfg.set(nmae="x"),
        lambda: cfg.clone(nmae="x"),
        lambda: Outer(nmae="x"),
        lambda: cfg.where_set("nmae"),
        lambda: setattr(cfg, "nmae", 1),
    ):
        with pytest.raises(UnknownFieldError, match="Did you mean 'name'"):
            attempt()
    assert not hasattr(cfg, "nmae")
    assert cfg == Outer()


def test_clone_is_deep_and_sets_fields():
    cfg = Outer(parts=[Inner()])
    copied = cfg.clone(name="copy")
    copied.parts[0].value = 7
    assert cfg == Outer(parts=[Inner()])
    assert copied == Outer(parts=[Inner(value=7)], name="copy")


def test_equality_is_by_class_and_field_and_configs_have_no_hash():
    assert Inner(value=[1, 2]) == Inner(value=[1, 2])
    assert Inner(value=[1, 2]) != Inner(value=(1, 2))
    assert Inner(value=float("nan")) == Inner(value=float("nan"))
    assert Outer(size=8) != Derived()
    with pytest.raises(TypeError, match="unhashable"):
        hash(Inner())


def test_repr_names_the_class_and_the_fields_as_declared():
    name = f"{Outer.__module__}.Inner"
    assert repr(Inner(rest="x")) == f"config_class({name})(value=1, rest='x')"
    assert Inner.__name__ == Inner.__qualname__ == f"config_class({name})"


def test_a_frozen_tree_refuses_changes_everywhere():
    cfg = Outer(parts=[{"key": (Inner(),)}, Spec(items=Inner())]).freeze()
    nodes = [cfg, cfg.inner, cfg.parts[0]["key"][0], cfg.parts[1].items]
    for node in nodes:
        assert node.is_frozen
        with pytest.raises(FrozenConfigError, match="clone"):
            setattr(node, node.keys()[0], 1)
    assert cfg.freeze() is cfg


def test_a_clone_of_a_frozen_config_is_not_frozen():
    cfg = Outer(parts=[Inner()]).freeze()
    copied = cfg.clone(name="x")
    copied.parts[0].value = 5
    assert copied.inner.set(value=2).value == 2
    assert cfg == Outer(parts=[Inner()])
    # Assignment copies, so what is assigned from a frozen tree can be changed in its new place.
    assert not Outer(inner=cfg.inner).inner.is_frozen


def test_messages_name_the_path_in_a_frozen_tree_and_in_copies_of_its_parts():
    cfg = Outer(parts=[{"key": Inner()}]).freeze()
    with pytest.raises(FrozenConfigError, match=r"^parts\[0\]\['key'\] \("):
        cfg.parts[0]["key"].value = 1
    with pytest.raises(UnknownFieldError, match=r"^parts\[0\]\['key'\] \("):
        cfg.parts[0]["key"].clone(valeu=1)


def test_each_field_knows_who_set_it():
    cfg = Outer()
    assert cfg.where_set("name") is None
    line = inspect.currentframe().f_lineno
    cfg.name = "a"
    cfg.set(size=3)
    copied = cfg.clone(parts=[1])
    assert cfg.where_set("name") == (__file__, line + 1)
    assert cfg.where_set("size") == (__file__, line + 2)
    assert copied.where_set("name") == (__file__, line + 1)
    assert copied.where_set("parts") == (__file__, line + 3)
    assert str(cfg.where_set("size")).endswith(f"base_test.py:{line + 2}")


def test_get_and_set_recursively_follow_names():
    cfg = Outer()
    cfg.set_recursively(["inner", "value"], value=9)
    assert cfg.get_recursively(["inner", "value"]) == 9
    assert cfg.get_recursively([]) is cfg
    with pytest.raises(ValueError, match="Path is empty"):
        cfg.set_recursively([], value=1)


def test_config_class_stands_on_configs_only():
    with pytest.raises(InvalidConfigClassError, match="A config class must be a subclass of ConfigBase"):
        config_class(int)


def test_attributes_without_annotation_are_refused():
    with pytest.raises(NonConfigFieldError, match=r"Non-config attribute is not supported: .*Bad\.size"):

        @config_class
        class Bad(ConfigBase):
            size = 3


def test_a_forgotten_decorator_is_noticed_when_a_config_is_made():
    class WithField(Outer):
        more: int = 3

    class WithAttribute(Outer):
        more = 3

    class WithNothing(Outer):
        pass

    with pytest.raises(MissingConfigClassDecoratorError, match=r"adds fields \(more\)"):
        WithField()
    with pytest.raises(NonConfigFieldError, match="more"):
        WithAttribute()
    assert WithNothing(size=3).size == 3


@pytest.mark.parametrize("name", ["Upper", "_private", "camelCase", "ü", "set", "clone", "items"])
def test_names_that_fields_cannot_have_are_refused(name):
    with pytest.raises(InvalidConfigNameError, match=name):
        config_class(type("Bad", (ConfigBase,), {"__annotations__": {name: int}, name: 1}))


def test_a_field_without_default_must_be_given():
    @config_class
    class Strict(ConfigBase):
        size: int

    with pytest.raises(TypeError, match="missing arguments size"):
        Strict()
    assert Strict(size=1).size == 1


def test_fields_of_two_bases_come_together():
    @config_class
    class Left(ConfigBase):
        left: int = 1

    @config_class
    class Right(ConfigBase):
        right: int = 2

    @config_class
    class Both(Left, Right):
        pass

    assert Both().keys() == ["left", "right"]


def test_fields_cannot_be_deleted():
    with pytest.raises(FrozenConfigError, match="cannot delete field 'value'"):
        del Inner().value


def test_configs_survive_pickling():
    cfg = Outer(parts=[Inner(value=Color.RED)], name="x").freeze()
    again = pickle.loads(pickle.dumps(cfg))
    assert again == cfg
    assert again.is_frozen
    assert again.where_set("name") == cfg.where_set("name")


def test_a_frozen_config_can_be_read_by_many_threads():
    cfg = Outer(parts=[Inner(value=i) for i in range(50)]).freeze()
    expected, seen = str(cfg), []
    threads = [threading.Thread(target=lambda: seen.extend([str(cfg), str(cfg.clone())])) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [expected] * 16


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(Color.RED),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=40, deadline=None)
@given(value=PLAIN)
def test_a_copy_is_equal_and_prints_the_same(value):
    cfg = Inner(value=value)
    assert cfg == cfg.clone() == Inner(value=value)
    assert str(cfg) == str(cfg.clone())
    assert cfg.clone(rest="other") != cfg
