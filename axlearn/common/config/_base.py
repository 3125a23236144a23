"""`ConfigBase` and `config_class`: typed, checked, copied on assignment, frozen before something is built."""

import functools
import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Optional, Self, TypeVar, dataclass_transform

from axlearn.common.config._class_fields import (
    install_config_class,
    own_annotations,
    prepared_fields,
    validate_config_field_name,
)
from axlearn.common.config._dump import (
    EnterFn,
    ExitFn,
    VisitFn,
    flatten,
    format_lines,
    is_omitted,
    join_path,
    to_plain,
    visit,
)
from axlearn.common.config._errors import (
    FrozenConfigError,
    InvalidConfigClassError,
    InvalidConfigValueError,
    UnknownFieldError,
    error_message,
)
from axlearn.common.config._fields import MISSING, Field, find_bad_dataclass_field, module_names
from axlearn.common.config._messages import (
    frozen_message,
    mismatch_message,
    set_at,
    unknown_field_message,
    where_is,
)
from axlearn.common.config._names import public_qualname
from axlearn.common.config._provenance import SourceLocation, caller_location
from axlearn.common.config._required import REQUIRED
from axlearn.common.config._values import (
    child_items,
    copy_value,
    find_unstorable,
    is_config,
    unstorable_message,
    values_equal,
)

C = TypeVar("C", bound=type)

_set_slot = object.__setattr__


