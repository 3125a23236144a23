"""What completion asks of recipes: their names, the machines that they have rules for, the paths of their configs."""

import re
from typing import Any, Optional

from axlearn.cli._config_source import known_recipes
from axlearn.common.config import TrainerConfigFn, make_trainer_config, places_below
from axlearn.common.machines import usual_names


def machines_by_name(*, module: Optional[str]) -> dict[str, list[str]]:
    """Returns the usual machines that each recipe has a mesh rule for.

    Args:
        module: The module with the recipes; None: those that come with this package.

    Returns:
        By the names of the recipes and their aliases. A recipe that cannot be made here has none.
    """
    recipes, aliases = known_recipes(module)
    matching: dict[str, list[str]] = {}
    found = {name: _machines(recipe, matching) for name, recipe in recipes.items()}
    return found | {alias: found[name] for alias, name in aliases.items() if name in found}


def paths_of(name: str, *, module: Optional[str]) -> list[str]:
    """Returns the paths of everything in a recipe's config, in the order of a dump.

    Args:
        name: The recipe or an alias.
        module: As for `machines_by_name`.
    """
    recipes, aliases = known_recipes(module)
    cfg = _config(recipes[aliases.get(name, name)])
    # The rules have been applied before anything in them could be set.
    return [] if cfg is None else [place.path for place in places_below(cfg, closed=("mesh_rules",))]


def _machines(recipe: TrainerConfigFn, matching: dict[str, list[str]]) -> list[str]:
    cfg = _config(recipe)
    patterns = [] if cfg is None else [pattern for pattern, _ in cfg.mesh_rules or ()]
    for pattern in patterns:
        if pattern not in matching:
            matching[pattern] = [name for name in usual_names() if re.fullmatch(pattern, name)]
    return sorted({name for pattern in patterns for name in matching[pattern]})


def _config(recipe: TrainerConfigFn) -> Any:
    """The config of a recipe; None where it cannot be made, of which completion is not the place to hear."""
    try:
        return make_trainer_config(recipe)
    except Exception:
        return None
