"""Restoring a part of a state."""

import re
from collections.abc import Sequence

from axlearn.common.checkpointer._restore import PathFilter
from axlearn.common.config import InstantiableConfig, config_for_function


def drop_paths(patterns: Sequence[str] = ()) -> PathFilter:
    """A filter that leaves out paths.

    Args:
        patterns: Regular expressions; a path is left out if one of them matches the whole of it.

    Returns:
        The filter: True for paths to restore.

    Raises:
        ValueError: If a pattern is not a regular expression.
    """
    try:
        compiled = [re.compile(pattern) for pattern in patterns]
    except re.error as e:
        raise ValueError(f"restore_state_filter: {e.pattern!r} is not a regular expression ({e}).") from e

    def keep_path(path: str) -> bool:
        return not any(pattern.fullmatch(path) for pattern in compiled)

    return keep_path


def drop_learner_optimizer_cfg() -> InstantiableConfig[PathFilter]:
    """A config for `restore_state_filter` that leaves out the state of the optimizer.

    Where it is used, `restore` returns the specs of these leaves as they were given, and the caller
    initialises them.
    """
    cfg: InstantiableConfig[PathFilter] = config_for_function(drop_paths)
    return cfg.set(patterns=["learner/optimizer/.*"])
