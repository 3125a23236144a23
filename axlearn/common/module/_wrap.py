"""How public methods of modules come to run in contexts of their own: classes are made with them wrapped."""

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, TypeVar

import jax

from axlearn.common.module._context import current_context

_F = TypeVar("_F", bound=Callable[..., Any])

# Attributes of functions.
_NOWRAP = "_axlearn_nowrap"
_WRAPPED = "_axlearn_wrapped"
# Starts the note on a failed call; also tells that an exception already has one.
_NOTE_PREFIX = "Failed in module "


def nowrap(fn: _F) -> _F:
    """Marks a public method, and what overrides it, to run in whatever context its caller has, or in none."""
    setattr(fn, _NOWRAP, True)
    return fn


def _is_instance_method(value: Any) -> bool:
    if not isinstance(value, types.FunctionType):
        return False
    return next(iter(inspect.signature(value).parameters), None) == "self"


def _needs_wrapping(cls: type, name: str, value: Any) -> bool:
    if name.startswith("_") or not _is_instance_method(value) or getattr(value, _WRAPPED, False):
        return False
    return not any(getattr(vars(base).get(name), _NOWRAP, False) for base in cls.__mro__)


def wrap_methods(cls: type, *, root: type) -> None:
    """Wraps the public methods that `cls` defines, and those it takes from bases that are no modules.

    Args:
        cls: A subclass of `root`.
        root: The base class of all modules, whose own methods stay as they are.
    """
    for name, value in list(vars(cls).items()):
        if _needs_wrapping(cls, name, value):
            setattr(cls, name, _in_own_context(value))
    for base in cls.__mro__:
        if issubclass(base, root) or issubclass(root, base):
            continue
        for name, value in vars(base).items():
            if name not in vars(cls) and _needs_wrapping(cls, name, value) and getattr(cls, name) is value:
                setattr(cls, name, _in_own_context(_call_next(cls, name, value)))


def _call_next(cls: type, name: str, fn: Callable[..., Any]) -> Callable[..., Any]:
    """A method of `cls` that does what the class would do without it."""

    @functools.wraps(fn)
    def call_next(self, *args, **kwargs):
        return getattr(super(cls, self), name)(*args, **kwargs)

    return call_next


def _in_own_context(fn: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(fn)
    def call_in_own_context(self, *args, **kwargs):
        try:
            context = current_context()
            if context is None:
                return fn(self, *args, **kwargs)
            if context.module is self:
                return self._invoke(fn, args, kwargs)
            with self._enter_from(context):
                return self._invoke(fn, args, kwargs)
        except Exception as e:
            _note_failure(e, self, fn.__name__, args, kwargs)
            raise

    setattr(call_in_own_context, _WRAPPED, True)
    return call_in_own_context


def _note_failure(
    e: Exception, module: Any, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Notes the path of the innermost module that failed, once; on a TypeError also the types of arguments."""
    if any(note.startswith(_NOTE_PREFIX) for note in getattr(e, "__notes__", ())):
        return
    note = f"{_NOTE_PREFIX}{module.path()} ({type(module).__qualname__}.{method})"
    if isinstance(e, TypeError):
        types_of = [_describe(value) for value in args] + [f"{k}={_describe(v)}" for k, v in kwargs.items()]
        note += f", called with ({', '.join(types_of)})"
    e.add_note(note)


def _describe(value: Any) -> str:
    """An array's type and shape, anything else's class."""
    if isinstance(value, jax.Array):
        return f"{value.dtype.name}[{','.join(map(str, value.shape))}]"
    return type(value).__name__
