"""Configs from signatures."""

import functools
import operator
from typing import Optional

import pytest

from axlearn.common.config import (
    REQUIRED,
    InvalidConfigNameError,
    InvalidConfigValueError,
    RequiredFieldMissingError,
    UnknownFieldError,
    config_for_class,
    config_for_function,
)


def add(x: int, y: "Optional[int]" = None, *, scale: float = 1.0):
    return (x + (y or 0)) * scale


def collect(first, *args: int, key: str = "k", **kwargs: float):
    return first, args, key, kwargs


class Plain:
    def __init__(self, size: int, *, name: str = "n"):
        self.size, self.name = size, name


def test_fields_mirror_the_signature():
    cfg = config_for_function(add)
    assert cfg.keys() == ["fn", "scale", "x", "y"]
    assert cfg.fn is add
    assert cfg.x is REQUIRED
    assert (cfg.y, cfg.scale) == (None, 1.0)
    assert type(cfg).__name__ == f"config_for_function({__name__}.add)"


def test_instantiate_calls_the_function_and_arguments_win_over_fields():
    cfg = config_for_function(add).set(x=1, y=2)
    assert cfg.instantiate() == 3
    assert cfg.instantiate(x=5, scale=2.0) == 14
    assert config_for_function(add).instantiate(x=1) == 1


def test_fields_are_checked_by_the_annotations():
    cfg = config_for_function(add)
    with pytest.raises(InvalidConfigValueError, match="Expected int"):
        cfg.x = "one"
    with pytest.raises(InvalidConfigValueError, match="Expected int or None"):
        cfg.y = 1.5
    with pytest.raises(UnknownFieldError, match="Did you mean 'scale'"):
        cfg.set(scales=1.0)
    with pytest.raises(InvalidConfigValueError, match=r"args\[1\]='x'"):
        config_for_function(collect).set(args=[1, "x"])
    with pytest.raises(InvalidConfigValueError, match=r"kwargs\['a'\]='x'"):
        config_for_function(collect).set(kwargs={"a": "x"})


def test_missing_arguments_are_reported_together():
    with pytest.raises(RequiredFieldMissingError, match=r"fields first, args \(Sequence\[int\]\)"):
        config_for_function(collect).instantiate()


def test_var_arguments_go_where_the_signature_puts_them():
    cfg = config_for_function(collect).set(first=0, args=[1, 2], kwargs={"a": 1.0})
    assert cfg.instantiate() == (0, (1, 2), "k", {"a": 1.0})
    assert cfg.instantiate(b=2, a=3) == (0, (1, 2), "k", {"a": 3, "b": 2})
    assert cfg.clone(args=()).instantiate(first=9) == (9, (), "k", {"a": 1.0})


def test_keyword_arguments_that_nobody_set_are_absent():
    assert config_for_function(collect).set(first=0, args=[]).instantiate() == (0, (), "k", {})


def test_positional_only_parameters_are_passed_by_position():
    def divide(x, /, y):
        return x / y

    assert config_for_function(divide).set(x=6, y=3).instantiate() == 2
    assert config_for_function(pow).set(base=2, exp=5).instantiate() == 32


def test_nested_configs_are_passed_as_they_are():
    inner = config_for_function(add)
    outer = config_for_function(lambda child: child).set(child=inner)
    assert outer.instantiate() == inner
    assert outer.instantiate().is_frozen


def test_config_for_class_builds_objects():
    cfg = config_for_class(Plain)
    assert cfg.klass is Plain
    assert type(cfg).__name__ == f"config_for_class({__name__}.Plain)"
    made = cfg.set(size=3).instantiate(name="m")
    assert (type(made), made.size, made.name) == (Plain, 3, "m")
    with pytest.raises(RequiredFieldMissingError, match="size"):
        config_for_class(Plain).instantiate()


def test_configs_of_one_function_are_of_one_class():
    assert type(config_for_function(add)) is type(config_for_function(add))
    assert config_for_function(add) == config_for_function(add)
    assert config_for_class(Plain) == config_for_class(Plain)


def test_defaults_are_not_shared():
    def gather(items_list=[]):  # noqa: B006
        return items_list

    cfg = config_for_function(gather)
    cfg.items_list.append(1)
    assert config_for_function(gather).items_list == []


def test_wrapped_functions_keep_their_signature():
    @functools.wraps(add)
    def wrapped(*args, **kwargs):
        return add(*args, **kwargs)

    assert config_for_function(wrapped).set(x=1).instantiate() == 1


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: config_for_function(lambda fn: fn), ValueError, "'fn'"),
        (lambda: config_for_function(lambda _: 0), ValueError, "'_'"),
        (lambda: config_for_function(lambda N: 0), InvalidConfigNameError, '"N"'),
        (lambda: config_for_function(functools.partial(add, 1)), InvalidConfigValueError, "not a function"),
        (lambda: config_for_function(Plain), InvalidConfigValueError, "config_for_class"),
        (lambda: config_for_class(add), InvalidConfigValueError, "config_for_function"),
        (lambda: config_for_function(max), ValueError, "has no signature"),
        (lambda: config_for_function(operator.itemgetter), InvalidConfigValueError, "config_for_class"),
    ],
)
def test_what_cannot_have_a_config_is_refused(make, error, text):
    with pytest.raises(error, match=text):
        make()
