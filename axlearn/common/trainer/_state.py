"""What a step carries from one step to the next, and the ways in which a run ends early."""

import signal
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from axlearn.common.utils import Tensor


class TrainerState(NamedTuple):
    """Everything that a step reads and writes; its fields are the top of the checkpoint's paths.

    Attributes:
        prng_key: The raw key of the next step, uint32 of shape [2] (threefry) or [4] (rbg).
        model: The parameters, a tree shaped like the model.
        learner: The learner's state: `optimizer` and, where it is on, `ema`.
    """

    # `Any`, because the same three also hold specs and shardings of arrays.
    prng_key: Any
    model: Any
    learner: Any


class UndefinedLossException(RuntimeError):
    """The loss or a part of the state is not finite; nothing of it was saved.

    Attributes:
        step: The step at which it was first seen.
    """

    def __init__(self, message: str, *, step: int):
        super().__init__(message)
        self.step = step


class StoppedBySignal(SystemExit):
    """The run ended on SIGTERM or SIGINT, after a save.

    It is a SystemExit so that a script that does not know it ends with the status that a supervisor expects:
    128 plus the signal's number (143 for SIGTERM, 130 for SIGINT).

    Attributes:
        step: The last step that was finished.
        signum: The signal.
        is_saved: Whether there is a checkpoint of `step`; there is, unless no step was done yet.
    """

    def __init__(self, *, step: int, signum: int, is_saved: bool):
        super().__init__(128 + signum)
        self.step = step
        self.signum = signum
        self.is_saved = is_saved

    def __str__(self) -> str:
        name = signal.Signals(self.signum).name
        if not self.is_saved:
            return f"Stopped by {name} before the first step."
        return f"Stopped by {name} after step {self.step}, which is saved."


# What the shape of a raw key says about its generator (`jax.random.PRNGKey`): rbg keys are two threefry keys.
_IMPL_BY_KEY_SIZE = {2: "threefry2x32", 4: "rbg"}


def as_key(prng_key: Tensor) -> Tensor:
    """Returns a key that `jax.random` accepts whatever the process's default generator is.

    A raw key of the default generator is returned as it is. One of the other generator, such as the four
    words that a checkpoint written under rbg holds, becomes a typed key, so that it keeps producing the
    stream it stands for.

    Args:
        prng_key: A raw key, uint32 of shape [2] or [4], or a typed one.
    """
    if jnp.issubdtype(prng_key.dtype, jax.dtypes.prng_key):
        return prng_key
    if prng_key.shape == default_key_shape():
        return prng_key
    return jax.random.wrap_key_data(prng_key, impl=_IMPL_BY_KEY_SIZE[prng_key.shape[-1]])


def as_raw_key(prng_key: Tensor) -> Tensor:
    """Returns the words of a key, typed or raw."""
    if jnp.issubdtype(prng_key.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(prng_key)
    return prng_key


def default_key_shape() -> tuple[int, ...]:
    """Returns the shape of a raw key of the process's default generator."""
    return jax.eval_shape(jax.random.PRNGKey, 0).shape


def is_key_shape(shape: Sequence[int]) -> bool:
    """Returns whether raw keys of a generator that we know have this shape."""
    return len(shape) == 1 and shape[0] in _IMPL_BY_KEY_SIZE
