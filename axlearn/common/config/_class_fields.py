"""What `@config_class` does to a class: finds, checks and installs its fields."""

import inspect
import re
import types
from typing import Any

from axlearn.common.config._errors import (
    InvalidConfigNameError,
    InvalidConfigValueError,
    MissingConfigClassDecoratorError,
    NonConfigFieldError,
    error_message,
)
from axlearn.common.config._fields import MISSING, Field, find_bad_dataclass_field
from axlearn.common.config._names import public_module, public_qualname
from axlearn.common.config._types import describe_value
from axlearn.common.config._values import find_unstorable, unstorable_message

_NAME_PATTERN = re.compile(r"[a-z][a-z0-9_]*")


def prepared_fields(cls: Any) -> dict[str, Field]:
    """Returns the fields of a class, having checked once that it is decorated and its defaults are legal."""
    if "_config_ready" not in vars(cls):
        _prepare(cls)
    fields: dict[str, Field] = cls._config_fields
    return fields


def _prepare(cls: Any) -> None:
    if "_config_fields" not in vars(cls):
        _refuse_undecorated(cls)
        _install_fields(cls, own={})
    for field in cls._config_fields.values():
        _check_default(cls, field)
    cls._config_ready = True


def _check_default(cls: Any, field: Field) -> None:
    if field.default is MISSING:
        return
    unstorable = find_unstorable(field.default)
    if unstorable is not None:
        raise InvalidConfigValueError(
            unstorable_message(unstorable, name=f"default {field.name}", where=public_qualname(cls))
        )
    mismatch = field.check(field.default) or find_bad_dataclass_field(field.default)
    if mismatch is not None:
        value = describe_value(mismatch.value)
        raise InvalidConfigValueError(
            error_message(
                where=public_qualname(cls),
                what=f"default {field.name}{mismatch.path}={value} has the wrong type",
                expected=mismatch.expected,
            )
        )


def _refuse_undecorated(cls: Any) -> None:
    if inspect.get_annotations(cls):
        names = ", ".join(sorted(inspect.get_annotations(cls)))
        raise MissingConfigClassDecoratorError(
            error_message(
                where=public_qualname(cls),
                what=f"adds fields ({names}) without being a config class",
                advice="Write @config_class above the class",
            )
        )
    own_annotations(cls)


def validate_config_field_name(name: str) -> None:
    """Checks the name of a field. (That no method of configs is called so, `config_class` checks.)

    Args:
        name: Lower-case letters, digits and underscores, beginning with a letter.

    Raises:
        InvalidConfigNameError: If it is not such a name.
    """
    if not _NAME_PATTERN.fullmatch(name):
        raise InvalidConfigNameError(
            error_message(
                what=f'Invalid config field name "{name}"',
                expected="lower-case letters, digits and underscores, beginning with a letter",
            )
        )


def own_annotations(cls: type) -> dict[str, Any]:
    """Returns the annotations in a class's body, having checked that all else in it is methods."""
    annotations = inspect.get_annotations(cls)
    for key, value in vars(cls).items():
        if key in annotations or (key[:2] == "__" and key[-2:] == "__") or key.startswith("_config_"):
            continue
        if key == "_abc_impl" or isinstance(
            value, (types.FunctionType, classmethod, staticmethod, property, types.MemberDescriptorType)
        ):
            continue
        raise NonConfigFieldError(
            error_message(
                what=f"Non-config attribute is not supported: {public_qualname(cls)}.{key}",
                advice="Please make sure all config attributes are annotated with typehints",
            )
        )
    return annotations


def _install_fields(cls: Any, *, own: dict[str, Field]) -> None:
    fields: dict[str, Field] = {}
    for base in reversed(cls.__mro__[1:]):
        fields.update(vars(base).get("_config_fields", {}))
    for name in own:
        # A field that is declared again moves to where it is declared.
        fields.pop(name, None)
    cls._config_fields = {**fields, **own}
    for name in own:
        if any(name in vars(base) for base in cls.__mro__):
            raise InvalidConfigNameError(
                error_message(
                    where=public_qualname(cls),
                    what=f"a field cannot be called '{name}', which is a method of configs",
                )
            )


def install_config_class(cls: Any, *, own: dict[str, Field], kind: str, origin: tuple[str, str]) -> None:
    """Makes a class a config class and renames it.

    Args:
        cls: A subclass of `ConfigBase`.
        own: The fields that it declares itself.
        kind: What its new name begins with, such as "config_class".
        origin: Module and qualified name of what the config stands for.
    """
    for name in own:
        validate_config_field_name(name)
    cls._config_origin = origin
    _install_fields(cls, own=own)
    cls.__name__ = cls.__qualname__ = f"{kind}({public_module(origin[0])}.{origin[1]})"
