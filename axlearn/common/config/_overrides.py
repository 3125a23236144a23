"""`path=value` from a command line, applied to a config: all of them, or none and every reason why not."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Optional

from axlearn.common.config._base import ConfigBase
from axlearn.common.config._errors import (
    FrozenConfigError,
    InvalidConfigValueError,
    error_message,
    join_messages,
)
from axlearn.common.config._fields import find_bad_dataclass_field
from axlearn.common.config._formatters import format_leaf
from axlearn.common.config._lookup import CALLS, find_named, is_dotted_name, may_name
from axlearn.common.config._messages import SHORT
from axlearn.common.config._names import listing, nearest_names, public_module, public_name
from axlearn.common.config._override_lines import Override, builds, value_text
from axlearn.common.config._parse_scalar import ParseError
from axlearn.common.config._parse_value import is_class_or_function, parse_value
from axlearn.common.config._paths import PathError, Place, Step, parse_path, split_assignment, walk
from axlearn.common.config._places import annotation_at, owner_of, with_part_replaced
from axlearn.common.config._provenance import SourceLocation
from axlearn.common.config._references import FOREIGN_FUNCTIONS, BadReferenceError
from axlearn.common.config._required import REQUIRED
from axlearn.common.config._same_fields import config_of, lost_lines, slot_of, taking_over
from axlearn.common.config._types import describe_value
from axlearn.common.config._values import is_config
from axlearn.common.config._wildcards import is_pattern, matching_places


class InvalidOverrideError(ValueError):
    """Overrides cannot be applied; the message has a reason for each."""


class _Rules(NamedTuple):
    """What holds for all overrides of a call: see `apply_overrides`."""

    import_prefixes: tuple[str, ...]
    without_effect: Mapping[str, str]


def apply_overrides(
    cfg: ConfigBase,
    overrides: Sequence[str],
    *,
    import_prefixes: Sequence[str] = ("axlearn.",),
    without_effect: Optional[Mapping[str, str]] = None,
) -> list[Override]:
    """Sets values in a config from text.

    A path is what a dump prints before the colon; keys of dicts may also follow a dot without quotes. A step
    `*` stands for any one step, `**` for any number of them: what is at each place that such a path means is
    set, and there must be one. A value is read by the type of its place: numbers (`1e-3`, `1_000`), `true`,
    `false`, `None`, strings with or without quotes, names or values of enums, literal tuples, lists and dicts,
    names of dtypes, partition specs, `Name(field=value)` for dataclasses, and classes and functions by the name
    that a dump prints. Another class or function for a config keeps the values of the fields that both have.

    Args:
        cfg: A config that is not frozen; it is changed in place.
        overrides: Texts of the form `path=value`, applied one after another: of two for the same path the
            later wins.
        import_prefixes: The packages whose classes and functions may be named, besides jax's activations and
            remat policies.
        without_effect: Top-level fields that it is too late to set, and why, as a sentence. None: none.

    Returns:
        What was set, in the order given.

    Raises:
        FrozenConfigError: If the config is frozen.
        InvalidOverrideError: If any override cannot be applied. Then none is, and the message says of each
            why not.
    """
    if cfg.is_frozen:
        raise FrozenConfigError(
            error_message(
                what="overrides cannot be applied to a frozen config", advice="Apply them to cfg.clone()"
            )
        )
    rules = _Rules(tuple(import_prefixes), without_effect or {})
    trial = cfg.clone()
    problems, failed = [], list[str]()
    for text in overrides:
        if any(text.startswith((f"{path}.", f"{path}[")) for path in failed):
            # It is about a class that another override could not put there.
            continue
        try:
            _apply(trial, text, rules)
        except (InvalidConfigValueError, ValueError) as e:
            # Whatever a class or a function says of its being put there is about this override.
            problems.append(f"override '{text}': {e}")
            path, _, value = (part.strip() for part in text.partition("="))
            if is_dotted_name(value):
                failed.append(path.removesuffix(".klass").removesuffix(".fn"))
    if problems:
        heading = f"{len(problems)} of {len(overrides)} overrides cannot be applied:"
        raise InvalidOverrideError(join_messages(problems, heading=heading))
    return [override for text in overrides for override in _apply(cfg, text, rules)]


def _described(value: Any) -> str:
    return value_text(value) if is_config(value) else describe_value(value)


def _apply(cfg: ConfigBase, text: str, rules: _Rules) -> list[Override]:
    path_text, value = split_assignment(text)
    steps = parse_path(path_text)
    reason = rules.without_effect.get(str(steps[0].key))
    if reason is not None:
        raise InvalidOverrideError(
            error_message(where=str(steps[0].key), what="it is too late to set this", advice=reason)
        )
    if any(is_pattern(step) for step in steps):
        return _apply_everywhere(cfg, steps, value, text, rules)
    return [_apply_at(cfg, steps, value, text, rules)]


def _apply_everywhere(
    cfg: ConfigBase, steps: list[Step], value: str, text: str, rules: _Rules
) -> list[Override]:
    places = matching_places(cfg, steps, closed=rules.without_effect)
    if not places:
        raise PathError(_no_match(cfg, steps, rules))
    if is_dotted_name(value) and any(is_config(place.value) for place in places):
        # Another class for the modules that are there, and none where there is none.
        places = [place for place in places if is_config(place.value)]
    done, problems = [], []
    for place in places:
        try:
            done.append(_apply_at(cfg, parse_path(place.path), value, text, rules))
        except (InvalidConfigValueError, ValueError) as e:
            problems.append(str(e))
    if problems:
        heading = f"{len(problems)} of the {len(places)} places that match cannot be set:"
        more = [f"... ({len(problems) - SHORT} more)"] if len(problems) > SHORT else []
        raise InvalidOverrideError(join_messages([*problems[:SHORT], *more], heading=heading))
    # In the order of a dump.
    return done[::-1]


def _no_match(cfg: ConfigBase, steps: list[Step], rules: _Rules) -> str:
    """Writes the error about a pattern that matches nothing, by its last name."""
    everywhere = matching_places(cfg, [Step("**", is_name=True)], closed=rules.without_effect)
    names = {str(place.key) for place in everywhere if place.key is not None}
    last = str(steps[-1].key)
    if is_pattern(steps[-1]):
        return error_message(what="no place matches", expected="at least one")
    if last in names:
        shortest = min((place.path for place in everywhere if str(place.key) == last), key=len)
        return error_message(what="no place matches", advice=f"There is '{last}' at {shortest}")
    return error_message(
        what=f"no place matches: there is no '{last}' anywhere", nearest=nearest_names(last, sorted(names))
    )


def _apply_at(cfg: ConfigBase, steps: list[Step], value: str, text: str, rules: _Rules) -> Override:
    slot = steps[-1].key if steps[-1].is_name else ""
    if slot in ("klass", "fn"):
        places = walk(cfg, steps[:-1], closed=rules.without_effect)
        if _is_slot(places[-1].value, slot):
            return _set_slot(places, slot, value, text, rules)
    places = walk(cfg, steps, closed=rules.without_effect)
    target = places[-1]
    new = _parse(value, target, annotation=annotation_at(places), rules=rules)
    return _put(places, new, text)


def _is_slot(value: Any, slot: str) -> bool:
    """Whether `klass` or `fn` below a value says what a config there builds, and is no field of another kind."""
    if is_config(value):
        return slot_of(value) == slot or slot not in value
    return value is None or is_class_or_function(value)


def _set_slot(places: list[Place], slot: str, name: str, text: str, rules: _Rules) -> Override:
    """Puts a config of another class or function in the place of the one there, or of None."""
    old = places[-1].value
    path = f"{places[-1].path}.{slot}".lstrip(".")
    before = builds(old)
    if slot_of(old) == slot and name == format_leaf(before):
        return Override(path=path, old=before, new=before, text=text)
    try:
        found = find_named(name.strip("'\""), import_prefixes=rules.import_prefixes)
    except BadReferenceError as e:
        raise InvalidOverrideError(f"{path}: {e}") from e
    if (slot == "klass") != isinstance(found, type):
        kinds = ("a class", "a function") if slot == "klass" else ("a function", "a class")
        other = "fn" if slot == "klass" else "klass"
        raise InvalidOverrideError(
            error_message(
                where=path,
                what=f"{public_name(found)} is {kinds[1]}",
                expected=kinds[0],
                advice=f"Write {path.removesuffix(slot)}{other}={name}",
            )
        )
    override = _put(places, _config_for(found, old=old), text)
    return override._replace(path=path, old=before, new=found)


def _config_for(found: Any, *, old: Any) -> Any:
    if not is_config(old):
        return config_of(found)
    return old if builds(old) is found else taking_over(config_of(found), old=old).cfg


def _put(places: list[Place], new: Any, text: str) -> Override:
    """Puts a value at the last of the places that lead to it."""
    target = places[-1]
    if len(places) == 1:
        if new is target.value:
            return Override(path="", old=new, new=new, text=text)
        raise InvalidOverrideError(
            error_message(
                where="klass", what="the root of the tree cannot be replaced", advice="Use another recipe"
            )
        )
    owner, inner = owner_of(places)
    name, location = inner[0].key, SourceLocation(f"override '{text}'", 0)
    if is_config(new) and new is not target.value:
        new._sources[slot_of(new)] = location
    value = with_part_replaced(inner, new)
    mismatch = owner._config_fields[name].check(value) or find_bad_dataclass_field(value)
    if mismatch is not None:
        raise InvalidOverrideError(
            error_message(
                where=f"{inner[0].path}{mismatch.path}",
                what=f"cannot be {_described(mismatch.value)}",
                expected=mismatch.expected,
            )
        )
    dropped = _dropped(target.value, new, path=target.path)
    setattr(owner, name, value)
    owner._sources[name] = location
    return Override(path=target.path, old=target.value, new=new, text=text, dropped=dropped)


def _dropped(old: Any, new: Any, *, path: str) -> tuple[str, ...]:
    if not is_config(old) or not is_config(new) or new is old:
        return ()
    refused = taking_over(config_of(builds(new)), old=old).refused
    return tuple(lost_lines(old, new, refused=refused, path=path))


def _parse(text: str, target: Place, *, annotation: Any, rules: _Rules) -> Any:
    if text == "REQUIRED" and target.value is REQUIRED:
        return REQUIRED
    try:
        return parse_value(
            text, annotation=annotation, current=target.value, import_prefixes=rules.import_prefixes
        )
    except ParseError as e:
        if e.message is not None:
            raise InvalidOverrideError(f"{target.path}{e.part}: {e.message}") from e
        where, what = f"{target.path}{e.part}", text if e.part_text is None else e.part_text
        expected, nearest = e.expected, e.nearest
        advice = (e.advice or "").replace("PATH", where) or None
        if not e.part and advice is None:
            expected, advice = _about_classes(target, expected)
            nearest = nearest or _full_names(text, near=builds(target.value), rules=rules)
        raise InvalidOverrideError(
            error_message(
                where=where,
                what=f"cannot be set to '{what}'",
                expected=expected,
                nearest=nearest,
                advice=advice,
            )
        ) from e


def _about_classes(target: Place, expected: str) -> tuple[str, Optional[str]]:
    """Returns what is expected in a place for a class, a function or a config, and what to do."""
    named = "ame a class in full, as dumps print it, such as axlearn.common.layers.Linear"
    if is_config(target.value):
        fields = [f"{target.path}.{name}" for name, _ in target.value.items()]
        return expected, f"Set its fields: {listing(fields, limit=5)}. Or n{named}"
    if target.value is None and "a config" in expected:
        return expected, f"N{named}"
    if is_class_or_function(target.value):
        return "a class or a function, by the name that dumps print", None
    return expected, None


def _full_names(name: str, *, near: Any, rules: _Rules) -> list[str]:
    """Returns the full name of what lies in the same module as the class or function that is there now, or the name
    of the class whose config is called for.
    """
    bare = next((name.removesuffix(suffix) for suffix in CALLS if name.endswith(suffix)), None)
    if bare is not None and may_name(bare, import_prefixes=rules.import_prefixes):
        return [bare]
    is_named = name.isidentifier() and is_class_or_function(near)
    for module in (public_module(near.__module__ or ""), *FOREIGN_FUNCTIONS) if is_named else ():
        try:
            find_named(f"{module}.{name}", import_prefixes=rules.import_prefixes)
        except BadReferenceError:
            continue
        return [f"{module}.{name}"]
    return []
