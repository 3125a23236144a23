"""Another config in the place of one: what it takes over, and what is lost."""

from collections.abc import Collection
from typing import Any, NamedTuple, TypeVar

from axlearn.common.config._base import ConfigBase
from axlearn.common.config._configurable import Configurable
from axlearn.common.config._dump import flatten, join_path
from axlearn.common.config._errors import InvalidConfigValueError
from axlearn.common.config._formatters import format_leaf
from axlearn.common.config._function import (
    ClassConfigBase,
    FunctionConfigBase,
    config_for_class,
    config_for_function,
)
from axlearn.common.config._required import REQUIRED
from axlearn.common.config._values import values_equal

C = TypeVar("C", bound=ConfigBase)

# A default of these prints nothing.
_SILENT = (None, REQUIRED)


class Taken(NamedTuple):
    """A new config with what an old one said.

    Attributes:
        cfg: The new config.
        refused: The names of fields that both have and whose old value the new one does not take.
    """

    cfg: Any
    refused: tuple[str, ...]


def slot_of(cfg: Any) -> str:
    """Returns the name of the field that says what a config builds: "fn" or "klass"; "" where none does."""
    if isinstance(cfg, FunctionConfigBase):
        return "fn"
    return "klass" if isinstance(cfg, (ClassConfigBase, Configurable.Config)) else ""


def config_of(found: Any) -> Any:
    """Returns the default config of a class, or that of a function without arguments."""
    if not isinstance(found, type):
        return config_for_function(found)
    return found.default_config() if issubclass(found, Configurable) else config_for_class(found)


def with_same_fields(cfg: C, *, old: ConfigBase, exclude_keys: Collection[str] = ()) -> C:
    """Returns a copy of a config that takes over what an old one says.

    Args:
        cfg: The new config.
        old: The old config. Its value of each field that both have counts, unless it is REQUIRED; who set it is
            remembered.
        exclude_keys: Fields not to take over; what the config builds (`klass`, `fn`) never is.

    Returns:
        The copy.

    Raises:
        InvalidConfigValueError: If a field of the new config does not take the old one's value.
    """
    result = cfg.clone()
    for name in _shared_names(result, old):
        if name not in exclude_keys:
            _take(result, name, old=old)
    return result


def assign_fields(cfg: C, *, source: C) -> None:
    """Gives a config the fields of another one of its type, in place, with who set them."""
    for name, value in source.items():
        setattr(cfg, name, value)
        _copy_location(cfg, name, source=source)


def taking_over(cfg: Any, *, old: ConfigBase) -> Taken:
    """Like `with_same_fields`, where a value that does not fit is left out and its field named."""
    result, refused = cfg.clone(), []
    for name in _shared_names(result, old):
        try:
            _take(result, name, old=old)
        except InvalidConfigValueError:
            refused.append(name)
    return Taken(result, tuple(refused))


def _shared_names(cfg: ConfigBase, old: ConfigBase) -> list[str]:
    slots = (slot_of(cfg), slot_of(old))
    return [
        name for name, value in old.items() if name in cfg and name not in slots and value is not REQUIRED
    ]


def _take(cfg: ConfigBase, name: str, *, old: ConfigBase) -> None:
    setattr(cfg, name, getattr(old, name))
    # It is still the value that somebody set, or that nobody did, for the old one.
    _copy_location(cfg, name, source=old)


def _copy_location(cfg: ConfigBase, name: str, *, source: ConfigBase) -> None:
    if name in source._sources:
        cfg._sources[name] = source._sources[name]
    else:
        del cfg._sources[name]


def lost_lines(old: ConfigBase, new: ConfigBase, *, refused: Collection[str] = (), path: str) -> list[str]:
    """Returns what an old config said besides its defaults and the one in its place does not say.

    Args:
        old: The old config.
        new: The one that took over its fields.
        refused: Fields that both have, with values that the new one does not take.
        path: Where they are.

    Returns:
        Lines of `path: value`, as the old config's dump had them.
    """
    try:
        default = config_of(getattr(old, slot_of(old)))
    except (AttributeError, ValueError):
        # What it builds is not set, or has no signature any more: all of it counts.
        default = None
    lines = []
    for name, value in old.items():
        is_kept = name == slot_of(old) or (name in new and name not in refused)
        is_default = default is not None and name in default and values_equal(value, getattr(default, name))
        if is_kept or is_default or value is REQUIRED:
            continue
        leaves = dict(flatten(value, path=join_path(path, name), omitted=_SILENT))
        if default is not None and name in default:
            before = dict(flatten(getattr(default, name), path=join_path(path, name), omitted=_SILENT))
            leaves = {k: v for k, v in leaves.items() if k not in before or not values_equal(v, before[k])}
        lines += [f"{leaf_path}: {format_leaf(leaf)}" for leaf_path, leaf in leaves.items()]
    return lines
