"""Putting configs of one class in place of those of another, wherever in a tree they are."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Optional

from axlearn.common.config import (
    ConfigBase,
    Configurable,
    error_message,
    is_named_tuple,
    nearest_names,
    public_name,
    with_same_fields,
)


def replace_layer_config_recursively(
    cfg: ConfigBase,
    *,
    target_cls: type[Configurable],
    source_config: ConfigBase,
    exclude_keys: Optional[Sequence[str]] = None,
) -> int:
    """Replaces every `target_cls.Config` below a config by a copy of `source_config`.

    Each copy takes over the fields that the config in whose place it comes has too, but for `klass`. Configs
    inside of one that is replaced are replaced first; `source_config` itself is not searched.

    Args:
        cfg: The tree, changed in place; also searched inside of dicts, sequences and dataclasses.
        target_cls: The class whose configs, and subclasses of these, are replaced.
        source_config: What comes in their place.
        exclude_keys: Fields whose values are those of `source_config` all the same. None: none.

    Returns:
        How many were replaced.

    Raises:
        ValueError: If `cfg` itself is to be replaced, which cannot be done in place, or if `exclude_keys`
            names a field that `target_cls.Config` does not have.
    """
    _check_exclude_keys(exclude_keys or (), target_cls=target_cls)
    if isinstance(cfg, target_cls.Config):
        raise ValueError(
            error_message(
                what=f"the config to search is itself a {public_name(target_cls)}.Config",
                expected="a config above those to replace",
            )
        )
    count = 0

    def visit(value: Any) -> Any:
        nonlocal count
        if isinstance(value, ConfigBase):
            for name, child in value.items():
                new = visit(child)
                if new is not child:
                    value.set(**{name: new})
            if isinstance(value, target_cls.Config):
                count += 1
                return with_same_fields(source_config, old=value, exclude_keys=exclude_keys or ())
            return value
        return _map_parts(value, visit)

    visit(cfg)
    return count


def _check_exclude_keys(exclude_keys: Sequence[str], *, target_cls: type[Configurable]) -> None:
    known = target_cls.default_config().keys()
    for name in exclude_keys:
        if name not in known:
            raise ValueError(
                error_message(
                    where="exclude_keys",
                    what=f"{public_name(target_cls)} has no field {name!r}",
                    nearest=nearest_names(name, known),
                )
            )


def _map_parts(value: Any, fn: Any) -> Any:
    """A container with `fn` applied to each of its parts; the container itself where no part changes."""
    if isinstance(value, dict):
        named = {key: fn(item) for key, item in value.items()}
        return named if any(named[key] is not item for key, item in value.items()) else value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        changed = {name: new for name, old in fields.items() if (new := fn(old)) is not old}
        return dataclasses.replace(value, **changed) if changed else value
    if isinstance(value, list | tuple):
        items = [fn(item) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if is_named_tuple(value) else type(value)(items)
    return value
