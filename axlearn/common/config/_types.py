"""Checks a value against an annotation, containers with their contents.

An annotation becomes a checker once, when a field is first set. What has no rule here is not checked: an
annotation that cannot be resolved, a type variable, a protocol.
"""

import collections.abc
import enum
import functools
import inspect
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Optional, Union

from axlearn.common.config._formatters import is_dtype, is_partition_spec
from axlearn.common.config._names import definition_of, public_module, public_name, public_qualname
from axlearn.common.config._required import RequiredFieldValue


class Mismatch(NamedTuple):
    """A part of a value that is not what the annotation says.

    Attributes:
        path: Where inside of the value, such as `[2]['key']`; empty for the value itself.
        value: The part.
        expected: What the annotation says there, in words.
    """

    path: str
    value: Any
    expected: str


Checker = Callable[[Any, str], Optional[Mismatch]]

_UNCHECKED_TYPES = (typing.TypeVar, typing.ParamSpec, typing.ForwardRef, str)
_SEQUENCES = (
    collections.abc.Sequence,
    collections.abc.MutableSequence,
    collections.abc.Iterable,
    collections.abc.Collection,
    list,
)
_MAPPINGS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)
# Classes that stand for element types of arrays, as in `dtype=jnp.float32`.
_DTYPE_MODULES = ("numpy", "jax", "ml_dtypes")


def resolve_annotation(annotation: Any, *, globalns: dict[str, Any]) -> Any:
    """Evaluates an annotation that is, or contains, a string.

    Args:
        annotation: An annotation as it stands in the source.
        globalns: The names of the module that it stands in.

    Returns:
        The annotation with all names resolved, or `Any` where a name is not known (yet).
    """
    holder = types.SimpleNamespace(__annotations__={"field": annotation})
    try:
        return typing.get_type_hints(holder, globalns=globalns, localns={})["field"]
    except (AttributeError, NameError, SyntaxError, TypeError):
        return Any


def strip_annotation(annotation: Any) -> Any:
    """Removes what says nothing about values: `Annotated`, `NewType`, `Final`, a name from `type X = ...`."""
    while True:
        if typing.get_origin(annotation) in (typing.Annotated, typing.Final, typing.ClassVar):
            annotation = typing.get_args(annotation)[0]
        elif isinstance(annotation, typing.NewType):
            annotation = annotation.__supertype__
        elif type(annotation).__name__ == "TypeAliasType":
            annotation = annotation.__value__
        else:
            return annotation


def union_members(annotation: Any) -> list[Any]:
    """Returns the alternatives of a union, flattened and stripped; a list of one for everything else."""
    annotation = strip_annotation(annotation)
    if typing.get_origin(annotation) not in (Union, types.UnionType):
        return [annotation]
    return [member for arg in typing.get_args(annotation) for member in union_members(arg)]


def element_annotation(annotation: Any, key: Any) -> Any:
    """Returns the annotation of the part of a container at `key`, or `Any` where it does not say."""
    for member in union_members(annotation):
        origin, args = typing.get_origin(member), typing.get_args(member)
        if origin in _MAPPINGS and len(args) == 2:
            return args[1]
        if origin is tuple and len(args) == 2 and args[1] is Ellipsis:
            return args[0]
        if origin is tuple and isinstance(key, int) and -len(args) <= key < len(args):
            return args[key]
        if origin in _SEQUENCES and len(args) == 1:
            return args[0]
    return Any


def enum_keys(annotation: Any) -> list[enum.Enum]:
    """Returns the members of enums that an annotation of a mapping has for keys."""
    keys = [
        typing.get_args(member)[0]
        for member in union_members(annotation)
        if typing.get_origin(member) in _MAPPINGS and typing.get_args(member)
    ]
    members: list[enum.Enum] = []
    for kind in (kind for key in keys for kind in union_members(key)):
        if isinstance(kind, type) and issubclass(kind, enum.Enum):
            members.extend(kind)
    return members


def describe(annotation: Any) -> str:
    """Returns an annotation in words, for "Expected ..."."""
    members = [m for m in union_members(annotation) if m is not RequiredFieldValue]
    return " or ".join(dict.fromkeys(_describe_member(m) for m in sorted(members, key=_is_none)))


def _is_none(annotation: Any) -> bool:
    return annotation is None or annotation is type(None)


