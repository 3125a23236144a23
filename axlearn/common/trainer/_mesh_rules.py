"""Which mesh (and which changes that go with it) a recipe uses on a kind of machine."""

import re
from typing import Any, Optional

from axlearn.common.config import ConfigModifier, InstantiableConfig, error_message, maybe_instantiate
from axlearn.common.utils import HybridMeshShape


def select_mesh_config(trainer_config: InstantiableConfig, *, mesh_selector: Optional[str]) -> None:
    """Applies the first of the trainer's `mesh_rules` whose pattern matches all of `mesh_selector`, in place.

    A rule is (regular expression, what to do): a mesh shape replaces `mesh_shape`; a `ConfigModifier` config
    is instantiated and applied to the trainer config; None says that the recipe has no mesh for such
    machines.

    Args:
        trainer_config: The trainer config to change.
        mesh_selector: The machine, such as "tpu-v5p-128" or "gpu-p5.48xlarge-256"; None or "" selects nothing
            and leaves the config as it is.

    Raises:
        ValueError: If there are rules to choose from and none matches, or there are none.
        TypeError: If the rule that matches is neither a mesh shape nor a config modifier.
    """
    if not mesh_selector:
        return
    rules = trainer_config.mesh_rules or ()
    for pattern, rule in rules:
        if re.fullmatch(pattern, mesh_selector):
            _apply_rule(trainer_config, pattern=pattern, rule=rule)
            return
    raise ValueError(
        error_message(
            where="mesh_rules",
            what=f"no rule matches the mesh selector {mesh_selector!r}",
            expected=(
                "one that fully matches one of: " + ", ".join(repr(pattern) for pattern, _ in rules)
                if rules
                else "a recipe with mesh rules, but this one has none"
            ),
            advice="Leave out --mesh_selector to use mesh_shape as the recipe sets it.",
        )
    )


def _apply_rule(trainer_config: InstantiableConfig, *, pattern: str, rule: Any) -> None:
    if rule is None or isinstance(rule, (tuple, list, HybridMeshShape)):
        trainer_config.mesh_shape = rule
        return
    modifier = maybe_instantiate(rule)
    if not isinstance(modifier, ConfigModifier):
        raise TypeError(
            error_message(
                where=f"mesh_rules[{pattern!r}]",
                what=f"a rule of type {type(modifier).__name__}",
                expected="a mesh shape, None or the config of a ConfigModifier",
            )
        )
    modifier(trainer_config)
