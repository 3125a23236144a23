"""When to evaluate."""

from typing import Any, Optional, Protocol

from axlearn.common.config import error_message


class EvalPolicy(Protocol):
    """Decides whether an evaler runs at a step."""

    def __call__(self, *, step: int, train_summaries: Optional[dict[str, Any]] = None) -> bool: ...


def every_n_steps_policy(n: int = 1, *, min_step: int = 1, max_step: Optional[int] = None) -> EvalPolicy:
    """Returns a policy that evaluates at every multiple of `n` from `min_step` on, and at `max_step`.

    Args:
        n: The distance in steps, at least 1.
        min_step: The first step at which to evaluate.
        max_step: A step at which to evaluate whatever `n` says; None for none. (The trainer evaluates after
            its last step in any case.)

    Raises:
        ValueError: If `n` is below 1.
    """
    if n < 1:
        raise ValueError(error_message(where="every_n_steps_policy", what=f"n={n}", expected="at least 1"))

    def policy(*, step: int, train_summaries: Optional[dict[str, Any]] = None) -> bool:
        del train_summaries
        return step >= min_step and (step % n == 0 or step == max_step)

    return policy
