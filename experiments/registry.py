"""The recipes that can be started by name alone, and how a name is found."""

import importlib
import types
from collections.abc import Iterator
from typing import Optional

from axlearn.common.config import (
    TrainerConfigFn,
    UnknownConfigNameError,
    error_message,
    get_named_trainer_config,
    nearest_names,
)

# Looked through in this order; the first module with the name wins. Cheap ones first: only what is looked
# through loads.
RECIPE_MODULES = ("axlearn.experiments.text.gpt.fuji_tiny",)
_PREFIX = "axlearn.experiments."


def find_trainer_config(config_name: str, *, module: Optional[str] = None) -> TrainerConfigFn:
    """Returns the function that makes a trainer config.

    Args:
        config_name: The name of the config.
        module: The module whose `named_trainer_configs()` has it: a full name, or one below
            `axlearn.experiments`. None: look through `RECIPE_MODULES`.

    Raises:
        UnknownConfigNameError: If no recipe has this name.
        ImportError: If the module, or something that it imports, cannot be imported.
    """
    if module is not None:
        return get_named_trainer_config(config_name, config_module=import_recipe(module).__name__)
    names: list[str] = []
    for recipe in RECIPE_MODULES:
        configs = importlib.import_module(recipe).named_trainer_configs()
        if config_name in configs:
            return configs[config_name]
        names.extend(configs)
    raise UnknownConfigNameError(
        error_message(
            where="--config",
            what=f"no recipe is called {config_name!r}",
            nearest=nearest_names(config_name, names),
            advice=f"Configs: {', '.join(sorted(names))}. --module=MODULE names another place to look in.",
        )
    )


def listed_trainer_configs() -> Iterator[tuple[str, TrainerConfigFn]]:
    """Yields name and function of every recipe of `RECIPE_MODULES`, loading a module when its turn comes.

    A module that cannot be imported here is passed over: it may need a library that is not installed.
    """
    for recipe in RECIPE_MODULES:
        try:
            configs = importlib.import_module(recipe).named_trainer_configs()
        except ImportError:
            continue
        yield from configs.items()


def import_recipe(module: str) -> types.ModuleType:
    """Imports a recipe by its full name or by its name below `axlearn.experiments`.

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
    for name in candidates:
        try:
            return _with_configs(importlib.import_module(name))
        except ModuleNotFoundError as e:
            # Only the module itself, or a package around it, being absent means "look elsewhere".
            if not e.name or not (name == e.name or name.startswith(e.name + ".")):
                raise
    raise ModuleNotFoundError(
        error_message(
            where="--module",
            what=f"there is no module {' and no module '.join(repr(name) for name in candidates)}",
            expected="an importable module with named_trainer_configs()",
            advice="A module of your own must lie below the working directory or in an installed package.",
        ),
        name=module,
    )


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