def _describe_member(annotation: Any) -> str:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if _is_none(annotation):
        return "None"
    if origin is Literal:
        return " or ".join(repr(arg) for arg in args)
    if annotation is Callable or origin is collections.abc.Callable:
        return "a function"
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return f"{annotation.__name__} ({', '.join(str(member) for member in annotation)})"
    if getattr(origin or annotation, "_matches_type_args", None) is not None and not _is_nested(annotation):
        return f"a config of {describe(args[0])}" if args and args[0] is not Any else "a config"
    if origin is not None and args:
        parts = ", ".join("..." if arg is Ellipsis else describe(arg) for arg in args if arg != [])
        return f"{_class_name(origin)}[{parts}]"
    return _class_name(annotation)


def _is_nested(annotation: Any) -> bool:
    """Whether a config class is the `Config` of something, whose name says more than "a config"."""
    return isinstance(annotation, type) and "." in definition_of(annotation)[1]


def _class_name(annotation: Any) -> str:
    if annotation is inspect.Parameter.empty:
        return "anything"
    if not isinstance(annotation, type):
        return str(annotation).removeprefix("typing.").replace("~", "")
    module, qualname = definition_of(annotation)
    if module in ("builtins", "collections.abc", "typing"):
        return qualname
    return f"{public_module(module)}.{qualname}"


def make_checker(annotation: Any) -> Optional[Checker]:
    """Turns an annotation into a function that finds what is wrong with a value.

    Args:
        annotation: A resolved annotation.

    Returns:
        A function of a value and the path to it that returns the first mismatch or None; None in place of the
        function where there is nothing to check.
    """
    annotation = strip_annotation(annotation)
    if annotation in (Any, object, inspect.Parameter.empty) or isinstance(annotation, _UNCHECKED_TYPES):
        return None
    origin = typing.get_origin(annotation)
    args = typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        return _union_checker(annotation)
    if origin is Literal:
        return _predicate_checker(lambda value: _is_literal(value, args), annotation)
    if annotation is type or origin is type:
        return _type_checker(annotation, args)
    if annotation in (Callable, collections.abc.Callable) or origin is collections.abc.Callable:
        return _predicate_checker(callable, annotation)
    if tuple in (annotation, origin):
        return _tuple_checker(annotation, args)
    if annotation in _SEQUENCES or origin in _SEQUENCES:
        return _sequence_checker(annotation, origin or annotation, args)
    if annotation in _MAPPINGS or origin in _MAPPINGS:
        return _mapping_checker(annotation, args)
    if _is_none(annotation):
        return _predicate_checker(lambda value: value is None, annotation)
    if isinstance(origin or annotation, type):
        return _class_checker(annotation, origin or annotation, args)
    return None


def _predicate_checker(predicate: Callable[[Any], bool], annotation: Any) -> Checker:
    def check(value: Any, path: str) -> Optional[Mismatch]:
        return None if predicate(value) else Mismatch(path, value, describe(annotation))

    return check


def _is_literal(value: Any, args: tuple[Any, ...]) -> bool:
    return any(type(value) is type(arg) and value == arg for arg in args)


def _union_checker(annotation: Any) -> Optional[Checker]:
    maybe_checkers = [make_checker(member) for member in union_members(annotation)]
    checkers = [checker for checker in maybe_checkers if checker is not None]
    if len(checkers) < len(maybe_checkers):
        return None

    def check(value: Any, path: str) -> Optional[Mismatch]:
        found: list[Mismatch] = []
        for checker in checkers:
            mismatch = checker(value, path)
            if mismatch is None:
                return None
            found.append(mismatch)
        # The alternative that fits the outside of the value and fails within it is the one that was meant.
        deepest = max(found, key=lambda mismatch: len(mismatch.path))
        return deepest if len(deepest.path) > len(path) else Mismatch(path, value, describe(annotation))

    return check


def _type_checker(annotation: Any, args: tuple[Any, ...]) -> Checker:
    bounds = tuple(m for arg in args for m in union_members(arg) if isinstance(m, type))
    if len(bounds) < len([m for arg in args for m in union_members(arg)]):
        bounds = ()

    def is_legal(value: Any) -> bool:
        return isinstance(value, type) and (not bounds or issubclass(value, bounds))

    return _predicate_checker(is_legal, annotation)


