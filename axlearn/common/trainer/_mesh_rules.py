"""Which mesh (and which changes that go with it) a recipe uses on a kind of machine."""

import dataclasses
import re
from typing import Any, Optional

from axlearn.common.config import (
    ConfigModifier,
    InstantiableConfig,
    assign_fields,
    error_message,
    nearest_names,
    set_by,
    value_text,
)
from axlearn.common.utils import HybridMeshShape


@dataclasses.dataclass(frozen=True)
class MeshRule:
    """One of a trainer's `mesh_rules`.

    Attributes:
        index: Its place among them.
        pattern: The regular expression that all of a mesh selector must match.
        rule: A mesh shape, the config of a modifier, or None.
    """

    index: int
    pattern: str
    rule: Any

    def __str__(self) -> str:
        return f"mesh_rules[{self.index}] ({self.pattern!r})"


def find_mesh_rule(trainer_config: InstantiableConfig, *, mesh_selector: str) -> MeshRule:
    """Returns the first of the trainer's `mesh_rules` whose pattern matches all of a mesh selector.

    Raises:
        ValueError: If there are rules to choose from and none matches, there are none, or one on the way to the
            match is no regular expression.
    """
    rules = [MeshRule(i, *rule) for i, rule in enumerate(trainer_config.mesh_rules or ())]
    for rule in rules:
        try:
            if re.fullmatch(rule.pattern, mesh_selector):
                return rule
        except re.error as e:
            raise ValueError(
                error_message(where=str(rule), what=f"is no regular expression: {e}", expected="one")
            ) from e
    raise ValueError(_no_match_message(rules, mesh_selector))


def select_mesh_config(trainer_config: InstantiableConfig, *, mesh_selector: Optional[str]) -> None:
    """Applies the first of the trainer's `mesh_rules` whose pattern matches all of `mesh_selector`, in place.

    A rule is (regular expression, what to do): a mesh shape replaces `mesh_shape`; a `ConfigModifier` config
    is instantiated and applied to the trainer config; None says that the recipe has no mesh for such
    machines, which is refused. Where a modifier fails the config stays as it was.

    Args:
        trainer_config: The trainer config to change.
        mesh_selector: The machine, such as "tpu-v5p-128" or "gpu-p5.48xlarge-256"; None or "" selects nothing
            and leaves the config as it is.

    Raises:
        ValueError: If there are rules to choose from and none matches, there are none, or the one that matches
            is None.
        TypeError: If the rule that matches is neither a mesh shape nor a config modifier, or the modifier
            returns no trainer config.
    """
    if not mesh_selector:
        return
    rule = find_mesh_rule(trainer_config, mesh_selector=mesh_selector)
    try:
        with set_by(str(rule)):
            _apply_rule(trainer_config, rule)
    except Exception as e:
        e.add_note(f"While applying {rule} for the mesh selector {mesh_selector!r}")
        raise


def _no_match_message(rules: list[MeshRule], mesh_selector: str) -> str:
    if not rules:
        expected, nearest, hint = "a recipe with mesh rules, but this one has none", None, ""
    else:
        patterns = [rule.pattern for rule in rules]
        expected = "one that fully matches one of: " + ", ".join(repr(pattern) for pattern in patterns)
        nearest = nearest_names(mesh_selector, list(dict.fromkeys(patterns)), limit=1)
        partial = next((p for p in patterns if re.search(p, mesh_selector)), None)
        hint = f"{partial!r} matches a part of it, which is not enough. " if partial is not None else ""
    return error_message(
        where="mesh_rules",
        what=f"no rule matches the mesh selector {mesh_selector!r}",
        expected=expected,
        nearest=nearest,
        advice=f"{hint}Leave out --mesh_selector to use mesh_shape as the recipe sets it.",
    )


def _apply_rule(trainer_config: InstantiableConfig, rule: MeshRule) -> None:
    if rule.rule is None:
        raise ValueError(
            error_message(
                where=str(rule),
                what="the recipe has no mesh for such machines",
                expected="a rule with a mesh shape",
                advice="Leave out --mesh_selector and name a mesh yourself, with --set mesh_shape=...",
            )
        )
    if isinstance(rule.rule, (tuple, list, HybridMeshShape)):
        trainer_config.mesh_shape = rule.rule
        return
    built = getattr(rule.rule, "klass", None)
    is_config = isinstance(rule.rule, InstantiableConfig)
    if not (is_config and isinstance(built, type) and issubclass(built, ConfigModifier)):
        raise TypeError(
            error_message(
                where=str(rule),
                what=f"a rule that is {value_text(rule.rule)}",
                expected="a mesh shape, None or the config of a ConfigModifier",
            )
        )
    modifier = rule.rule.instantiate()
    changed = modifier(trainer_config.clone())
    if type(changed) is not type(trainer_config):
        raise TypeError(
            error_message(
                where=type(modifier).__name__,
                what=f"it returned {value_text(changed)}",
                expected="the changed trainer config",
                advice="A ConfigModifier returns the config that it was given, or another in its place.",
            )
        )
    assign_fields(trainer_config, source=changed)
