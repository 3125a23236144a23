"""The fields of a config class: name, annotation, default, and the check of a value."""

import dataclasses
import sys
from typing import Any, Optional

from axlearn.common.config._formatters import has_formatter
from axlearn.common.config._required import REQUIRED
from axlearn.common.config._types import Checker, Mismatch, make_checker, resolve_annotation
from axlearn.common.config._values import is_dataclass_instance


class _Missing:
    """The default of a field that must be given when a config is created."""

    def __repr__(self) -> str:
        return "MISSING"


MISSING: Any = _Missing()


class Field:
    """One field of a config class.

    Attributes:
        name: The field's name.
        default: What a new config holds; MISSING if it must be given.
        globalns: The names that a string in the annotation may use.
    """

    __slots__ = ("_annotation", "_checker", "_resolved", "default", "globalns", "name")

    def __init__(self, *, name: str, annotation: Any, default: Any, globalns: dict[str, Any]) -> None:
        self.name = name
        self.default = default
        self.globalns = globalns
        self._annotation = annotation
        self._resolved = False
        self._checker: Optional[Checker] = None

    @property
    def annotation(self) -> Any:
        """The annotation with names resolved; `Any` as long as they cannot be."""
        return resolve_annotation(self._annotation, globalns=self.globalns)

    def check(self, value: Any) -> Optional[Mismatch]:
        """Returns what is wrong with a value for this field, or None.

        None is legal where it is the default, and REQUIRED where it is: so sloppy annotations mean it.
        """
        if (value is None or value is REQUIRED) and value is self.default:
            return None
        if not self._resolved:
            annotation = self.annotation
            self._checker = make_checker(annotation)
            # A name that is not known while its module is being loaded may be known later.
            self._resolved = annotation is not Any
        return self._checker(value, "") if self._checker is not None else None


def module_names(module: str) -> dict[str, Any]:
    """Returns the live namespace of a module, or an empty one for a module that is not loaded."""
    names: dict[str, Any] = getattr(sys.modules.get(module), "__dict__", {})
    return names


_DATACLASS_FIELDS: dict[type, dict[str, Field]] = {}


def dataclass_fields(cls: type) -> dict[str, Field]:
    """Returns the checkable fields of a dataclass."""
    fields = _DATACLASS_FIELDS.get(cls)
    if fields is None:
        fields = {}
        for base in reversed(cls.__mro__):
            globalns = module_names(base.__module__)
            for name, annotation in vars(base).get("__annotations__", {}).items():
                fields[name] = Field(name=name, annotation=annotation, default=MISSING, globalns=globalns)
        for field in dataclasses.fields(cls):
            fields[field.name].default = field.default
        _DATACLASS_FIELDS[cls] = fields
    return fields


def find_bad_dataclass_field(value: Any, *, path: str = "") -> Optional[Mismatch]:
    """Returns the first dataclass field of the wrong type in `value` or in its lists, tuples and dicts."""
    if type(value) in (list, tuple):
        parts = [(f"[{i}]", item) for i, item in enumerate(value)]
    elif type(value) is dict:
        parts = [(f"[{key!r}]", item) for key, item in value.items()]
    elif is_dataclass_instance(value) and not has_formatter(value):
        fields = dataclass_fields(type(value))
        parts = [(f"[{f.name!r}]", getattr(value, f.name)) for f in dataclasses.fields(value)]
        for (suffix, item), field in zip(parts, dataclasses.fields(value), strict=True):
            found = fields[field.name].check(item)
            if found is not None:
                return Mismatch(path + suffix + found.path, found.value, found.expected)
    else:
        return None
    for suffix, item in parts:
        found = find_bad_dataclass_field(item, path=path + suffix)
        if found is not None:
            return found
    return None
