"""Reading the fields of a config.json."""

from collections.abc import Mapping, Sequence
from typing import Any, Optional

from axlearn.common.config import error_message, nearest_names
from axlearn.common.hf._errors import refusal

_MISSING: Any = object()


class Fields:
    """Fields of a JSON object, checked for their type as they are read. A default stands for a missing field."""

    def __init__(self, values: Mapping[str, Any], *, where: str = ""):
        """Reads from `values`, the object that is found at `where` in the file (empty: the whole file)."""
        self._values = values
        self._where = where

    def path(self, name: str) -> str:
        """What to call a field in a message."""
        return f"config.json: {self._where}.{name}" if self._where else f"config.json: {name}"

    def _get(self, name: str, default: Any, *, types: tuple[type, ...], expected: str) -> Any:
        value = self._values.get(name, default)
        if value is _MISSING:
            raise ValueError(
                error_message(
                    where=self.path(name),
                    what="missing",
                    expected=expected,
                    nearest=nearest_names(name, list(self._values)),
                )
            )
        is_right = isinstance(value, types) and (bool in types or not isinstance(value, bool))
        if value is not default and not is_right:
            raise ValueError(error_message(where=self.path(name), what=f"{value!r}", expected=expected))
        return value

    def integer(self, name: str, default: Any = _MISSING, *, minimum: int = 1) -> int:
        """An integer of at least `minimum`; the default is not checked."""
        value = self._get(name, default, types=(int,), expected="an integer")
        if value is not default and value < minimum:
            raise ValueError(
                error_message(where=self.path(name), what=f"{value}", expected=f"at least {minimum}")
            )
        return value

    def optional_integer(self, name: str, default: Optional[int] = None) -> Optional[int]:
        """An integer of at least 1, or null."""
        if name in self._values and self._values[name] is None:
            return None
        return self.integer(name, default)

    def number(self, name: str, default: Any = _MISSING) -> float:
        """A positive number."""
        value = self._get(name, default, types=(int, float), expected="a number")
        if not value > 0:
            raise ValueError(error_message(where=self.path(name), what=f"{value}", expected="above 0"))
        return float(value)

    def optional_number(self, name: str) -> Optional[float]:
        """A positive number; None where the field is missing or null."""
        return None if self._values.get(name) is None else self.number(name)

    def boolean(self, name: str, default: bool) -> bool:
        """True or false; null is the default."""
        value = self._get(name, default, types=(bool, type(None)), expected="true or false")
        return default if value is None else value

    def text(self, name: str, default: str) -> str:
        """A string."""
        return self._get(name, default, types=(str,), expected="a string")

    def refuse_unless(self, name: str, legal: Sequence[Any], *, advice: Optional[str] = None) -> None:
        """Refuses a field that changes the numbers of a model in a way that is not supported.

        Args:
            name: The field.
            legal: Values at which it changes nothing; None among them: the field may be missing.
            advice: What to do.

        Raises:
            ValueError: It has another value.
        """
        value = self._values.get(name)
        if value not in legal:
            shown = " or ".join("null" if x is None else str(x).lower() for x in legal)
            raise refusal(self.path(name), value, expected=shown, advice=advice)
