"""Overrides from text."""

import dataclasses
import enum
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Optional, Union

import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from axlearn.common.config import (
    REQUIRED,
    ConfigOr,
    Configurable,
    FrozenConfigError,
    InstantiableConfig,
    InvalidOverrideError,
    Override,
    Required,
    apply_overrides,
    config_class,
    config_for_function,
)


class Mode(enum.Enum):
    ROW = "row"
    COLUMN = "col"


@dataclasses.dataclass
class Remat:
    prevent_cse: bool = True
    policy: Any = None


class Pair(NamedTuple):
    left: Any
    right: Any


def clip(max_norm, eps=1e-8, flag=None): ...


def adamw(learning_rate: float, *, b1: float = 0.9): ...


def chain(*args): ...


class Layer(Configurable):
    @config_class
    class Config(Configurable.Config):
        dim: Required[int] = REQUIRED
        rate: float = 0.0
        bias: bool = True
        name: Optional[str] = None
        mode: Mode = Mode.ROW
        structure: Literal["prenorm", "postnorm"] = "prenorm"
        dtype: Optional[jnp.dtype] = jnp.float32
        cache_dtype: Any = np.dtype("float32")
        spec: Any = PartitionSpec("data")
        remat_spec: Optional[Remat] = None
        shape: Sequence[int] = (1, 2)
        limits: Optional[tuple[float, ...]] = None
        scale: Union[int, float, None] = 1
        hidden: ConfigOr[int] = 4
        extra: dict[Any, Any] = {}
        pair: Any = Pair(1, "x")
        activation: Any = print
        layer: Optional[InstantiableConfig] = None


def _config():
    optimizer = config_for_function(chain).set(
        args=(
            config_for_function(clip).set(max_norm=1),
            config_for_function(adamw).set(learning_rate=0.1),
        )
    )
    return Layer.default_config().set(
        remat_spec=Remat(policy=Layer.default_config()),
        extra={"train": Layer.default_config(), (None, 1): "x", ".*weight$": 1, 3: [1.5], "opt": optimizer},
    )


@pytest.mark.parametrize(
    ("text", "path", "new"),
    [
        ("dim=4", "dim", 4),
        ("dim = 1_000", "dim", 1000),
        ("dim=1e6", "dim", 1000000),
        ("dim=-1", "dim", -1),
        ("rate=1e-3", "rate", 1e-3),
        ("rate=1", "rate", 1.0),
        ("rate=inf", "rate", float("inf")),
        ("bias=false", "bias", False),
        ("bias=True", "bias", True),
        ("name=abc=d e", "name", "abc=d e"),
        ("name='None'", "name", "None"),
        ('name="a b"', "name", "a b"),
        ("name=None", "name", None),
        ("name=3", "name", "3"),
        ("name=", "name", ""),
        ("mode=COLUMN", "mode", Mode.COLUMN),
        ("mode=col", "mode", Mode.COLUMN),
        ("mode=Mode.COLUMN", "mode", Mode.COLUMN),
        ("structure=postnorm", "structure", "postnorm"),
        ("dtype=bfloat16", "dtype", jnp.bfloat16),
        ("dtype='jax.numpy.bfloat16'", "dtype", jnp.bfloat16),
        ("dtype=None", "dtype", None),
        ("cache_dtype=bfloat16", "cache_dtype", np.dtype(jnp.bfloat16)),
        ("spec=PartitionSpec(('data', 'fsdp'), None)", "spec", PartitionSpec(("data", "fsdp"), None)),
        ("spec=('data',)", "spec", PartitionSpec("data")),
        ("spec=P()", "spec", PartitionSpec()),
        ("shape=(3, -1)", "shape", (3, -1)),
        ("shape=[3, -1]", "shape", (3, -1)),
        ("shape=3,-1,1", "shape", (3, -1, 1)),
        ("shape[1]=5", "shape[1]", 5),
        ("shape[-1]=5", "shape[1]", 5),
        ("limits=(1, 2.5)", "limits", (1, 2.5)),
        ("scale=2", "scale", 2),
        ("scale=0.5", "scale", 0.5),
        ("scale=1e3", "scale", 1000),
        ("hidden=7", "hidden", 7),
        ("remat_spec['prevent_cse']=false", "remat_spec['prevent_cse']", False),
        ("remat_spec.prevent_cse=false", "remat_spec['prevent_cse']", False),
        ("remat_spec.policy.dim=3", "remat_spec['policy'].dim", 3),
        ("remat_spec=None", "remat_spec", None),
        ("extra['train'].rate=.5", "extra['train'].rate", 0.5),
        ("extra.train.rate=.5", "extra['train'].rate", 0.5),
        ("extra[(None, 1)]=y", "extra[(None, 1)]", "y"),
        ("extra['.*weight$']=2", "extra['.*weight$']", 2),
        ("extra['.*weight$']=.5", "extra['.*weight$']", 0.5),
        ("extra.3[0]=2", "extra[3][0]", 2.0),
        ("extra.opt.args[0].max_norm=0.5", "extra['opt'].args[0].max_norm", 0.5),
        ("extra.opt.args.0.flag=true", "extra['opt'].args[0].flag", True),
        ("extra.opt.args[0].flag=some text", "extra['opt'].args[0].flag", "some text"),
        ("extra.opt.args[0].flag={'a': 1}", "extra['opt'].args[0].flag", {"a": 1}),
        ("extra.opt.args[1].learning_rate=1e-3", "extra['opt'].args[1].learning_rate", 1e-3),
        ("extra={'a': 1}", "extra", {"a": 1}),
        # A list in the place of a string.
        ("extra={(None, 1): ('a', 'b')}", "extra", {(None, 1): ("a", "b")}),
        ("pair['right']=y", "pair['right']", "y"),
        ("layer=None", "layer", None),
    ],
)
def test_a_text_sets_one_value(text, path, new):
    cfg, before = _config(), _config()
    (override,) = apply_overrides(cfg, [text])
    assert override.path == path
    assert override.text == text
    assert override.new == new
    assert type(override.new) is type(new)
    assert repr(override.old) == repr(_at(before, path))
    value = _at(cfg, path)
    assert value == new
    assert type(value) is type(new)
    # Setting the old value again leaves no trace: nothing else was changed.
    _put(cfg, path, _at(before, path))
    assert cfg == before