class ConfigBase:
    """The base of all configs: a fixed set of typed fields, which `@config_class` collects.

    A value belongs to the config that it is assigned to: assignment stores a copy, and configs nested
    anywhere in it are part of the tree. Values are checked against the field's annotation, contents of
    containers included.
    """

    __slots__ = ("__dict__", "__weakref__", "_frozen", "_path", "_sources")

    # All fields in order of declaration, those of the bases first.
    _config_fields: ClassVar[dict[str, Field]] = {}
    # The module and qualified name under which the class was written.
    _config_origin: ClassVar[tuple[str, str]]

    # Whether the config is read-only.
    _frozen: bool
    # Where the config is, or was copied from, in a frozen tree; empty at the root and where nobody knows.
    _path: str
    # Who set which field; fields that still have their default are absent.
    _sources: dict[str, Optional[SourceLocation]]

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, **kwargs: Any) -> None:
        """Creates a config from the defaults of its fields and `kwargs`.

        Args:
            **kwargs: Values of fields; those without a default are necessary.

        Raises:
            TypeError: If a field without a default is not given.
        """
        fields = prepared_fields(type(self))
        _set_state(self, path="", sources={})
        values = self.__dict__
        missing = []
        for name, field in fields.items():
            if field.default is MISSING:
                missing += [name] if name not in kwargs else []
            else:
                values[name] = copy_value(field.default)
        if missing:
            raise TypeError(
                error_message(
                    where=public_qualname(type(self)), what=f"missing arguments {', '.join(missing)}"
                )
            )
        for name, value in kwargs.items():
            setattr(self, name, value)

    def _set_field(self, name: str, value: Any) -> None:
        """Sets a field, or a double-underscored attribute that Python's own machinery wants to keep here."""
        if name[:2] == "__" and name[-2:] == "__":
            _set_slot(self, name, value)
            return
        location = caller_location()
        field = self._config_fields.get(name)
        if field is None:
            raise UnknownFieldError(unknown_field_message(self, name, location))
        if self._frozen:
            raise FrozenConfigError(frozen_message(self, name, location))
        _check(self, field, value, location)
        self.__dict__[name] = copy_value(value)
        self._sources[name] = location

    def _get_missing(self, name: str) -> Any:
        """Raises the error about a field that is not there."""
        # Called only for names that are not there; copying and pickling ask for many double-underscored ones.
        if name[:2] == "__" and name[-2:] == "__":
            raise AttributeError(name)
        raise UnknownFieldError(unknown_field_message(self, name, None))

    if not TYPE_CHECKING:
        # A type checker that saw these would take every name for a field.
        __setattr__ = _set_field
        __getattr__ = _get_missing

    def __delattr__(self, name: str) -> None:
        raise FrozenConfigError(
            error_message(
                where=where_is(self),
                what=f"cannot delete field '{name}'",
                advice="Set it to None or REQUIRED",
            )
        )

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other) or not isinstance(other, ConfigBase):
            return NotImplemented
        return all(values_equal(value, getattr(other, name)) for name, value in self.items())

    def __contains__(self, name: str) -> bool:
        return name in self._config_fields

    def __len__(self) -> int:
        return len(self._config_fields)

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={getattr(self, name)!r}" for name in self._config_fields)
        return f"{type(self).__qualname__}({fields})"

    def __str__(self) -> str:
        return self.debug_string()

    def __copy__(self) -> Self:
        return self._copy()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self._copy()

    def __reduce__(self) -> tuple[Any, ...]:
        return _blank_config, self._config_origin, self.__getstate__()

    def __getstate__(self) -> dict[str, Any]:
        return {
            "values": dict(self.__dict__),
            "path": self._path,
            "sources": self._sources,
            "frozen": self._frozen,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        _set_state(self, path=state["path"], sources=state["sources"], frozen=state["frozen"])
        self.__dict__.update(state["values"])

    def _copy(self) -> Self:
        """Returns an unfrozen copy of the tree below; its values were checked when they were set."""
        result = type(self).__new__(type(self))
        _set_state(result, path=self._path, sources=dict(self._sources))
        result.__dict__.update({name: copy_value(value) for name, value in self.__dict__.items()})
        return result

    def keys(self) -> list[str]:
        """Returns the names of the fields in alphabetical order."""
        return sorted(self._config_fields)

    def items(self) -> list[tuple[str, Any]]:
        """Returns names and values of the fields in alphabetical order of the names."""
        values = self.__dict__
        return [(name, values[name]) for name in sorted(self._config_fields)]

    def set(self, **kwargs: Any) -> Self:
        """Sets fields.

        Args:
            **kwargs: Values by name of field; each is checked and copied.

        Returns:
            This config.

        Raises:
            UnknownFieldError: If there is no field of a name.
            InvalidConfigValueError: If a value does not suit the annotation of its field.
            FrozenConfigError: If this config is frozen.
        """
        for name, value in kwargs.items():
            setattr(self, name, value)
        return self

    def clone(self, **kwargs: Any) -> Self:
        """Returns an unfrozen deep copy, with some fields set."""
        return self._copy().set(**kwargs)

    @property
    def is_frozen(self) -> bool:
        """Whether setting a field raises."""
        return self._frozen

    def freeze(self) -> Self:
        """Makes this config and all configs below it read-only, for good, and lets each know its path.

        Containers inside of a frozen config are not wrapped: they must not be changed.

        Returns:
            This config.
        """
        if not self._frozen:
            _freeze(self, self._path)
        return self

    def where_set(self, field: str) -> Optional[SourceLocation]:
        """Returns the line that set a field last, or None for a field that still has its default.

        Args:
            field: The name of a field.

        Raises:
            UnknownFieldError: If there is none of this name.
        """
        if field not in self._config_fields:
            raise UnknownFieldError(unknown_field_message(self, field, None))
        return self._sources.get(field)

    def get_recursively(self, path: Sequence[str]) -> Any:
        """Returns what is at a sequence of field names; an empty sequence gives this config."""
        value: Any = self
        for name in path:
            value = getattr(value, name)
        return value

    def set_recursively(self, path: Sequence[str], *, value: Any) -> None:
        """Sets the field at a sequence of field names.

        Args:
            path: At least one name.
            value: The value of the last one.

        Raises:
            ValueError: If the path is empty.
        """
        if not path:
            raise ValueError(error_message(what="Path is empty", expected="at least one name of a field"))
        setattr(self.get_recursively(path[:-1]), path[-1], value)

    def visit(
        self, visit_fn: VisitFn, enter_fn: Optional[EnterFn] = None, exit_fn: Optional[ExitFn] = None
    ) -> None:
        """Walks the tree below this config, depth first.

        Configs are entered in alphabetical order of their fields, dicts, dataclasses, lists and tuples in
        their own.

        Args:
            visit_fn: Called with path and value of each leaf.
            enter_fn: Called with path, value and the pairs of path and value directly below it (None for a
                leaf); returns the pairs to walk, or None to have the value visited as a leaf. None: walk
                everything.
            exit_fn: Called with path and value of each inner node after everything below it. None: not
                called.
        """
        visit(self, path="", visit_fn=visit_fn, enter_fn=enter_fn, exit_fn=exit_fn)

    def to_dict(self) -> dict[str, Any]:
        """Returns nested dicts in place of configs, and names in place of classes and functions."""
        result: dict[str, Any] = to_plain(self)
        return result

    def to_flat_dict(self, *, omit_default_values: Sequence[Any] = (None, REQUIRED)) -> dict[str, Any]:
        """Returns the leaves by their paths, in the order of a dump.

        Args:
            omit_default_values: A field is left out where its value is its default and, by identity, one of
                these.
        """
        result: dict[str, Any] = {}
        for name, value in self.items():
            if not is_omitted(value, self._config_fields[name].default, omit_default_values):
                result.update(flatten(value, path=name, omitted=omit_default_values))
        return result

    def debug_string(
        self,
        *,
        kv_separator: str = ": ",
        field_separator: str = "\n",
        omit_default_values: Sequence[Any] = (None, REQUIRED),
    ) -> str:
        """Returns the dump: a line per leaf with its path and value.

        Args:
            kv_separator: Stands between path and value.
            field_separator: Stands between two leaves.
            omit_default_values: A field is left out where its value is its default and, by identity, one of
                these.
        """
        flat = self.to_flat_dict(omit_default_values=omit_default_values)
        return format_lines(flat, kv_separator=kv_separator, field_separator=field_separator)


def _set_state(
    cfg: ConfigBase, *, path: str, sources: dict[str, Optional[SourceLocation]], frozen: bool = False
) -> None:
    _set_slot(cfg, "_frozen", frozen)
    _set_slot(cfg, "_path", path)
    _set_slot(cfg, "_sources", sources)


def _blank_config(module: str, qualname: str) -> ConfigBase:
    """Returns a config without values, for unpickling; its class was renamed, so pickle cannot find it."""
    cls: Any = functools.reduce(getattr, qualname.split("."), importlib.import_module(module))
    blank: ConfigBase = cls.__new__(cls)
    return blank


def _freeze(value: Any, path: str) -> None:
    if is_config(value):
        _set_slot(value, "_frozen", True)
        _set_slot(value, "_path", path)
        for name, item in value.__dict__.items():
            _freeze(item, join_path(path, name))
        return
    for suffix, item in child_items(value) or ():
        _freeze(item, path + suffix)


@dataclass_transform(kw_only_default=True)
def config_class(cls: C) -> C:
    """Makes a subclass of a config class with annotated attributes a config class with these fields.

    Fields are annotated attributes with or without a default. They can be declared again in subclasses with
    other defaults and types. Type checkers see them as the fields of a dataclass.

    Args:
        cls: A subclass of `ConfigBase`.

    Returns:
        The same class.

    Raises:
        InvalidConfigClassError: If `cls` is not a subclass of `ConfigBase`.
        NonConfigFieldError: If its body holds anything but annotated attributes and methods.
        InvalidConfigNameError: If the name of a field is not legal.
    """
    if not isinstance(cls, type) or not issubclass(cls, ConfigBase):
        raise InvalidConfigClassError(f"A config class must be a subclass of ConfigBase: {cls}.")
    globalns = module_names(cls.__module__)
    own = {}
    for name, annotation in own_annotations(cls).items():
        validate_config_field_name(name)
        default = vars(cls).get(name, MISSING)
        if default is not MISSING:
            # A default lives in the field: on the class it would be one object that everybody shares.
            delattr(cls, name)
        own[name] = Field(name=name, annotation=annotation, default=default, globalns=globalns)
    install_config_class(cls, own=own, kind="config_class", origin=(cls.__module__, cls.__qualname__))
    return cls


def _check(cfg: ConfigBase, field: Field, value: Any, location: Optional[SourceLocation]) -> None:
    """Raises InvalidConfigValueError where the value cannot be that of the field."""
    mismatch = field.check(value)
    if mismatch is None:
        unstorable = find_unstorable(value)
        if unstorable is not None:
            raise InvalidConfigValueError(
                unstorable_message(unstorable, name=field.name, where=where_is(cfg), set_at=set_at(location))
            )
        mismatch = find_bad_dataclass_field(value)
    if mismatch is not None:
        raise InvalidConfigValueError(mismatch_message(cfg, field, mismatch, location))
