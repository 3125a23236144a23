"""The value of a field that somebody still has to set."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar, Union

T = TypeVar("T")

# What each operator of Python would have done, in the words of the error message.
_OPERATIONS = {
    "add": ("__add__", "__radd__", "__iadd__"),
    "subtract": ("__sub__", "__rsub__", "__isub__"),
    "multiply": ("__mul__", "__rmul__", "__imul__", "__matmul__", "__rmatmul__", "__imatmul__"),
    "divide": ("__truediv__", "__rtruediv__", "__itruediv__"),
    "floor-divide": ("__floordiv__", "__rfloordiv__", "__ifloordiv__"),
    "modulo": ("__mod__", "__rmod__", "__imod__"),
    "exponentiate": ("__pow__", "__rpow__", "__ipow__"),
    "negate": ("__neg__",),
    "apply unary +": ("__pos__",),
    "apply abs() to": ("__abs__",),
    "compare": ("__lt__", "__le__", "__gt__", "__ge__"),
    "convert to int": ("__int__", "__index__"),
    "convert to float": ("__float__",),
    "subscript": ("__getitem__", "__setitem__", "__delitem__"),
    "iterate over": ("__iter__",),
    "check membership of": ("__contains__",),
    "get length of": ("__len__",),
    "call": ("__call__",),
}


def _refuse(operation: str) -> Callable[..., NoReturn]:
    def method(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(
            f"Cannot use a required config field before setting its value (attempted: {operation})."
        )

    return method


class RequiredFieldValue:
    """The type of `REQUIRED`; it has one instance, and every use of it but `is` and `bool()` is an error."""

    _instance: "RequiredFieldValue | None" = None

    def __new__(cls) -> "RequiredFieldValue":
        if cls._instance is None:
            cls._instance = super().__new__(cls)
        return cls._instance

    def __repr__(self) -> str:
        return "REQUIRED"

    def __bool__(self) -> bool:
        return False

    def __copy__(self) -> "RequiredFieldValue":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "RequiredFieldValue":
        return self

    def __reduce__(self) -> str:
        return "REQUIRED"

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f"Cannot access attribute '{name}' on a required config field before setting its value."
        )

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise AttributeError(
            f"Cannot set attribute '{name}' on a required config field before setting its value."
        )


for _operation, _methods in _OPERATIONS.items():
    for _method in _methods:
        setattr(RequiredFieldValue, _method, _refuse(_operation))

# Typed as Any, so that `dim: Required[int] = REQUIRED` is an int to a type checker, which then checks both
# what is assigned to the field and what is done with it.
REQUIRED: Any = RequiredFieldValue()

if TYPE_CHECKING:
    Required = Annotated[T, "Must be set before instantiation."]
else:
    Required = Union[T, RequiredFieldValue]
