"""Values inside of a config: what may stand at a place, and another value put there."""

import copy
import itertools
from typing import Any

from axlearn.common.config._base import ConfigBase
from axlearn.common.config._fields import dataclass_fields
from axlearn.common.config._paths import Place, parse_path, walk
from axlearn.common.config._types import element_annotation
from axlearn.common.config._values import is_config, is_dataclass_instance, named_values, with_named_values


def owner_of(places: list[Place]) -> tuple[Any, list[Place]]:
    """Returns the config that the last of several places belongs to, and the places from its field on.

    Args:
        places: The places from the root on, two at least.
    """
    index = max(i for i, place in enumerate(places[:-1]) if is_config(place.value))
    return places[index].value, places[index + 1 :]


def annotation_at(places: list[Place]) -> Any:
    """Returns the annotation of the last of the places that lead to it from the root."""
    if len(places) == 1:
        return Any
    owner, inner = owner_of(places)
    annotation = owner._config_fields[inner[0].key].annotation
    for container, part in itertools.pairwise(inner):
        if is_dataclass_instance(container.value):
            annotation = dataclass_fields(type(container.value))[part.key].annotation
        else:
            annotation = element_annotation(annotation, part.key)
    return annotation


def set_value_at(root: ConfigBase, path: str, value: Any) -> None:
    """Sets what is at a path of a config, as dumps print paths: `a.b['key'][0].c`.

    Args:
        root: The config, which is changed in place.
        path: The path of something that is there.
        value: The new value.

    Raises:
        PathError: If the path is none or leads nowhere.
        InvalidConfigValueError: If the field does not take the value.
    """
    owner, inner = owner_of(walk(root, parse_path(path)))
    setattr(owner, inner[0].key, with_part_replaced(inner, value))


def with_part_replaced(inner: list[Place], new: Any) -> Any:
    """Returns the value of a config's field with one part of it replaced, leaving the old value as it is.

    Args:
        inner: The places from the field to the part.
        new: The new part.
    """
    result = new
    for container, part in zip(reversed(inner[:-1]), reversed(inner[1:]), strict=True):
        result = _with_part(container.value, part.key, result)
    return result


def _with_part(container: Any, key: Any, value: Any) -> Any:
    if named_values(container) is not None:
        return with_named_values(container, {key: value})
    if isinstance(container, tuple):
        return tuple(value if i == key else item for i, item in enumerate(container))
    result = copy.copy(container)
    result[key] = value
    return result
