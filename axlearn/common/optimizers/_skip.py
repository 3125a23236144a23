"""Leaving out whole steps whose gradients cannot be trusted."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Optional, Protocol, Union

import jax
import jax.numpy as jnp
import optax

from axlearn.common.base_layer import ParameterSpec
from axlearn.common.config import ConfigOr, error_message, maybe_instantiate
from axlearn.common.optimizer_base import NestedOptParam, PartitionedGradientTransformation
from axlearn.common.optimizers._clip import clip_scale, global_norm
from axlearn.common.optimizers._compose import scalar_spec
from axlearn.common.optimizers._per_param import scale_array
from axlearn.common.optimizers._summaries import add_summary
from axlearn.common.utils import Nested, Tensor


class DropNormThresholdFn(Protocol):
    """Tells from the gradient norms so far from which norm on a step is left out."""

    def __call__(self, *, count: Tensor, mean: Tensor, stddev: Tensor) -> dict[str, Tensor]:
        """Makes thresholds.

        Args:
            count: How many steps were not left out, int32.
            mean: The moving average of their norms; 0 at first.
            stddev: The moving standard deviation of their norms; 0 at first.

        Returns:
            Thresholds by name. The first decides; how often the others would have is only counted.
        """


def _check_multipliers(fn: str, multipliers: Sequence[float]) -> None:
    if not multipliers or min(multipliers) <= 0:
        raise ValueError(
            error_message(where=fn, what=f"multipliers={multipliers}", expected="at least one number above 0")
        )


def _after(min_count: int, *, count: Tensor, threshold: Tensor) -> Tensor:
    """No threshold until the statistics rest on `min_count` steps."""
    return jnp.where(count >= min_count, threshold, jnp.inf)


def drop_norm_by_grad_norm_ema(
    multipliers: Sequence[float] = (20, 40, 100), *, min_count: int = 1
) -> DropNormThresholdFn:
    """Thresholds at multiples of the average norm.

    Args:
        multipliers: The multiples; the first decides.
        min_count: How many steps must have counted before any can be left out for its norm.

    Returns:
        The function.

    Raises:
        ValueError: If there are no multipliers, or one is not above 0.
    """
    _check_multipliers("drop_norm_by_grad_norm_ema", multipliers)

    def fn(*, count: Tensor, mean: Tensor, stddev: Tensor) -> dict[str, Tensor]:
        del stddev
        return {f"{m}x_ema": _after(min_count, count=count, threshold=m * mean) for m in multipliers}

    return fn


def drop_norm_by_grad_norm_stddev(
    multipliers: Sequence[float] = (20, 40, 100), *, min_count: int = 500
) -> DropNormThresholdFn:
    """Thresholds at the average norm plus multiples of the standard deviation.

    Args:
        multipliers: The multiples; the first decides.
        min_count: How many steps must have counted before any can be left out for its norm: a standard
            deviation takes longer to settle than an average.

    Returns:
        The function.

    Raises:
        ValueError: If there are no multipliers, or one is not above 0.
    """
    _check_multipliers("drop_norm_by_grad_norm_stddev", multipliers)

    def fn(*, count: Tensor, mean: Tensor, stddev: Tensor) -> dict[str, Tensor]:
        return {
            f"{m}x_stddev": _after(min_count, count=count, threshold=mean + m * stddev) for m in multipliers
        }

    return fn


class SkipClipState(NamedTuple):
    """State of `skip_and_clip_by_global_norm`.

    Attributes:
        count: How many steps were not left out, int32.
        nonvalid_count: How many were, int32.
        grad_norm_ema: Moving average of the norms of the former, float32, without bias correction; None
            unless asked for.
        grad_norm_square_ema: The same of the squares of the norms.
        inner_state: The state of the inner transformation.
        drop_stats: By name of threshold, how many finite norms reached it, int32; None if the threshold is
            fixed.
    """

    count: Any
    nonvalid_count: Any
    grad_norm_ema: Any
    grad_norm_square_ema: Any
    inner_state: Any
    drop_stats: Any


class _NormTracker(NamedTuple):
    """Which norms are too large, and what is remembered of those so far.

    Attributes:
        drop_norm: A fixed threshold, or a function that makes thresholds; None: no norm is too large.
        ema_decay: Decay of the averages of norms; None: there are none.
        threshold_names: What the function calls its thresholds; None where there is no function.
    """

    drop_norm: Optional[Union[float, DropNormThresholdFn]]
    ema_decay: Optional[float]
    threshold_names: Optional[list[str]]

    def init(self, inner_state: Any, *, zero: Callable[[Any], Any]) -> SkipClipState:
        """The first state, or its specs; `zero` makes a scalar of a type."""
        ema_dtype = None if self.ema_decay is None else jnp.float32
        return SkipClipState(
            count=zero(jnp.int32),
            nonvalid_count=zero(jnp.int32),
            grad_norm_ema=None if ema_dtype is None else zero(ema_dtype),
            grad_norm_square_ema=None if ema_dtype is None else zero(ema_dtype),
            inner_state=inner_state,
            drop_stats=(
                None if self.threshold_names is None else {n: zero(jnp.int32) for n in self.threshold_names}
            ),
        )

    def is_reached(self, norm: Tensor, state: SkipClipState) -> dict[str, Tensor]:
        """By name of threshold, the one that decides first, whether the norm is not below it."""
        if self.drop_norm is None:
            return {"drop_norm": jnp.zeros([], bool)}
        if not callable(self.drop_norm):
            return {"drop_norm": norm >= self.drop_norm}
        assert self.ema_decay is not None, "_make_tracker checks that a function comes with a decay."
        correction = 1.0 - self.ema_decay ** jnp.maximum(state.count, 1)
        mean = state.grad_norm_ema / correction
        variance = state.grad_norm_square_ema / correction - jnp.square(mean)
        thresholds = self.drop_norm(count=state.count, mean=mean, stddev=jnp.sqrt(jnp.maximum(variance, 0.0)))
        return {name: norm >= threshold for name, threshold in thresholds.items()}

    def next(
        self, state: SkipClipState, *, norm: Tensor, is_valid: Tensor, is_reached: dict[str, Tensor]
    ) -> SkipClipState:
        """The state after a step, but for the inner one."""
        decay = self.ema_decay
        if decay is not None:
            ema, square_ema = (
                jnp.where(is_valid, decay * old + (1 - decay) * new, old)
                for old, new in ((state.grad_norm_ema, norm), (state.grad_norm_square_ema, jnp.square(norm)))
            )
            state = state._replace(grad_norm_ema=ema, grad_norm_square_ema=square_ema)
        if state.drop_stats is not None:
            is_finite = jnp.isfinite(norm)
            state = state._replace(
                drop_stats={n: c + (is_finite & is_reached[n]) for n, c in state.drop_stats.items()}
            )
        return state._replace(
            count=jnp.where(is_valid, optax.safe_increment(state.count), state.count),
            nonvalid_count=jnp.where(
                is_valid, state.nonvalid_count, optax.safe_increment(state.nonvalid_count)
            ),
        )


def _make_tracker(drop_norm: Any, *, ema_decay: Optional[float]) -> _NormTracker:
    if not callable(drop_norm):
        return _NormTracker(drop_norm=drop_norm, ema_decay=ema_decay, threshold_names=None)
    if ema_decay is None:
        raise ValueError(
            error_message(
                where="skip_and_clip_by_global_norm",
                what="grad_norm_ema_decay is None, although drop_norm is a function of the average norm",
                expected="a decay in (0, 1), such as 0.99",
            )
        )
    count, zero = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((), jnp.float32)
    names = list(jax.eval_shape(lambda c, z: drop_norm(count=c, mean=z, stddev=z), count, zero))
    return _NormTracker(drop_norm=drop_norm, ema_decay=ema_decay, threshold_names=names)


def skip_and_clip_by_global_norm(
    inner: ConfigOr[PartitionedGradientTransformation],
    *,
    drop_norm: Optional[Union[float, ConfigOr[DropNormThresholdFn]]] = None,
    max_norm: Optional[float] = None,
    grad_norm_ema_decay: Optional[float] = None,
    eps: float = 1e-8,
) -> PartitionedGradientTransformation:
    """Clips gradients by their global norm, and leaves steps out whose norm is not finite or too large.

    A step that is left out changes neither a bit of the parameters (weight decay included) nor one of the
    inner state: counts, moments, schedules stay where they are. Logs `gradient_norm`, `gradient_scale`,
    `gradient_valid` and `num_skipped_steps`.

    Args:
        inner: The transformation that gets the clipped gradients.
        drop_norm: From this norm on, a step is left out: a number, or a function of the norms so far. None:
            only steps whose norm is not finite are.
        max_norm: The greatest norm that `inner` sees; None: any.
        grad_norm_ema_decay: Decay of the averages of norms that such a function needs; None: no averages.
        eps: Is added to the norm that is divided by.

    Returns:
        The transformation.

    Raises:
        ValueError: If `drop_norm` is a function and `grad_norm_ema_decay` is None.
    """
    inner_tx = maybe_instantiate(inner)
    tracker = _make_tracker(maybe_instantiate(drop_norm), ema_decay=grad_norm_ema_decay)

    def init_fn(params: NestedOptParam) -> SkipClipState:
        return tracker.init(inner_tx.init(params), zero=lambda dtype: jnp.zeros([], dtype))

    def update_fn(
        updates: Nested[Tensor], state: SkipClipState, params: NestedOptParam
    ) -> tuple[Any, SkipClipState]:
        norm = global_norm(updates)
        is_reached = tracker.is_reached(norm, state)
        is_valid = jnp.isfinite(norm) & ~next(iter(is_reached.values()))
        factor = clip_scale(norm, max_norm=max_norm, eps=eps)
        # Before the inner transformation, whose own clipping would otherwise take the names.
        add_summary("gradient_norm", norm)
        add_summary("gradient_scale", jnp.where(is_valid, factor, 0.0))
        clipped = jax.tree.map(lambda u: scale_array(u, factor), updates)
        inner_updates, inner_state = inner_tx.update(clipped, state.inner_state, params)
        # Minus zero is the number that changes nothing when added: -0.0 + 0.0 would be 0.0.
        new_updates = jax.tree.map(lambda u: jnp.where(is_valid, u, -jnp.zeros_like(u)), inner_updates)
        new_state = tracker.next(state, norm=norm, is_valid=is_valid, is_reached=is_reached)
        new_state = new_state._replace(
            inner_state=jax.tree.map(
                lambda new, old: jnp.where(is_valid, new, old), inner_state, state.inner_state
            )
        )
        add_summary("gradient_valid", is_valid.astype(jnp.float32))
        add_summary("num_skipped_steps", new_state.nonvalid_count)
        return new_updates, new_state

    def partition_fn(param_specs: Nested[ParameterSpec]) -> SkipClipState:
        return tracker.init(inner_tx.partition(param_specs), zero=scalar_spec)

    return PartitionedGradientTransformation(init=init_fn, update=update_fn, partition=partition_fn)
