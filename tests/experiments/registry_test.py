"""Recipes by name: the order of look-up, and the true reason of a failed import."""

import importlib
import sys

import pytest

from axlearn.common.config import UnknownConfigNameError
from axlearn.experiments import registry

RECIPE = "tests.common.trainer.tiny_recipe"


@pytest.fixture(autouse=True)
def _only_the_tiny_recipe(monkeypatch):
    monkeypatch.setattr(registry, "RECIPE_MODULES", (RECIPE,))


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """Writes a module that a user could have written, and returns its name."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(name, text):
        path = tmp_path.joinpath(*name.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        importlib.invalidate_caches()
        sys.modules.pop(name, None)
        return name

    return write


def test_a_name_is_found_in_the_list_of_recipes():
    assert registry.find_trainer_config("tiny")(data_dir=None).name == "tiny"


def test_a_module_is_found_by_its_own_name_and_below_our_package(user_module):
    name = user_module(
        "my_recipes.small", "def named_trainer_configs():\n    return {'a': lambda data_dir=None: 'cfg'}\n"
    )
    assert registry.find_trainer_config("a", module=name)() == "cfg"
    assert registry.import_recipe("text.gpt.fuji_tiny").__name__ == ("axlearn.experiments.text.gpt.fuji_tiny")


def test_a_module_below_the_working_directory_is_found_as_after_python_m(tmp_path, monkeypatch):
    (tmp_path / "recipes_of_this_folder.py").write_text("def named_trainer_configs():\n    return {}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    assert registry.import_recipe("recipes_of_this_folder").named_trainer_configs() == {}


def test_the_file_of_a_module_is_answered_with_the_modules_name():
    with pytest.raises(ModuleNotFoundError, match=r"Did you mean 'my_project\.recipes'\?"):
        registry.import_recipe("my_project/recipes.py")


def test_an_unknown_name_is_answered_with_the_nearest_of_all_recipes():
    with pytest.raises(
        UnknownConfigNameError, match=r"no recipe is called 'tiny-lang'\.\n  Did you mean 'tiny-long'"
    ):
        registry.find_trainer_config("tiny-lang")


def test_an_unknown_module_names_both_places():
    with pytest.raises(ModuleNotFoundError, match=r"'no_such' and no module 'axlearn\.experiments\.no_such'"):
        registry.find_trainer_config("a", module="no_such")


@pytest.mark.parametrize(
    "text", ["import no_such_library\n", "from axlearn.common.config import no_such_name\n"]
)
def test_what_a_users_module_cannot_import_is_said_as_it_is(user_module, text):
    name = user_module("broken_recipe", text)
    with pytest.raises(ImportError, match="no_such") as e:
        registry.find_trainer_config("a", module=name)
    assert "axlearn.experiments" not in str(e.value)


def test_a_module_without_configs_is_no_recipe(user_module):
    name = user_module("empty_recipe", "")
    with pytest.raises(ImportError, match=r"empty_recipe: the module has no named_trainer_configs\(\)"):
        registry.find_trainer_config("a", module=name)


def test_the_recipes_that_come_with_the_package_can_all_be_imported(monkeypatch):
    monkeypatch.undo()
    names = []
    for module in registry.RECIPE_MODULES:
        names.extend(importlib.import_module(module).named_trainer_configs())
    assert "fuji-tiny" in names
    assert len(names) == len(set(names))
