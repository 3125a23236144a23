"""Trainer configs by name."""

import sys
import types

import pytest

from axlearn.common.config import (
    Configurable,
    UnknownConfigNameError,
    config_class,
    get_named_trainer_config,
    make_trainer_config,
    with_overrides,
)


class Trainer(Configurable):
    @config_class
    class Config(Configurable.Config):
        max_step: int = 1
        data_dir: str = ""


def _small(data_dir=None):
    return Trainer.default_config().set(data_dir=data_dir or "default")


@pytest.fixture
def recipe(monkeypatch):
    module = types.ModuleType("some_recipe")
    module.named_trainer_configs = lambda: {
        "fuji-test-v1": _small,
        "fuji-test-v2": with_overrides(_small, max_step=5),
    }
    monkeypatch.setitem(sys.modules, "some_recipe", module)
    return module


def test_a_config_is_found_by_name(recipe):
    assert get_named_trainer_config("fuji-test-v1", config_module="some_recipe")().data_dir == "default"
    cfg = get_named_trainer_config("fuji-test-v2", config_module="some_recipe")(data_dir="here")
    assert (cfg.max_step, cfg.data_dir) == (5, "here")


def test_a_module_may_offer_a_function_from_name_to_config(recipe):
    recipe.named_trainer_configs = lambda: lambda name: _small
    assert get_named_trainer_config("anything", config_module="some_recipe") is _small


def test_an_unknown_name_is_answered_with_the_nearest(recipe, golden):
    with pytest.raises(UnknownConfigNameError) as error:
        get_named_trainer_config("fuji-tst-v1", config_module="some_recipe")
    assert isinstance(error.value, KeyError)
    golden("errors/config/unknown_trainer_config.txt", f"{error.value}\n")


def test_the_reason_why_a_module_cannot_be_imported_is_not_hidden(tmp_path, monkeypatch):
    (tmp_path / "broken_recipe.py").write_text("import no_such_library\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        get_named_trainer_config("x", config_module="broken_recipe")


def test_a_module_without_configs_is_refused(recipe):
    del recipe.named_trainer_configs
    with pytest.raises(AttributeError, match="some_recipe: the module has no named_trainer_configs"):
        get_named_trainer_config("x", config_module="some_recipe")


def test_a_recipe_need_not_have_a_data_dir():
    cfg = Configurable.default_config()
    assert make_trainer_config(lambda: cfg, data_dir="somewhere") is cfg
    assert (
        make_trainer_config(lambda data_dir: cfg if data_dir == "somewhere" else None, data_dir="somewhere")
        is cfg
    )


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            lambda data_dir=None: None,
            r"the recipe returned None\.\n  Expected a trainer config\. Is its 'return",
        ),
        (lambda: 3, r"the recipe returned a value of builtins\.int"),
        (Configurable.default_config(), r"named_trainer_configs\(\): a config stands for a recipe"),
    ],
)
def test_what_is_no_recipe_is_told(recipe, message):
    with pytest.raises(ValueError, match=message):
        make_trainer_config(recipe)
