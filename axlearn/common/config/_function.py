"""Configs made from the signature of a function or of a class that knows nothing about configs."""

import functools
import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any, Optional, TypeVar

from axlearn.common.config._base import config_class
from axlearn.common.config._class_fields import install_config_class
from axlearn.common.config._configurable import (
    InstantiableConfig,
    add_path_note,
    check_required,
    public_name_or_repr,
)
from axlearn.common.config._errors import InvalidConfigValueError, error_message
from axlearn.common.config._fields import Field
from axlearn.common.config._formatters import is_function_like
from axlearn.common.config._names import definition_of
from axlearn.common.config._required import REQUIRED

T = TypeVar("T")

_BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
# Functions with configs of their own; more would mean that functions are made in a loop.
_MAX_CACHED = 1024


@config_class
class FunctionConfigBase(InstantiableConfig[Any]):
    """The arguments of a function; instantiating calls it."""

    # The function.
    fn: Callable[..., Any]

    def instantiate(self, **kwargs: Any) -> Any:
        """Calls the function.

        Args:
            **kwargs: Arguments that win over the fields.

        Returns:
            What the function returns. Arguments that are configs are passed as configs.

        Raises:
            RequiredFieldMissingError: If arguments have neither a value nor a default.
        """
        return _call(self, self.fn, kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _blank_function_config, (self.fn,), self.__getstate__()


@config_class
class ClassConfigBase(InstantiableConfig[Any]):
    """The arguments of a class; instantiating makes an object of it."""

    # The class.
    klass: type

    def instantiate(self, **kwargs: Any) -> Any:
        """Makes an object of the class, as `FunctionConfigBase.instantiate` calls a function."""
        return _call(self, self.klass, kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _blank_class_config, (self.klass,), self.__getstate__()


def _blank_function_config(fn: Callable[..., Any]) -> FunctionConfigBase:
    """Returns a config without values, for unpickling."""
    cls = _function_config_class(fn)
    return cls.__new__(cls)


def _blank_class_config(klass: type) -> ClassConfigBase:
    """Returns a config without values, for unpickling."""
    cls = _class_config_class(klass)
    return cls.__new__(cls)


def _call(cfg: Any, fn: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
    cfg = cfg if cfg.is_frozen else cfg.clone().freeze()
    what = public_name_or_repr(fn)
    positional, named = _arguments(cfg, fn, kwargs, what=what)
    try:
        return fn(*positional, **named)
    except Exception as e:
        add_path_note(e, path=cfg._path, what=what)
        raise


def _arguments(
    cfg: Any, fn: Callable[..., Any], kwargs: dict[str, Any], *, what: str
) -> tuple[list[Any], dict[str, Any]]:
    """Merges fields and `kwargs` into the arguments of a call."""
    named = dict(kwargs)
    positional: list[Any] = []
    missing: list[str] = []
    extra: Optional[dict[str, Any]] = None
    parameters = _parameters(fn)
    has_var_args = any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters)
    for parameter in parameters:
        name = parameter.name
        value = named.pop(name) if name in named else getattr(cfg, name)
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            # Nobody has to give any: arguments that a function merely passes on are absent until set.
            extra = {} if value is REQUIRED or value is None else value
        elif value is REQUIRED:
            missing.append(name)
        elif parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            positional += value
        elif parameter.kind is inspect.Parameter.POSITIONAL_ONLY or (
            has_var_args and parameter.kind in _BY_POSITION
        ):
            # What follows *args on the left can be given by position only.
            positional.append(value)
        else:
            named[name] = value
    check_required(cfg, what=what, names=missing)
    return positional, {**(extra or {}), **named}


@functools.lru_cache(maxsize=_MAX_CACHED)
def _parameters(fn: Callable[..., Any]) -> tuple[inspect.Parameter, ...]:
    try:
        return tuple(inspect.signature(fn).parameters.values())
    except ValueError as e:
        raise ValueError(
            error_message(
                where=public_name_or_repr(fn),
                what="has no signature, so it cannot have a config",
                advice="Write a Python function that calls it",
            )
        ) from e


def _fields_of_signature(fn: Callable[..., Any], *, reserved: tuple[str, ...]) -> dict[str, Field]:
    """Returns a field for every parameter; those without a default are REQUIRED."""
    code = inspect.unwrap(fn.__init__ if isinstance(fn, type) else fn)  # type: ignore[misc]
    globalns: dict[str, Any] = getattr(code, "__globals__", {})
    fields = {}
    for parameter in _parameters(fn):
        if parameter.name in reserved:
            raise ValueError(
                error_message(
                    where=public_name_or_repr(fn),
                    what=f"a parameter called '{parameter.name}' cannot be a field of a config",
                    advice="Rename it",
                )
            )
        has_default = parameter.default is not inspect.Parameter.empty
        fields[parameter.name] = Field(
            name=parameter.name,
            annotation=_field_annotation(parameter),
            default=parameter.default if has_default else REQUIRED,
            globalns=globalns,
        )
    return fields


def _field_annotation(parameter: inspect.Parameter) -> Any:
    annotation = parameter.annotation
    if annotation is inspect.Parameter.empty:
        annotation = Any
    if isinstance(annotation, str) and parameter.kind in (
        inspect.Parameter.VAR_POSITIONAL,
        inspect.Parameter.VAR_KEYWORD,
    ):
        annotation = Any
    if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
        return types.GenericAlias(Sequence, (annotation,))
    if parameter.kind is inspect.Parameter.VAR_KEYWORD:
        return types.GenericAlias(dict, (str, annotation))
    return annotation


def config_for_function(fn: Callable[..., T]) -> Any:
    """Returns a config whose fields are the parameters of a function.

    Args:
        fn: A function. A parameter without a default becomes a REQUIRED field, `*args` a list, `**kwargs` a
            dict.

    Returns:
        A config with these fields and `fn`. Instantiating it calls `fn`.

    Raises:
        InvalidConfigValueError: If `fn` is not a function.
        ValueError: If a parameter is called `fn` or `_`, or in a way that fields cannot be called.
    """
    if isinstance(fn, type) or not (is_function_like(fn) or inspect.isroutine(fn)):
        advice = (
            "Use config_for_class"
            if isinstance(fn, type)
            else "Give it the function itself, and set arguments"
        )
        raise InvalidConfigValueError(
            error_message(where="config_for_function", what=f"{fn!r} is not a function", advice=advice)
        )
    return _function_config_class(fn)(fn=fn)


@functools.lru_cache(maxsize=_MAX_CACHED)
def _function_config_class(fn: Callable[..., Any]) -> type[FunctionConfigBase]:
    cls = type("FunctionConfig", (FunctionConfigBase,), {"__module__": fn.__module__})
    own = _fields_of_signature(fn, reserved=("fn", "_"))
    install_config_class(cls, own=own, kind="config_for_function", origin=definition_of(fn))
    return cls


def config_for_class(cls: type[T]) -> Any:
    """Returns a config whose fields are the parameters of a class.

    Args:
        cls: A class. A parameter without a default becomes a REQUIRED field, `*args` a list, `**kwargs` a
            dict.

    Returns:
        A config with these fields and `klass`. Instantiating it makes an object of `cls`.

    Raises:
        InvalidConfigValueError: If `cls` is not a class.
        ValueError: If a parameter is called `klass` or `_`, or in a way that fields cannot be called.
    """
    if not isinstance(cls, type):
        raise InvalidConfigValueError(
            error_message(
                where="config_for_class", what=f"{cls!r} is not a class", advice="Use config_for_function"
            )
        )
    return _class_config_class(cls)(klass=cls)  # type: ignore[arg-type]


@functools.lru_cache(maxsize=_MAX_CACHED)
def _class_config_class(cls: type) -> type[ClassConfigBase]:
    result = type("ClassConfig", (ClassConfigBase,), {"__module__": cls.__module__})
    own = _fields_of_signature(cls, reserved=("klass", "_"))
    install_config_class(result, own=own, kind="config_for_class", origin=definition_of(cls))
    return result
