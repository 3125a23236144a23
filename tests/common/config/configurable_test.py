"""Building from configs: one clone, frozen, with paths on failures."""

import copy
from typing import Any, Optional

import pytest

from axlearn.common.config import (
    REQUIRED,
    ConfigModifier,
    Configurable,
    FrozenConfigError,
    InstantiableConfig,
    Required,
    RequiredFieldMissingError,
    config_class,
    config_for_function,
    maybe_instantiate,
    maybe_set_config,
)


class Layer(Configurable):
    @config_class
    class Config(Configurable.Config):
        dim: Required[int] = REQUIRED
        num_heads: Required[int] = REQUIRED
        error: Optional[str] = None

    def __init__(self, cfg, *, parent):
        super().__init__(cfg)
        self.parent = parent
        if cfg.error:
            raise ValueError(cfg.error)


class Model(Configurable):
    @config_class
    class Config(Configurable.Config):
        layer: InstantiableConfig = Layer.default_config()
        layers: Any = None
        dim: Required[int] = REQUIRED

    def __init__(self, cfg):
        super().__init__(cfg)
        self.layer = cfg.layer.clone(dim=cfg.dim).instantiate(parent=self)


def _model():
    cfg = Model.default_config().set(dim=4)
    cfg.layer.num_heads = 2
    return cfg


def test_default_config_builds_its_class():
    cfg = Layer.default_config()
    assert type(cfg) is Layer.Config
    assert cfg.klass is Layer
    layer = cfg.set(dim=1, num_heads=1).instantiate(parent="p")
    assert isinstance(layer, Layer)
    assert layer.parent == "p"


def test_reading_config_copies_nothing():
    model = _model().instantiate()
    assert model.config is model.config
    assert model.layer.config is model.layer.config
    assert model.config.layer is model.config.layer


def test_instantiate_clones_once_at_the_root_and_children_get_frozen_parts_of_that_clone(monkeypatch):
    class Wrapper(Model):
        def __init__(self, cfg):
            Configurable.__init__(self, cfg)
            self.child = cfg.layer.instantiate(parent=self)

    copies = []
    original = Layer.Config._copy
    monkeypatch.setattr(Layer.Config, "_copy", lambda self: copies.append(self) or original(self))
    cfg = Wrapper.default_config().set(dim=4)
    cfg.layer.set(dim=1, num_heads=1)
    copies.clear()
    built = cfg.instantiate()
    assert len(copies) == 1
    assert built.child.config is built.config.layer
    assert built.child.config.is_frozen
    assert not cfg.is_frozen


def test_what_was_built_does_not_see_later_changes_of_the_config():
    cfg = _model()
    model = cfg.instantiate()
    cfg.dim = 5
    cfg.layer.num_heads = 7
    assert model.config.dim == 4
    assert model.config.layer.num_heads == 2


def test_the_config_of_something_built_cannot_be_changed():
    model = _model().instantiate()
    with pytest.raises(FrozenConfigError, match=r"cfg\.clone\(dim=\.\.\.\)"):
        model.config.dim = 5
    with pytest.raises(FrozenConfigError):
        model.config.layer.set(dim=5)


def test_an_unfrozen_config_given_to_init_is_copied():
    cfg = Layer.default_config().set(dim=1, num_heads=1)
    layer = Layer(cfg, parent=None)
    assert layer.config == cfg
    assert layer.config is not cfg
    assert layer.config.is_frozen


def test_all_missing_fields_are_reported_at_once_with_their_paths():
    with pytest.raises(RequiredFieldMissingError) as error:
        Layer.default_config().instantiate(parent=None)
    assert "required fields dim (int), num_heads (int)" in str(error.value)
    cfg = Model.default_config().set(dim=4)
    with pytest.raises(RequiredFieldMissingError) as error:
        cfg.instantiate()
    assert str(error.value).startswith("layer (")
    assert "required field layer.num_heads (int)" in str(error.value)


def test_a_failure_keeps_type_and_traceback_and_carries_the_path():
    cfg = _model()
    cfg.layer.error = "does not fit"
    with pytest.raises(ValueError, match="does not fit") as error:
        cfg.instantiate()
    assert error.value.__notes__ == [f"While instantiating layer ({__name__}.Layer)"]
    assert "raise ValueError(cfg.error)" in str(error.getrepr())


def test_paths_reach_through_containers():
    def build(cfgs):
        return [cfg.instantiate(parent=None) for cfg in cfgs["a"]]

    bad = Layer.default_config().set(dim=1, num_heads=1, error="bad")
    good = bad.clone(error=None)
    cfg = _model().set(layers={"x": config_for_function(build).set(cfgs={"a": (good, bad)})}).freeze()
    with pytest.raises(ValueError, match="bad") as error:
        cfg.layers["x"].instantiate()
    assert error.value.__notes__ == [f"While instantiating layers['x'].cfgs['a'][1] ({__name__}.Layer)"]


def test_a_failure_without_path_gets_it_from_the_config_above():
    def build():
        return Layer.default_config().set(dim=1, num_heads=1, error="bad").instantiate(parent=None)

    cfg = _model().set(layers=config_for_function(build)).freeze()
    with pytest.raises(ValueError, match="bad") as error:
        cfg.layers.instantiate()
    assert error.value.__notes__ == [
        f"While instantiating {__name__}.Layer",
        f"While instantiating layers ({__name__}.build)",
    ]


def test_maybe_instantiate_builds_configs_and_passes_on_everything_else():
    assert maybe_instantiate(3) == 3
    assert maybe_instantiate(None) is None
    assert maybe_instantiate(config_for_function(lambda x: x + 1).set(x=1)) == 2


def test_maybe_set_config_sets_what_there_is():
    cfg = Layer.default_config()
    assert maybe_set_config(cfg, dim=3, unknown=1) is cfg
    assert cfg.dim == 3


def test_a_modifier_is_configured_like_anything_else():
    class SetDim(ConfigModifier):
        @config_class
        class Config(ConfigModifier.Config):
            dim: int = 7

        def __call__(self, cfg):
            return cfg.set(dim=self.config.dim)

    assert SetDim.default_config().instantiate()(Model.default_config()).dim == 7
    with pytest.raises(NotImplementedError):
        ConfigModifier.default_config().instantiate()(None)


def test_deepcopying_something_built_keeps_its_config():
    layer = Layer.default_config().set(dim=1, num_heads=1).instantiate(parent=None)
    assert copy.deepcopy(layer).config == layer.config
