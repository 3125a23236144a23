"""When to save."""

from collections.abc import Mapping
from typing import Any, Protocol


class CheckpointPolicy(Protocol):
    """Decides after each step whether its state is saved."""

    def __call__(self, *, step: int, evaler_summaries: Mapping[str, Any]) -> bool:
        """Whether to save.

        Args:
            step: The step that was just finished.
            evaler_summaries: What the evalers found at this step, by evaler; empty where none ran.
        """
        ...


def _check_n(name: str, n: int) -> None:
    if n < 1:
        raise ValueError(f"{name}: n={n} is not a number of steps. Expected at least 1.")


def every_n_steps_policy(n: int = 1, *, min_step: int = 1) -> CheckpointPolicy:
    """Saves at multiples of `n`.

    Args:
        n: In steps, at least 1.
        min_step: The first step that may be saved.

    Returns:
        The policy.

    Raises:
        ValueError: If `n` is less than 1.
    """
    _check_n("every_n_steps_policy", n)

    def policy(*, step: int, evaler_summaries: Mapping[str, Any]) -> bool:
        del evaler_summaries
        return step >= min_step and step % n == 0

    return policy


def every_n_steps_and_last_policy(n: int = 1, *, min_step: int = 1, max_step: int) -> CheckpointPolicy:
    """Saves at multiples of `n`, and at the last step.

    Args:
        n: In steps, at least 1.
        min_step: The first step that may be saved.
        max_step: The last step of the run.

    Returns:
        The policy.

    Raises:
        ValueError: If `n` is less than 1.
    """
    _check_n("every_n_steps_and_last_policy", n)
    every_n_steps = every_n_steps_policy(n, min_step=min_step)

    def policy(*, step: int, evaler_summaries: Mapping[str, Any]) -> bool:
        return step == max_step or every_n_steps(step=step, evaler_summaries=evaler_summaries)

    return policy