def _tuple_checker(annotation: Any, args: tuple[Any, ...]) -> Checker:
    if len(args) == 2 and args[1] is Ellipsis:
        element: Optional[Checker] = make_checker(args[0])
        fixed: Optional[list[Optional[Checker]]] = None
    else:
        element = None
        fixed = [make_checker(arg) for arg in args] if args else None

    def check(value: Any, path: str) -> Optional[Mismatch]:
        if not isinstance(value, tuple) or (fixed is not None and len(value) != len(fixed)):
            return Mismatch(path, value, describe(annotation))
        return _check_elements(value, fixed or [element] * len(value), path)

    return check


def _sequence_checker(annotation: Any, origin: Any, args: tuple[Any, ...]) -> Checker:
    element = make_checker(args[0]) if args else None
    accepted: Any = list if origin in (list, collections.abc.MutableSequence) else (list, tuple, range)

    def check(value: Any, path: str) -> Optional[Mismatch]:
        if not isinstance(value, accepted):
            return Mismatch(path, value, describe(annotation))
        return _check_elements(value, [element] * len(value), path)

    return check


def _check_elements(
    values: Sequence[Any], checkers: Sequence[Optional[Checker]], path: str
) -> Optional[Mismatch]:
    for i, (value, checker) in enumerate(zip(values, checkers, strict=True)):
        mismatch = checker(value, f"{path}[{i}]") if checker is not None else None
        if mismatch is not None:
            return mismatch
    return None


def _mapping_checker(annotation: Any, args: tuple[Any, ...]) -> Checker:
    key_checker, value_checker = (make_checker(arg) for arg in args) if len(args) == 2 else (None, None)

    def check(value: Any, path: str) -> Optional[Mismatch]:
        if not isinstance(value, collections.abc.Mapping):
            return Mismatch(path, value, describe(annotation))
        for key, item in value.items():
            mismatch = key_checker(key, "") if key_checker is not None else None
            if mismatch is not None:
                return Mismatch(path, value, f"keys that are {mismatch.expected}, not {key!r}")
            mismatch = value_checker(item, f"{path}[{key!r}]") if value_checker is not None else None
            if mismatch is not None:
                return mismatch
        return None

    return check


def _class_checker(annotation: Any, cls: type, args: tuple[Any, ...]) -> Optional[Checker]:
    if getattr(cls, "_is_protocol", False):
        return _predicate_checker(callable, annotation) if "__call__" in vars(cls) else None
    if cls.__name__ == "dtype" and cls.__module__ == "numpy":
        return _predicate_checker(is_dtype_like, annotation)
    if cls.__name__ in ("PartitionSpec", "P") and cls.__module__.partition(".")[0] == "jax":
        # A tuple is how most partition specs are written.
        return _predicate_checker(lambda x: is_partition_spec(x) or isinstance(x, tuple), annotation)
    matches_args = getattr(cls, "_matches_type_args", None)
    if args and matches_args is not None:
        return _predicate_checker(lambda x: is_instance_of(x, cls) and matches_args(x, args), annotation)
    return _predicate_checker(functools.partial(_is_instance_flipped, cls), annotation)


def _is_instance_flipped(cls: type, value: Any) -> bool:
    return is_instance_of(value, cls)


def is_instance_of(value: Any, cls: type) -> bool:
    """Like `isinstance`, with numbers as annotations mean them: an int is a float, a bool is neither."""
    if cls is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if cls is complex:
        return isinstance(value, (int, float, complex)) and not isinstance(value, bool)
    if cls is int:
        return isinstance(value, int) and not isinstance(value, bool)
    try:
        return isinstance(value, cls)
    except TypeError:
        # A class that refuses the question, such as a protocol with data, cannot be checked.
        return True


def is_dtype_like(value: Any) -> bool:
    """Whether the value is a dtype or a scalar type of numpy, jax or ml_dtypes, such as `jnp.bfloat16`."""
    if is_dtype(value):
        return True
    return isinstance(value, type) and (
        value.__module__.partition(".")[0] in _DTYPE_MODULES or value in (bool, float, int, complex)
    )


def describe_value(value: Any) -> str:
    """Returns a value and its type for a message, cut where it is long."""
    if isinstance(value, type):
        return f"the class {public_name(value)}"
    if getattr(type(value), "_config_fields", None) is not None:
        return f"a {public_qualname(type(value))}"
    text = repr(value)
    # Long enough for every number and name, short enough for one line.
    max_len = 60
    if len(text) > max_len:
        text = text[: max_len - 3] + "..."
    return f"{text} ({type(value).__name__})"
