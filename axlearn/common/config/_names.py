"""How things are called: the public name of an object, and the legal name nearest to a mistyped one."""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

# The import root of this project; the rule about private files holds below it and nowhere else.
_ROOT = __name__.partition(".")[0]
# Names shorter than this have no substrings worth comparing.
_SUBSTRING_LEN = 3
# difflib's own default, good at transposed and missing letters.
_MIN_RATIO = 0.6


def public_module(module: str) -> str:
    """Returns the address that a module's contents are published under.

    Below our own root a file whose name starts with an underscore is a file and not an address: what it
    defines is published by the nearest parent without one.

    Args:
        module: A dotted module name, such as `axlearn.common.attention._qkv`.

    Returns:
        The module without its private tail, such as `axlearn.common.attention`.
    """
    if module == _ROOT or module.startswith(_ROOT + "."):
        return module.partition("._")[0]
    return module


def public_name(obj: Any) -> str:
    """Returns `module.name` of a class or a function, as dumps and messages print it.

    Args:
        obj: Anything with `__module__` and `__name__`.

    Returns:
        The public module and the object's own `__name__`: nested classes lose what encloses them, and the
        object's own leading underscore stays.
    """
    return f"{public_module(obj.__module__ or 'builtins')}.{obj.__name__}"


def public_qualname(obj: Any) -> str:
    """Like `public_name`, with the enclosing classes: `axlearn.common.layers.Linear.Config`."""
    module, qualname = definition_of(obj)
    return f"{public_module(module)}.{qualname}"


def definition_of(obj: Any) -> tuple[str, str]:
    """Returns the module and the qualified name that an object was defined under.

    A config class is renamed by its decorator and keeps the name it was written with elsewhere.
    """
    origin = vars(obj).get("_config_origin") if isinstance(obj, type) else None
    if origin is not None:
        return origin[0], origin[1]
    # Methods of built-in objects have no module.
    return obj.__module__ or "builtins", obj.__qualname__


def similar_names(name: str, candidates: Iterable[str]) -> list[str]:
    """Returns the candidates that contain more than half of the three-letter substrings of `name`.

    Args:
        name: A name that was not found.
        candidates: The names that exist.

    Returns:
        Candidates by falling share of substrings found, equal shares in alphabetical order.
    """
    parts = {name[i : i + _SUBSTRING_LEN] for i in range(len(name) - _SUBSTRING_LEN + 1)}
    if not parts:
        return []
    shares = [(sum(part in candidate for part in parts) / len(parts), candidate) for candidate in candidates]
    return [candidate for share, candidate in sorted(shares, key=lambda x: (-x[0], x[1])) if share > 0.5]


def nearest_names(name: str, candidates: Iterable[str], *, limit: int = 3) -> list[str]:
    """Returns the legal names that somebody who typed `name` most likely meant, the best first.

    Args:
        name: A name that was not found.
        candidates: The names that exist.
        limit: The largest number of names returned.

    Returns:
        Names that share substrings with `name` or differ from it by few letters; empty where nothing is near.
    """
    known = list(candidates)
    by_letters = difflib.get_close_matches(name, known, n=limit, cutoff=_MIN_RATIO)
    by_substrings = similar_names(name, known)
    return list(dict.fromkeys([*by_letters, *by_substrings]))[:limit]


def listing(names: Sequence[str], *, limit: int = 40) -> str:
    """Joins names with commas, cut after `limit` of them with a count of the rest; 40 fill a few lines."""
    shown = ", ".join(names[:limit])
    rest = len(names) - limit
    return f"{shown}, ... ({rest} more)" if rest > 0 else shown
