"""The recipes that can be started by name alone, and how a name is found."""

import importlib
import os
import sys
import types
from collections.abc import Collection, Iterator
from typing import Optional

from axlearn.common.config import (
    TrainerConfigFn,
    UnknownConfigNameError,
    error_message,
    get_named_trainer_config,
    listing,
    nearest_names,
)

# Looked through in this order; the first module with the name wins. Cheap ones first: only what is looked
# through loads.
RECIPE_MODULES = (
    "axlearn.experiments.text.gpt.fuji_tiny",
    "axlearn.experiments.text.gpt.c4_trainer",
)
_PREFIX = "axlearn.experiments."


def find_trainer_config(
    config_name: str, *, module: Optional[str] = None, where: str = "--config"
) -> TrainerConfigFn:
    """Returns the function that makes a trainer config.

    Args:
        config_name: The name of the config, or an alias of it.
        module: The module whose `named_trainer_configs()` has it: a full name, or one below
            `axlearn.experiments`. None: look through `RECIPE_MODULES`.
        where: What the name was given for, as an error says it.

    Raises:
        UnknownConfigNameError: If no recipe has this name.
        ImportError: If the module, or something that it imports, cannot be imported.
    """
    if module is not None:
        recipe = import_recipe(module)
        name = trainer_config_aliases(recipe).get(config_name, config_name)
        return get_named_trainer_config(name, config_module=recipe.__name__)
    names: list[str] = []
    for recipe_name in RECIPE_MODULES:
        recipe = importlib.import_module(recipe_name)
        configs, aliases = recipe.named_trainer_configs(), trainer_config_aliases(recipe)
        found = configs.get(aliases.get(config_name, config_name))
        if found is not None:
            return found
        names += [*configs, *aliases]
    raise UnknownConfigNameError(
        error_message(
            where=where,
            what=f"no recipe is called {config_name!r}",
            nearest=nearest_names(config_name, names),
            advice=f"Configs: {some_names(names)}. --module=MODULE names another place to look in.",
        )
    )


def listed_trainer_configs() -> Iterator[tuple[str, TrainerConfigFn]]:
    """Yields name and function of every recipe of `RECIPE_MODULES`, loading a module when its turn comes.

    A module that cannot be imported here is passed over: it may need a library that is not installed.
    """
    for recipe in _importable_recipes():
        yield from recipe.named_trainer_configs().items()


def listed_aliases() -> Iterator[tuple[str, str]]:
    """Yields each further name of a recipe of `RECIPE_MODULES`, and the name that it stands for."""
    for recipe in _importable_recipes():
        yield from trainer_config_aliases(recipe).items()


def some_names(names: Collection[str], *, limit: int = 8) -> str:
    """Joins names of recipes for a message; of more than `limit` the first, and the command that lists all."""
    text = listing(sorted(names), limit=limit)
    return text if len(names) <= limit else f"{text}; 'axlearn config list' has all of them"


def _importable_recipes() -> Iterator[types.ModuleType]:
    for recipe in RECIPE_MODULES:
        try:
            yield importlib.import_module(recipe)
        except ImportError:
            continue


def trainer_config_aliases(recipe: types.ModuleType) -> dict[str, str]:
    """Returns the further names of a module's recipes, and what each means: its `trainer_config_aliases()`, if any."""
    aliases_fn = getattr(recipe, "trainer_config_aliases", None)
    aliases: dict[str, str] = {} if aliases_fn is None else aliases_fn()
    return aliases


def import_recipe(module: str) -> types.ModuleType:
    """Imports a recipe by its full name or by its name below `axlearn.experiments`.

    Modules below the working directory are found too, as after `python -m`.

    Args:
        module: The name, such as "my_project.recipes" or "text.gpt.fuji_tiny".

    Returns:
        The module.

    Raises:
        ModuleNotFoundError: If there is no such module in either place.
        ImportError: What the module itself raises, unchanged: it was found, and its own imports fail. Or the
            module has no configs.
    """
    candidates = [module] if module.startswith(_PREFIX) else [module, _PREFIX + module]
    _find_modules_of_working_directory()
    for name in candidates:
        try:
            return _with_configs(importlib.import_module(name))
        except ModuleNotFoundError as e:
            # Only the module itself, or a package around it, being absent means "look elsewhere".
            if not e.name or not (name == e.name or name.startswith(e.name + ".")):
                raise
    path = module.removesuffix(".py")
    raise ModuleNotFoundError(
        error_message(
            where="--module",
            what=f"there is no module {' and no module '.join(repr(name) for name in candidates)}",
            nearest=[path.replace("/", ".")] if "/" in path or path != module else [],
            expected="an importable module with named_trainer_configs()",
            advice="A module of your own must lie below the working directory or in an installed package.",
        ),
        name=module,
    )


def _find_modules_of_working_directory() -> None:
    """Makes the working directory importable: an installed command has its own folder in that place."""
    here = os.getcwd()
    if not sys.flags.safe_path and "" not in sys.path and here not in sys.path:
        sys.path.insert(0, here)
        importlib.invalidate_caches()


def _with_configs(module: types.ModuleType) -> types.ModuleType:
    if not hasattr(module, "named_trainer_configs"):
        raise ImportError(
            error_message(
                where=module.__name__,
                what="the module has no named_trainer_configs()",
                expected="a function that returns a dict from names to functions that make trainer configs",
            )
        )
    return module