def _at(cfg, path):
    found = [value for key, value in _all_places(cfg) if key == path]
    assert len(found) == 1
    return found[0]


def _all_places(cfg):
    seen = []

    def enter(key, value, items):
        seen.append((key, value))
        return items

    cfg.visit(lambda key, value: None, enter_fn=enter)
    return seen


def _put(cfg, path, value):
    steps = path.replace("['prevent_cse']", ".prevent_cse").replace("['policy']", ".policy")
    scope = {"cfg": cfg, "value": value}
    if steps.startswith("shape["):
        cfg.shape = (*cfg.shape[:1], value)
    elif steps.startswith("pair["):
        cfg.pair = cfg.pair._replace(right=value)
    else:
        exec(f"cfg.{steps} = value", scope)


def test_the_lines_of_a_dump_are_overrides_that_change_nothing():
    cfg = _config()
    lines = [line for line in str(cfg).splitlines() if "<built-in" not in line]
    lines = [line for line in lines if ".klass: " not in line and ".fn: " not in line]
    texts = [line.replace(": ", "=", 1) for line in lines if line.partition(": ")[0] != "klass"]
    assert len(texts) > 40
    apply_overrides(cfg, texts)
    assert str(cfg) == str(_config())


def test_overrides_are_applied_in_order_and_listed():
    cfg = _config()
    result = apply_overrides(cfg, ["dim=1", "remat_spec.policy.dim=2", "dim=3"])
    assert result == [
        Override("dim", REQUIRED, 1, "dim=1"),
        Override("remat_spec['policy'].dim", REQUIRED, 2, "remat_spec.policy.dim=2"),
        Override("dim", 1, 3, "dim=3"),
    ]
    assert cfg.dim == 3


def test_a_field_set_by_an_override_says_so():
    cfg = _config()
    apply_overrides(cfg, ["dim=1", "shape[0]=7"])
    assert str(cfg.where_set("dim")) == "override 'dim=1'"
    assert str(cfg.where_set("shape")) == "override 'shape[0]=7'"


def test_a_frozen_config_takes_no_overrides():
    with pytest.raises(FrozenConfigError):
        apply_overrides(_config().freeze(), ["dim=1"])


def test_nothing_is_applied_if_anything_is_wrong_and_everything_wrong_is_reported(golden):
    cfg, before = _config(), _config()
    with pytest.raises(InvalidOverrideError) as error:
        apply_overrides(
            cfg,
            [
                "dim=3",
                "dimm=3",
                "dim=four",
                "rate=fast",
                "bias=yes",
                "mode=diagonal",
                "structure=hybrid",
                "dtype=float31",
                "shape=(1, 'x')",
                "shape[5]=1",
                "limits=3",
                "remat_spec.prevent=1",
                "remat_spec.prevent_cse=3",
                "extra.opt.args[1].lerning_rate=1",
                "learning_rate=1",
                "extra['train']=3",
                "extra['test'].dim=3",
                "dim.x=3",
                "layer=Linear",
                "activation=relu",
                "dim",
                "a..b=1",
                "shape[=1",
                "=3",
            ],
        )
    assert cfg == before
    golden("errors/config/overrides.txt", str(error.value) + "\n")


def test_one_wrong_override_is_reported_without_a_heading(golden):
    with pytest.raises(InvalidOverrideError) as error:
        apply_overrides(_config(), ["extra.opt.args[1].b2=0.95"])
    golden("errors/config/one_override.txt", str(error.value) + "\n")
