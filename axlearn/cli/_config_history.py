"""How a config came to be what it is: the recipe, each modifier of the mesh rule, each override, one after another."""

import json
import os
from collections.abc import Iterator
from typing import Any, NamedTuple, Optional

from axlearn.cli._config_source import Options, Source, apply_options, find, open_mesh_selector
from axlearn.common.config import (
    InstantiableConfig,
    SourceLocation,
    error_message,
    public_name,
    recording_callers,
)
from axlearn.common.run_record import RECORD_FILE
from axlearn.common.trainer import MeshRule, find_mesh_rule, select_mesh_config
from axlearn.common.trainer_config_modifier import ChainConfigModifier

# What a stage is, for programs.
RECIPE, FILE, MESH_RULE, OVERRIDE = "recipe", "file", "mesh_rule", "override"


class Stage(NamedTuple):
    """A config at a point of its way.

    Attributes:
        kind: One of `RECIPE`, `FILE`, `MESH_RULE`, `OVERRIDE`.
        by: What brought it there, in words.
        written_at: Where that is written, the most exact line first; empty where the config itself knows it for
            each field.
        cfg: The config behind it.
    """

    kind: str
    by: str
    written_at: tuple[SourceLocation, ...]
    cfg: Any


def stages(source: Source, options: Options) -> list[Stage]:
    """Builds a config step by step.

    Args:
        source: Where it is.
        options: What is done to it, but for the mesh selector, which is the source's.

    Returns:
        The stages in order; the first is the config as the recipe or the file has it.

    Raises:
        ValueError: If something in `options` does not fit it.
        OSError: If there is no such file.
    """
    with recording_callers():
        cfg, _ = find(source, options)
        kind, by = (RECIPE, source.base) if source.name is not None else (FILE, source.base)
        found = [Stage(kind, by, (), cfg), *_rule_stages(cfg, open_mesh_selector(source, cfg))]
    cfg = found[-1].cfg
    # All at once first: that is what a start does, and what its errors are about.
    apply_options(cfg.clone(), options.overrides, options)
    for text in options.overrides:
        cfg = cfg.clone()
        apply_options(cfg, [text], options)
        found.append(Stage(OVERRIDE, f"--set {text}", (), cfg))
    return found


def recorded_overrides(source: Source) -> list[tuple[str, dict[str, Any]]]:
    """Returns what the starts of a run changed, the first start first.

    Args:
        source: A run; of anything else there is no record.

    Returns:
        Which start it was, in words, and the record of the override, as `run_record` writes it.
    """
    path = os.path.join(source.path or "", RECORD_FILE)
    if source.path is None or not os.path.isfile(path):
        return []
    try:
        with open(path, encoding="utf-8") as f:
            starts = json.load(f)
    except (RecursionError, ValueError) as e:
        raise ValueError(error_message(where=path, what=f"it cannot be read ({e})")) from e
    found = []
    for start in starts if isinstance(starts, list) else []:
        # Runs that began before 2026-11-21 hold the overrides of their last start alone.
        is_start = isinstance(start, dict) and "overrides" in start
        records = start["overrides"] if is_start else [start]
        when = f" at {start['time']}" if is_start and start.get("time") else ""
        found += [(f"the start{when}", record) for record in records if isinstance(record, dict)]
    return found


def _rule_stages(cfg: InstantiableConfig, mesh_selector: Optional[str]) -> Iterator[Stage]:
    """Applies the rule for a machine, modifier by modifier.

    A modifier sees what those before it did, so each stage is the config under a rule that ends there: what applies
    rules at a start applies them here, too.
    """
    if not mesh_selector:
        return
    rule = find_mesh_rule(cfg, mesh_selector=mesh_selector)
    rules = list(cfg.mesh_rules)
    for part, by, written_at in _prefixes(rule):
        changed = cfg.clone()
        changed.mesh_rules = [(p, part if i == rule.index else r) for i, (p, r) in enumerate(rules)]
        select_mesh_config(changed, mesh_selector=mesh_selector)
        changed.mesh_rules = rules
        locations = tuple(dict.fromkeys([*written_at, *_location_of(cfg, "mesh_rules")]))
        yield Stage(MESH_RULE, f"{rule}{by}", locations, changed)


def _prefixes(rule: MeshRule) -> Iterator[tuple[Any, str, tuple[SourceLocation, ...]]]:
    """Yields what begins a rule: a growing chain of its modifiers, the name of the last, and where that is written."""
    if not isinstance(rule.rule, ChainConfigModifier.Config):
        yield rule.rule, _words(rule.rule), _locations_in(rule.rule)
        return
    modifiers = list(rule.rule.config_modifiers)
    for i, modifier in enumerate(modifiers):
        part = rule.rule.clone(config_modifiers=modifiers[: i + 1])
        locations = (*_locations_in(modifier), *_location_of(rule.rule, "config_modifiers"))
        yield part, f", config_modifiers[{i}]{_words(modifier)}", locations


def _words(modifier: Any) -> str:
    klass = getattr(modifier, "klass", None)
    return f" {public_name(klass).rpartition('.')[2]}" if klass is not None else ""


def _locations_in(modifier: Any) -> tuple[SourceLocation, ...]:
    """Where the fields of a modifier's config were set."""
    if not isinstance(modifier, InstantiableConfig):
        return ()
    return tuple(location for name, _ in modifier.items() for location in _location_of(modifier, name))


def _location_of(cfg: Any, field: str) -> tuple[SourceLocation, ...]:
    location = cfg.where_set(field)
    return () if location is None or location.line == 0 else (location,)
