"""Classes and functions by name in files, and who may be named there.

A file that names what to import is a program. So a name is followed only below prefixes that the reader
allows, or in a short list of things of numpy and jax; what it leads to must be defined below the same prefix;
modules are not walked through.
"""

import importlib
import sys
import types
from collections.abc import Sequence
from typing import Any

from axlearn.common.config._errors import error_message
from axlearn.common.config._formatters import is_remat_policy, remat_policy_name
from axlearn.common.config._names import definition_of, public_module

# The element types of arrays, by the names that numpy, jax and ml_dtypes share.
DTYPE_NAMES = frozenset(
    [
        "bool",
        "bool_",
        "int4",
        "int8",
        "int16",
        "int32",
        "int64",
        "uint4",
        "uint8",
        "uint16",
        "uint32",
        "uint64",
        "bfloat16",
        "float16",
        "float32",
        "float64",
        "complex64",
        "complex128",
        "float8_e4m3",
        "float8_e4m3fn",
        "float8_e4m3fnuz",
        "float8_e4m3b11fnuz",
        "float8_e5m2",
        "float8_e5m2fnuz",
        "float8_e3m4",
        "float8_e8m0fnu",
        "float4_e2m1fn",
    ]
)
_BUILTIN_NAMES = frozenset(
    ["bool", "bytes", "complex", "dict", "float", "int", "list", "object", "set", "str", "tuple"]
)
DTYPE_MODULES = ("jax.numpy", "ml_dtypes", "numpy")
POLICIES = "jax.checkpoint_policies"
_ACTIVATIONS = "jax.nn"
# Modules of jax whose functions may be named.
FOREIGN_FUNCTIONS = (POLICIES, _ACTIVATIONS)


class BadReferenceError(ValueError):
    """A name does not lead to a class or function, or not to one that may be named."""


def imported(module: str) -> Any:
    """Imports the library that a name of the short list lives in; configs load none before."""
    if module == POLICIES:
        return importlib.import_module("jax").checkpoint_policies
    return importlib.import_module(module)


def _is_foreign(module: str, name: str) -> bool:
    """Whether the short list of numpy's, jax's and Python's own things has this name."""
    if module == "builtins":
        return name in _BUILTIN_NAMES
    if module in DTYPE_MODULES:
        return name in DTYPE_NAMES
    return module in FOREIGN_FUNCTIONS and name.isidentifier() and not name.startswith("_")


def _foreign_reference(obj: Any) -> str | None:
    if is_remat_policy(obj):
        return f"{POLICIES}:{remat_policy_name(obj)}"
    name, module = getattr(obj, "__name__", None), getattr(obj, "__module__", None)
    if not isinstance(name, str) or not isinstance(module, str):
        return None
    if _is_foreign(module, name) and isinstance(obj, type):
        return f"{module}:{name}"
    if module.partition(".")[0] == "jax" and "jax" in sys.modules:
        for where in (_ACTIVATIONS, POLICIES):
            if _is_foreign(where, name) and getattr(imported(where), name, None) is obj:
                return f"{where}:{name}"
    return None


def _follow(root: Any, qualname: str) -> Any:
    """Walks from a module along a qualified name, through classes only."""
    value = root
    for part in qualname.split("."):
        is_dunder = part.startswith("__") and part.endswith("__")
        if not part.isidentifier() or is_dunder or isinstance(value, types.ModuleType) != (value is root):
            raise BadReferenceError(
                error_message(what=f"'{qualname}' is not the name of a class or function")
            )
        if not hasattr(value, part):
            raise BadReferenceError(error_message(what=f"there is no '{qualname}' in '{root.__name__}'"))
        value = getattr(value, part)
    return value


def reference_to(obj: Any) -> str:
    """Returns `module:qualname` of a class or function.

    Args:
        obj: A class or function at the top level of a module or of a class in it, or one of the short list.

    Returns:
        A name that leads back to `obj` in this process, by the public module where that exports it.

    Raises:
        BadReferenceError: If no name leads back to it, as for lambdas and for what is defined inside of a
            function.
    """
    foreign = _foreign_reference(obj)
    if foreign is not None:
        return foreign
    try:
        module, qualname = definition_of(obj)
    except AttributeError:
        module, qualname = type(obj).__module__, repr(obj)
    for candidate in dict.fromkeys((public_module(module), module)):
        try:
            if _follow(sys.modules[candidate], qualname) == obj:
                return f"{candidate}:{qualname}"
        except (KeyError, BadReferenceError):
            continue
    raise BadReferenceError(
        error_message(
            what=f"{module}:{qualname} cannot be found again by its name",
            expected="a class or function at the top level of a module",
            advice="Define it there, with a name",
        )
    )


def resolve_reference(text: str, *, import_prefixes: Sequence[str]) -> Any:
    """Returns the class or function that a name leads to.

    Args:
        text: `module:qualname`.
        import_prefixes: The packages that may be imported from, such as `("axlearn.",)`.

    Returns:
        The object.

    Raises:
        BadReferenceError: If the name may not be followed or leads nowhere.
    """
    module, _, qualname = text.partition(":")
    if _is_foreign(module, qualname):
        return _follow_foreign(module, qualname)
    if not is_below(module, import_prefixes):
        raise BadReferenceError(
            error_message(
                what=f"'{text}' is outside of what may be imported",
                expected=f"a name below {' or '.join(p.rstrip('.') for p in import_prefixes)}",
                advice="If the file can be trusted, allow its package with import_prefixes",
            )
        )
    try:
        root = importlib.import_module(module)
    except ModuleNotFoundError as e:
        raise BadReferenceError(error_message(what=f"'{text}' does not exist ({e})")) from e
    found = _follow(root, qualname)
    defined_in = definition_of(found)[0] if hasattr(found, "__qualname__") else type(found).__module__
    if not is_below(defined_in, import_prefixes):
        raise BadReferenceError(
            error_message(what=f"'{text}' is defined in {defined_in}, outside of what may be imported")
        )
    return found


def _follow_foreign(module: str, name: str) -> Any:
    found = getattr(imported(module), name, None)
    if not callable(found):
        raise BadReferenceError(error_message(what=f"there is no '{name}' in this version of {module}"))
    return found


def is_below(module: str, prefixes: Sequence[str]) -> bool:
    """Whether a module is one of the packages, or lies in one."""
    return any(module == p.rstrip(".") or module.startswith(p.rstrip(".") + ".") for p in prefixes)
