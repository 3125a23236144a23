"""Classes and functions by the names that dumps print, `module.name`, and the name that was meant."""

import importlib.util
import pkgutil
import re
from collections.abc import Sequence
from typing import Any

from axlearn.common.config._errors import error_message
from axlearn.common.config._formatters import is_function_like, is_remat_policy
from axlearn.common.config._messages import SHORT
from axlearn.common.config._names import listing, nearest_names, public_module
from axlearn.common.config._references import (
    FOREIGN_FUNCTIONS,
    POLICIES,
    BadReferenceError,
    imported,
    is_below,
    resolve_reference,
)

# Where jax keeps the remat policies that dumps name by the file they are defined in.
PRINTED_POLICIES = "jax._src.ad_checkpoint"

_FOREIGN = (*FOREIGN_FUNCTIONS, PRINTED_POLICIES)

_DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")
# What people append to the name of a class when they mean its config.
CALLS = (".default_config()", "()")
_CONFIG_SUFFIXES = (*CALLS, ".default_config", ".Config")


def is_dotted_name(text: str) -> bool:
    """Whether a text is written as names with dots between them."""
    return _DOTTED.fullmatch(text) is not None


def may_name(text: str, *, import_prefixes: Sequence[str]) -> bool:
    """Whether a dotted name leads to where names may lead; it need not exist."""
    module = text.rpartition(".")[0]
    return module in _FOREIGN or is_below(module, import_prefixes)


def find_named(name: str, *, import_prefixes: Sequence[str]) -> Any:
    """Returns the class or function that prints as a name.

    Args:
        name: `module.name`.
        import_prefixes: The packages that may be imported from.

    Returns:
        The class, function or remat policy.

    Raises:
        BadReferenceError: If there is none, with the nearest that there is.
    """
    module, _, last = name.rpartition(".")
    if module == PRINTED_POLICIES:
        module = POLICIES
    try:
        found = resolve_reference(f"{module}:{last}", import_prefixes=import_prefixes)
    except BadReferenceError as e:
        if not may_name(name, import_prefixes=import_prefixes):
            packages = " or ".join(prefix.rstrip(".") for prefix in import_prefixes)
            raise BadReferenceError(
                error_message(
                    what=f"'{name}' is outside of what may be named here",
                    expected=f"a name below {packages}",
                    advice="The package of a recipe that --module names may be named too",
                )
            ) from e
        raise BadReferenceError(_unknown_name(name, import_prefixes=import_prefixes)) from e
    if not (isinstance(found, type) or is_function_like(found) or is_remat_policy(found)):
        raise BadReferenceError(
            error_message(what=f"'{name}' is a {type(found).__name__}", expected="a class or a function")
        )
    return found


def _unknown_name(name: str, *, import_prefixes: Sequence[str]) -> str:
    """Writes the error about a name that leads nowhere: up to where it is good, and what there is."""
    for suffix in _CONFIG_SUFFIXES:
        if name.endswith(suffix):
            return error_message(what=f"'{name}' is a part of a class", nearest=[name.removesuffix(suffix)])
    module, _, last = name.rpartition(".")
    if module in _FOREIGN:
        return _missing_part(last, name[: -len(last) - 1], "", import_prefixes=import_prefixes)
    good = ""
    for part in name.split("."):
        tried = f"{good}.{part}" if good else part
        if not _is_module(tried):
            return _missing_part(part, good, name[len(tried) :], import_prefixes=import_prefixes)
        good = tried
    return error_message(what=f"'{name}' is a module", expected="a class or a function in it")


def _missing_part(part: str, good: str, rest: str, *, import_prefixes: Sequence[str]) -> str:
    """Writes the error about a name whose beginning is good, and whose next part is not."""
    if not good:
        return error_message(what=f"there is no package '{part}'")
    below = _names_below(good)
    if part in below and rest:
        return error_message(what=f"'{good}.{part}' has no '{rest[1:]}'", nearest=[f"{good}.{part}"])
    near = [f"{good}.{other}" for other in nearest_names(part, below)]
    return error_message(
        what=f"there is no '{part}' in '{good}'",
        nearest=[_whole(other, rest, import_prefixes=import_prefixes) for other in near],
        advice=None if near else f"There is {listing(below, limit=SHORT)}",
    )


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _names_below(module: str) -> list[str]:
    """Returns the public modules, classes and functions of a module."""
    root = imported(POLICIES if module == PRINTED_POLICIES else module)
    modules = [info.name for info in pkgutil.iter_modules(getattr(root, "__path__", ()))]
    objects = [
        name
        for name, value in vars(root).items()
        if (isinstance(value, type) or is_function_like(value) or is_remat_policy(value))
        and (public_module(value.__module__ or "") == module or module in _FOREIGN)
    ]
    return sorted(name for name in {*modules, *objects} if not name.startswith("_"))


def _whole(name: str, rest: str, *, import_prefixes: Sequence[str]) -> str:
    """Returns a mended beginning of a name with what followed, if there is such a thing; else as it is."""
    if not rest:
        return name
    module, _, last = f"{name}{rest}".rpartition(".")
    try:
        resolve_reference(f"{module}:{last}", import_prefixes=import_prefixes)
    except BadReferenceError:
        return name
    return f"{name}{rest}"
