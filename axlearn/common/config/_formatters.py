"""How a leaf of a config prints, whatever version of its library made it.

Dumps are compared as text over years, and the `repr` of other people's objects changes with their releases. A
leaf that is not a plain Python value therefore prints through a formatter registered here. Libraries are
recognised by the names of modules and types, so that nothing is imported for a value that never comes.
"""

import types
from collections.abc import Callable
from typing import Any, NamedTuple

from axlearn.common.config._names import public_name

Predicate = Callable[[Any], bool]
Formatter = Callable[[Any], str]

_PLAIN_TYPES = frozenset({bool, float, int, str, type(None)})
# Values of exactly these types are never offered to a formatter.
_UNCLAIMED_TYPES = _PLAIN_TYPES | {dict, list, tuple, types.FunctionType}


class _Rule(NamedTuple):
    predicate: Predicate
    formatter: Formatter


_RULES: list[_Rule] = []


def register_formatter(predicate: Predicate, formatter: Formatter) -> None:
    """Makes configs accept a kind of value as a leaf, and print it in a fixed way.

    Args:
        predicate: Says of a value whether it is of this kind. It is never asked about plain Python data and
            functions, and about everything else often: it should be cheap and must not raise.
        formatter: Returns the text of such a value. Later registrations win over earlier ones.
    """
    _RULES.append(_Rule(predicate, formatter))


def has_formatter(value: Any) -> bool:
    """Whether a registered formatter claims the value, which then is a leaf."""
    if type(value) in _UNCLAIMED_TYPES:
        return False
    return any(rule.predicate(value) for rule in _RULES)


def is_function_like(value: Any) -> bool:
    """Whether the value is a function, or a wrapper that carries a function's name, as `jax.jit` makes."""
    if isinstance(value, types.FunctionType):
        return True
    if isinstance(value, (type, types.BuiltinFunctionType, types.MethodType)) or not callable(value):
        return False
    return isinstance(getattr(value, "__name__", None), str) and isinstance(
        getattr(value, "__module__", None), str
    )


def leaf_value(value: Any) -> Any:
    """Returns a leaf as plain data where a name says all of it: `module.name` of classes and functions."""
    if type(value) in _PLAIN_TYPES:
        return value
    if not has_formatter(value) and (isinstance(value, type) or is_function_like(value)):
        return public_name(value)
    return value


def format_leaf(value: Any) -> str:
    """Returns the text that a dump prints for a leaf."""
    if type(value) in _PLAIN_TYPES:
        return repr(value)
    for rule in reversed(_RULES):
        if rule.predicate(value):
            return rule.formatter(value)
    return repr(leaf_value(value))


def _type_is(value: Any, *, root: str, names: tuple[str, ...]) -> bool:
    cls = type(value)
    return cls.__name__ in names and cls.__module__.partition(".")[0] == root


def is_partition_spec(value: Any) -> bool:
    """Whether the value is a `jax.sharding.PartitionSpec`, under any of the names it has had."""
    return _type_is(value, root="jax", names=("PartitionSpec", "P"))


def is_remat_policy(value: Any) -> bool:
    """Whether the value is one of the objects that newer jax has in place of `dots_saveable` functions."""
    return _type_is(value, root="jax", names=("DotsSaveable",))


def remat_policy_name(value: Any) -> str:
    """Returns the name in `jax.checkpoint_policies` of a policy that `is_remat_policy` knows."""
    return "dots_with_no_batch_dims_saveable" if value.only_if_no_batch_dims else "dots_saveable"


def _format_partition_spec(value: Any) -> str:
    return f"PartitionSpec{tuple(value)!r}"


def _format_remat_policy(value: Any) -> str:
    return repr(f"jax._src.ad_checkpoint.{remat_policy_name(value)}")


def is_dtype(value: Any) -> bool:
    """Whether the value is an instance of `numpy.dtype`."""
    return any(cls.__name__ == "dtype" and cls.__module__ == "numpy" for cls in type(value).__mro__)


def _format_dtype(value: Any) -> str:
    return f"dtype({value.name!r})"


register_formatter(is_partition_spec, _format_partition_spec)
register_formatter(is_remat_policy, _format_remat_policy)
register_formatter(is_dtype, _format_dtype)
