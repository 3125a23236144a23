"""The texts that users read, as golden files."""

import functools
import re
from collections.abc import Sequence
from typing import Any, Optional

import pytest

from axlearn.common.config import (
    REQUIRED,
    ConfigBase,
    Configurable,
    InstantiableConfig,
    Required,
    config_class,
    config_for_function,
    config_to_json,
    error_message,
    join_messages,
)


class RMSNorm(Configurable):
    @config_class
    class Config(Configurable.Config):
        input_dim: Required[int] = REQUIRED
        eps: float = 1e-6


class Attention(Configurable):
    @config_class
    class Config(Configurable.Config):
        hidden_dim: Required[int] = REQUIRED
        num_heads: Required[int] = REQUIRED
        norm: InstantiableConfig[RMSNorm] = RMSNorm.default_config()
        axes: Optional[Sequence[str]] = None
        extra: Any = None

    def __init__(self, cfg):
        super().__init__(cfg)
        cfg.norm.instantiate()


def scale(x, *args: int): ...


def _forgotten_decorator():
    class Config(Attention.Config):
        more: int = 1

    Config(klass=Attention)


def _no_annotation():
    @config_class
    class Config(Attention.Config):
        more = 1


def _bad_name():
    @config_class
    class Config(ConfigBase):
        numHeads: int = 1


def _bad_default():
    @config_class
    class Config(ConfigBase):
        size: int = "x"

    Config()


def _cfg():
    return Attention.default_config()


ATTEMPTS = {
    "unknown field": lambda: _cfg().set(num_head=4),
    "unknown field, nothing near": lambda: _cfg().set(zzz=4),
    "unknown field when read": lambda: _cfg().numheads,
    "unknown field in a frozen tree": lambda: _cfg().freeze().norm.clone(ep=1e-5),
    "wrong type": lambda: _cfg().set(num_heads="4"),
    "wrong type, no conversion": lambda: _cfg().set(num_heads="four"),
    "wrong type in a container": lambda: _cfg().set(axes=["data", None]),
    "a string for a sequence of strings": lambda: _cfg().set(axes="data"),
    "a class for a config": lambda: _cfg().set(norm=RMSNorm),
    "a config of another class": lambda: _cfg().set(norm=_cfg()),
    "a value that configs cannot hold": lambda: _cfg().set(extra={"a": [{1, 2}]}),
    "a partial": lambda: _cfg().set(extra=functools.partial(scale, 1)),
    "a frozen config": lambda: _cfg().freeze().set(num_heads=4),
    "a part of a frozen config": lambda: setattr(_cfg().freeze().norm, "eps", 1e-5),
    "missing fields": lambda: _cfg().instantiate(),
    "missing fields below": lambda: _cfg().set(hidden_dim=1, num_heads=1).instantiate(),
    "missing arguments of a function": lambda: config_for_function(scale).instantiate(),
    "REQUIRED used": lambda: _cfg().hidden_dim // _cfg().num_heads,
    "a forgotten decorator": _forgotten_decorator,
    "an attribute without annotation": _no_annotation,
    "a bad name": _bad_name,
    "a bad default": _bad_default,
    "not JSON": lambda: config_to_json(_cfg().set(extra=lambda: 0)),
}


def test_error_texts(golden):
    texts = []
    for title, attempt in ATTEMPTS.items():
        with pytest.raises(Exception) as error:
            attempt()
        message = re.sub(r"[^ (]*errors_test\.py:\d+", "FILE:LINE", str(error.value))
        texts.append(f"# {title}: {type(error.value).__name__}\n{message.replace(__name__, 'some.module')}\n")
    golden("errors/config/errors.txt", "\n".join(texts))


def test_the_grammar_puts_each_part_in_its_place():
    assert error_message(what="it broke") == "it broke."
    assert error_message(what="it broke.", where="a.b") == "a.b: it broke."
    assert (
        error_message(
            what="unknown field 'x'", where="a", expected="a name", nearest=["y", "z"], advice="Choose one"
        )
        == "a: unknown field 'x'.\n  Expected a name. Did you mean 'y' or 'z'? Choose one."
    )
    assert error_message(what="x", nearest=(4, 4)) == "x.\n  Did you mean (4, 4)?"
    assert error_message(what="x", nearest=[]) == "x."
    assert error_message(what="is it?", nearest=0) == "is it?\n  Did you mean 0?"


def test_several_messages_stand_below_a_heading():
    assert join_messages(["one.\n  More."], heading="2 problems:") == "one.\n  More."
    assert join_messages(["one.\n  More.", "two."], heading="2 problems:") == (
        "2 problems:\n  one.\n    More.\n  two."
    )
