"""Overrides that put another class or function in the place of one, and paths that mean several places."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Optional, Union

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from axlearn.common.config import (
    REQUIRED,
    ConfigOr,
    Configurable,
    InstantiableConfig,
    InvalidOverrideError,
    Required,
    apply_overrides,
    config_class,
    config_for_class,
    config_for_function,
    override_lines,
    value_text,
)

HERE = __name__
_PREFIXES = ("axlearn.", HERE)


class Norm(Configurable):
    @config_class
    class Config(Configurable.Config):
        dim: Required[int] = REQUIRED
        eps: float = 1e-8


class LayerNorm(Norm):
    @config_class
    class Config(Norm.Config):
        bias: bool = True


class OtherNorm(Configurable):
    @config_class
    class Config(Configurable.Config):
        dim: Required[int] = REQUIRED
        # Another type than that of `Norm`.
        eps: Optional[str] = None


class Plain:
    def __init__(self, size: int = 3): ...


class Shape(NamedTuple):
    rows: int
    columns: int = 1


@dataclasses.dataclass
class Remat:
    prevent_cse: bool = True
    policy: Optional[ConfigOr[Callable[..., Any]]] = None


def cosine(peak: float, *, max_step: int, alpha: float = 0.0): ...


def constant(peak: float, *, warmup: int = 0): ...


def save_all(prim, *args, **params): ...


def save_some(prim, *_, **params):
    """A policy that no config can be made of: `_` is no name of a field."""


Schedule = Union[float, Callable[[Any], Any]]


class Block(Configurable):
    @config_class
    class Config(Configurable.Config):
        norm: Norm.Config = Norm.default_config()
        any_norm: InstantiableConfig = Norm.default_config()
        maybe: Optional[InstantiableConfig] = None
        schedule: ConfigOr[Schedule] = 1.0
        remat: Optional[Remat] = None
        target: type = Norm
        fn: Callable[..., Any] = cosine
        untyped: Any = None
        name: Optional[str] = None
        required: str = ""
        norms: list[Norm.Config] = [Norm.default_config()]
        children: dict[str, InstantiableConfig] = {}
        shape: Optional[Shape] = None
        spec: Any = ("data", None)


def _block() -> Any:
    cfg = Block.default_config()
    cfg.norm.set(dim=4, eps=1e-5)
    cfg.any_norm.set(dim=4, eps=1e-5)
    cfg.schedule = config_for_function(cosine).set(peak=1.0, max_step=9, alpha=0.1)
    return cfg


def _apply(cfg, *texts):
    return apply_overrides(cfg, texts, import_prefixes=_PREFIXES)


def test_another_class_keeps_the_fields_that_both_have_and_who_set_them():
    cfg = _block()
    where = cfg.norm.where_set("dim")
    (override,) = _apply(cfg, f"norm={HERE}.LayerNorm")
    assert cfg.norm == LayerNorm.default_config().set(dim=4, eps=1e-5)
    assert override.dropped == ()
    assert (override.old, override.new) == (Norm.default_config().set(dim=4, eps=1e-5), cfg.norm)
    assert cfg.norm.where_set("dim") == where
    assert cfg.norm.where_set("bias") is None
    assert (
        str(cfg.where_set("norm")) == str(cfg.norm.where_set("klass")) == f"override 'norm={HERE}.LayerNorm'"
    )


def test_the_field_that_a_dump_prints_says_the_same():
    one, other = _block(), _block()
    _apply(one, f"norm={HERE}.LayerNorm", f"schedule={HERE}.constant")
    overrides = _apply(other, f"norm.klass={HERE}.LayerNorm", f"schedule.fn='{HERE}.constant'")
    assert one == other
    assert [(o.path, o.old, o.new) for o in overrides] == [
        ("norm.klass", Norm, LayerNorm),
        ("schedule.fn", cosine, constant),
    ]


def test_the_class_that_is_there_changes_nothing():
    cfg = _block()
    for text in (f"norm={HERE}.Norm", f"norm.klass={HERE}.Norm", f"schedule.fn={HERE}.cosine"):
        _apply(cfg, text)
    assert cfg == _block()


def test_what_is_lost_with_a_class_or_function_is_told():
    cfg = _block()
    overrides = _apply(cfg, f"any_norm={HERE}.OtherNorm", f"schedule={HERE}.constant")
    assert cfg.any_norm == OtherNorm.default_config().set(dim=4)
    assert [o.dropped for o in overrides] == [
        ("any_norm.eps: 1e-05",),
        ("schedule.alpha: 0.1", "schedule.max_step: 9"),
    ]
    assert override_lines(overrides) == [
        f"override any_norm: a config of {HERE}.Norm -> a config of {HERE}.OtherNorm",
        f"  dropped, {HERE}.OtherNorm has no such field: any_norm.eps: 1e-05",
        f"override schedule: a config of {HERE}.cosine -> a config of {HERE}.constant",
        f"  dropped, {HERE}.constant has no such field: schedule.alpha: 0.1",
        f"  dropped, {HERE}.constant has no such field: schedule.max_step: 9",
    ]


def test_defaults_are_not_lost():
    cfg = Block.default_config()
    (override,) = _apply(cfg, f"any_norm={HERE}.OtherNorm")
    assert override.dropped == ()


def test_later_overrides_set_fields_of_a_class_that_an_earlier_one_put_there():
    cfg = _block()
    _apply(
        cfg, f"norm={HERE}.LayerNorm", "norm.bias=false", f"norms[0]={HERE}.LayerNorm", "norms[0].bias=false"
    )
    assert (cfg.norm.bias, cfg.norms[0].bias) == (False, False)
    with pytest.raises(InvalidOverrideError, match="norm: there is no 'bias'"):
        _apply(_block(), "norm.bias=false", f"norm={HERE}.LayerNorm")


def test_what_follows_a_class_that_cannot_be_put_there_is_not_reported_again():
    cfg = _block()
    with pytest.raises(InvalidOverrideError) as e:
        _apply(cfg, f"norm={HERE}.LayerNrm", "norm.bias=false", "norm.klass=3", "normm=3")
    assert "2 of 4" in str(e.value).splitlines()[0]
    assert cfg == _block()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (f"maybe={HERE}.Norm", Norm.default_config()),
        (f"maybe.klass={HERE}.Norm", Norm.default_config()),
        (f"maybe={HERE}.constant", config_for_function(constant)),
        (f"maybe={HERE}.Plain", config_for_class(Plain)),
        (f"target={HERE}.LayerNorm", LayerNorm),
        (f"fn={HERE}.constant", constant),
        ("fn=jax.nn.silu", jax.nn.silu),
        (f"schedule.fn={HERE}.constant", config_for_function(constant).set(peak=1.0)),
        (f"schedule='{HERE}.constant'", constant),
        ("schedule=3", 3.0),
        ("remat=Remat(prevent_cse=false)", Remat(prevent_cse=False)),
        ("remat=Remat(True)", Remat()),
        (f"remat={HERE}.Remat(policy='{HERE}.save_all')", Remat(policy=save_all)),
        (f"untyped={HERE}.Norm", Norm.default_config()),
        (f"untyped='{HERE}.constant'", constant),
        (f"untyped={HERE}.Remat()", Remat()),
        ("untyped=jax.numpy.bfloat16", jnp.bfloat16),
        ("untyped=PartitionSpec('a', ('b', 'c'))", PartitionSpec("a", ("b", "c"))),
        ("untyped={'a': (1, 'x')}", {"a": (1, "x")}),
        ("untyped=a word", "a word"),
        ("untyped='it''s'", "its"),
        ("spec=PartitionSpec(('a', 'b'), None)", (("a", "b"), None)),
        ("spec=[None]", (None,)),
        ("spec=(('a', 'b'), None)", (("a", "b"), None)),
        ("shape=Shape(2, columns=3)", Shape(2, 3)),
        ("name=axlearn.common.layers.Linear", "axlearn.common.layers.Linear"),
        (f"children={{'a': {HERE}.Norm}}", {"a": Norm.default_config()}),
        ("norms=[]", []),
        (f"norms=[{HERE}.LayerNorm]", [LayerNorm.default_config()]),
        ("maybe=none", None),
    ],
)
def test_a_text_means_one_value(text, value):
    cfg = _block()
    _apply(cfg, text)
    new = getattr(cfg, text.partition("=")[0].removesuffix(".klass").removesuffix(".fn"))
    assert new == value
    assert type(new) is type(value)


def test_texts_that_could_mean_several_things_or_nothing_are_refused(golden):
    texts = [
        f"norm={HERE}.OtherNorm",
        f"norm={HERE}.LayerNrm",
        "norm=LayerNorm",
        "norm=LayerNorms",
        f"norm={HERE}.LayerNorm.Config",
        f"any_norm.klass={HERE}.constant",
        f"schedule.klass={HERE}.constant",
        f"schedule={HERE}.save_all",
        f"any_norm={HERE}.save_some",
        f"any_norm={HERE}.Norm()",
        f"maybe.klass={HERE}.Norm.default_config()",
        "required=None",
        "norm=os.system",
        "norm=axlearn.common.config",
        "norm=axlearn.comon.layers.Linear",
        "norm=other_package.Norm",
        f"remat=Remat(policy={HERE}.save_all)",
        "remat=Remat(prevent_csee=false)",
        "remat=Remat(prevent_cse=3)",
        "remat=Other(prevent_cse=3)",
        "remat={'prevent_cse': False}",
        "shape=Shape()",
        f"untyped={HERE}.constant",
        "untyped=bfloat16",
        "untyped=(1, 2",
        "untyped=(a, 2)",
        "untyped=my.own.thing",
        "untyped=",
        "untyped='x",
        "name='x",
        f"children={{'a': {HERE}.Nrm}}",
        f"klass={HERE}.Norm",
        "children.a=3",
        "norms[1]=3",
        "maybe.x=3",
        "target=3",
        "fn=relu",
    ]
    cfg = _block()
    cfg.fn = jax.nn.silu
    before = cfg.clone()
    with pytest.raises(InvalidOverrideError) as e:
        _apply(cfg, *texts)
    assert cfg == before
    assert str(e.value).startswith(f"{len(texts)} of {len(texts)} overrides")
    golden("errors/config/override_classes.txt", str(e.value) + "\n")


def test_a_star_means_every_place_that_fits_and_one_at_least():
    cfg = _block()
    overrides = _apply(cfg, "**.eps=1e-3", "n*.dim=7", "norms[*].dim=8")
    assert (cfg.norm.eps, cfg.any_norm.eps, cfg.norms[0].eps) == (1e-3, 1e-3, 1e-3)
    assert (cfg.norm.dim, cfg.any_norm.dim, cfg.norms[0].dim) == (7, 4, 8)
    assert [(o.path, o.old) for o in overrides] == [
        ("any_norm.eps", 1e-5),
        ("norm.eps", 1e-5),
        ("norms[0].eps", 1e-8),
        ("norm.dim", 4),
        ("norms[0].dim", REQUIRED),
    ]
    assert override_lines(overrides) == [
        "override '**.eps=1e-3' sets 3 values:",
        "  any_norm.eps: 1e-05 -> 0.001",
        "  norm.eps: 1e-05 -> 0.001",
        "  norms[0].eps: 1e-08 -> 0.001",
        "override 'n*.dim=7' sets 1 value:",
        "  norm.dim: 4 -> 7",
        "override 'norms[*].dim=8' sets 1 value:",
        "  norms[0].dim: REQUIRED -> 8",
    ]


def test_a_star_with_a_class_means_the_configs_that_are_there():
    cfg = _block()
    overrides = _apply(cfg, f"*={HERE}.LayerNorm")
    assert [o.path for o in overrides] == ["any_norm", "norm", "schedule"]
    assert cfg.maybe is None


def test_a_star_that_fits_nothing_or_not_everywhere_is_refused(golden):
    cfg = _block()
    with pytest.raises(InvalidOverrideError) as e:
        _apply(cfg, "**.epps=1", "*.*.*.eps=1", "**.eps=small", "**.dim=1.5", "norms[*].dim.*=1", "**=x")
    assert cfg == _block()
    golden("errors/config/override_stars.txt", str(e.value) + "\n")


def test_a_function_that_no_config_can_be_made_of_is_meant_itself_in_the_place_of_a_config():
    cfg = _block()
    cfg.remat = Remat(policy=config_for_function(cosine).set(peak=1.0, max_step=2))
    _apply(cfg, f"remat.policy={HERE}.save_some")
    assert cfg.remat.policy is save_some


def test_what_it_is_too_late_to_set_is_refused_and_no_star_goes_there():
    cfg = _block()
    reason = {"norms": "They have been used."}
    for text in ("norms[0].eps=1", "norms=[]", "norms.*.eps=1"):
        with pytest.raises(InvalidOverrideError, match=r"They have been used\.|no place matches"):
            apply_overrides(cfg, [text], without_effect=reason)
    overrides = apply_overrides(cfg, ["**.eps=1"], without_effect=reason)
    assert [o.path for o in overrides] == ["any_norm.eps", "norm.eps"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Norm.default_config(), f"a config of {HERE}.Norm"),
        ({"a": (config_for_function(constant),)}, f"{{'a': (a config of {HERE}.constant,)}}"),
        ([Remat(policy=save_all), None], f"[Remat(prevent_cse=True, policy='{HERE}.save_all'), None]"),
        (PartitionSpec("a", None), "PartitionSpec('a', None)"),
        (jnp.bfloat16, "'jax.numpy.bfloat16'"),
        ((), "()"),
    ],
)
def test_a_value_is_told_in_one_line_without_addresses(value, text):
    assert value_text(value) == text
