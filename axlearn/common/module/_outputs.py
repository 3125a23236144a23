"""What methods of modules leave behind besides their return values."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

# Names of modules, hence of contexts and of levels of outputs.
NAME_PATTERN = re.compile(r"[a-z][a-z0-9_]*")


class OutputConflictError(ValueError):
    """Two outputs of one context have the same name."""


class OutputCollection(NamedTuple):
    """What modules leave behind besides their return values: three dicts, nested alike by module name.

    Attributes:
        summaries: Values to log.
        state_updates: New values of parts of the state.
        module_outputs: Intermediate values for other modules, or for tests.
    """

    summaries: dict[str, Any]
    state_updates: dict[str, Any]
    module_outputs: dict[str, Any]

    def add_child(self, name: str) -> "OutputCollection":
        """Opens a level called `name` in each of the three.

        Raises:
            OutputConflictError: If there is one already.
            ValueError: If the name is not a legal module name.
        """
        if not NAME_PATTERN.fullmatch(name):
            raise ValueError(f"{name!r} is not a legal name. Expected to match {NAME_PATTERN.pattern}.")
        taken = [kind for kind in self._fields if name in getattr(self, kind)]
        if taken:
            raise OutputConflictError(
                f"The outputs of {name!r} are there already (in {', '.join(taken)}): it was called before "
                "in this context. To call a child twice, give each call a name of its own: "
                f"`with child_context('{name}_again', module=self.{name}):`."
            )
        child = new_output_collection()
        for kind in self._fields:
            getattr(self, kind)[name] = getattr(child, kind)
        return child

    def update(self, other: "OutputCollection") -> None:
        """Adds everything of `other`, level by level.

        Raises:
            OutputConflictError: If both have a value of the same name.
        """
        for kind in self._fields:
            _merge_outputs(getattr(self, kind), getattr(other, kind), kind=kind)


def new_output_collection() -> OutputCollection:
    """An empty collection."""
    return OutputCollection(summaries={}, state_updates={}, module_outputs={})


def _merge_outputs(target: dict[str, Any], source: Mapping[str, Any], *, kind: str) -> None:
    for name, value in source.items():
        if name not in target:
            target[name] = value
        elif isinstance(value, dict) and isinstance(target[name], dict):
            _merge_outputs(target[name], value, kind=kind)
        else:
            raise OutputConflictError(f"{kind} already has a value called {name!r}.")
