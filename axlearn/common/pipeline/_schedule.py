"""In which order micro-batches pass through the stages of a pipeline, and where they wait.

All stages run at once, as one vectorized call, on arrays with a leading dim of stages that is split over the mesh
axis "pipeline". In step t stage n works on micro-batch t - n. Between steps every array moves on by one stage, which
on a mesh is one collective-permute. M micro-batches take M + N - 1 steps through N stages; in N - 1 of them a stage has
no micro-batch that is its own (the bubble): it computes on whatever real values are at hand, and nobody looks at the
result.

Reference: Xu et al., GSPMD, https://arxiv.org/abs/2105.04663, section 3.3; Huang et al., GPipe,
    https://arxiv.org/abs/1811.06965.
"""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from axlearn.common.config import REQUIRED, Configurable, Required, config_class, error_message
from axlearn.common.utils import Nested, Tensor, maybe_shard

# The mesh axis that the stages are split over.
PIPELINE_AXIS = "pipeline"


class StageInputs(NamedTuple):
    """What all stages get in one step: trees of arrays with a leading dim of stages; None where there is nothing.

    Attributes:
        carry: What the stage before made of the micro-batch (for the first stage: the micro-batch itself).
        side: What belongs to the micro-batch and is the same in every stage.
        held: What the stage itself keeps from step to step.
        microbatch_ids: Which micro-batch, [num_stages], in [0, num_microbatches) also in the bubble.
        is_live: Whether it is not the bubble, [num_stages].
    """

    carry: Nested[Tensor]
    side: Any
    held: Any
    microbatch_ids: Tensor
    is_live: Tensor


# Runs all stages once: from their inputs to the new carry, the new `held`, and what else the step leaves behind.
StagesFn = Callable[[StageInputs], tuple[Nested[Tensor], Nested[Tensor], Any]]


class ScheduleOutputs(NamedTuple):
    """What became of all micro-batches.

    Attributes:
        carry: What the last stage made of them; leaves [num_microbatches, ...].
        held: What each stage holds after the last step; leaves [num_stages, ...].
        left: What else the stages left behind; leaves [num_stages, num_microbatches, ...].
    """

    carry: Nested[Tensor]
    held: Any
    left: Any


def shard_stages(tree: Nested[Tensor], *, num_leading: int = 1) -> Nested[Tensor]:
    """Splits the first dim of every array over the pipeline's mesh axis, and leaves the rest to the compiler.

    Args:
        tree: Arrays.
        num_leading: How many leading dims are not the compiler's to split: those behind the first are whole.
    """

    def shard(x: Tensor) -> Tensor:
        rest = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - num_leading)
        return maybe_shard(x, (PIPELINE_AXIS, *(None,) * (num_leading - 1), *rest))

    return jax.tree.map(shard, tree)


def select_stages(is_chosen: Tensor, chosen: Nested[Tensor], other: Nested[Tensor]) -> Nested[Tensor]:
    """Takes each entry of the leading dim from one of two trees."""
    return jax.tree.map(
        lambda x, y: jnp.where(is_chosen.reshape(-1, *(1,) * (y.ndim - 1)), x, y), chosen, other
    )


def first_of_each(tree: Nested[Tensor]) -> Nested[Tensor]:
    """For each stage, a micro-batch that it has at hand before the first one arrives; leaves [num_stages, n, ...]."""
    return jax.lax.stop_gradient(jax.tree.map(lambda x: x[:, 0], tree))


def shift_stages(tree: Nested[Tensor], by: int) -> Nested[Tensor]:
    """Moves entries of the leading dim on by one (1) or back by one (-1); a zero comes in, the last one is lost.

    As one operation, of which compilers make one collective-permute, and another one for its derivative.
    """

    def shift(x: Tensor) -> Tensor:
        zero = jnp.zeros([], x.dtype)
        return jax.lax.pad(x, zero, [(by, -by, 0), *[(0, 0, 0)] * (x.ndim - 1)])

    return jax.tree.map(shift, tree)


class BaseSchedule(Configurable):
    """Runs micro-batches through stages. Subclasses say where they wait before the first and behind the last."""

    @config_class
    class Config(Configurable.Config):
        """Configures `BaseSchedule`."""

        # Number of stages, at least 1. The pipeline fills it in.
        num_stages: Required[int] = REQUIRED
        # Number of micro-batches, at least 1. The pipeline fills it in.
        num_microbatches: Required[int] = REQUIRED

    def __init__(self, cfg: Config):
        super().__init__(cfg)
        for field in ("num_stages", "num_microbatches"):
            if getattr(cfg, field) < 1:
                raise ValueError(
                    error_message(
                        where=type(self).__name__,
                        what=f"{field}={getattr(cfg, field)}",
                        expected="at least 1",
                        nearest=1,
                    )
                )

    @property
    def num_steps(self) -> int:
        """How often each stage runs."""
        return self.config.num_microbatches + self.config.num_stages - 1

    @property
    def bubble_fraction(self) -> float:
        """The part of all steps in which a stage does nothing of use."""
        return (self.config.num_stages - 1) / self.num_steps

    def run(self, stages_fn: StagesFn, *, carry: Nested[Tensor], side: Any, held: Any) -> ScheduleOutputs:
        """Runs all micro-batches through all stages.

        Args:
            stages_fn: Runs all stages once.
            carry: What the first stage gets; leaves [num_microbatches, ...].
            side: See `StageInputs`; leaves [num_microbatches, ...].
            held: See `StageInputs`; leaves [num_stages, ...].

        Returns:
            What became of them.
        """
        cfg: BaseSchedule.Config = self.config
        stage_ids = jnp.arange(cfg.num_stages)

        def step(state: tuple[Any, Any, Any], x: Any) -> tuple[tuple[Any, Any, Any], tuple[Any, Any]]:
            (waiting, arriving, held), (t, fed) = state, x
            fed = self._feed(waiting, fed, step=t)
            carry_t, side_t = shard_stages(select_stages(stage_ids == 0, fed, arriving))
            microbatch_ids = t - stage_ids
            made, held, left = stages_fn(
                StageInputs(
                    carry=carry_t,
                    side=side_t,
                    held=held,
                    microbatch_ids=jnp.clip(microbatch_ids, 0, cfg.num_microbatches - 1),
                    is_live=(microbatch_ids >= 0) & (microbatch_ids < cfg.num_microbatches),
                )
            )
            made = shard_stages(made)
            waiting, emitted = self._take(waiting, (made, side_t), stage_ids=stage_ids, step=t)
            return (waiting, shard_stages(shift_stages((made, side_t), 1)), held), (emitted, left)

        waiting, arriving, fed = self._load((carry, side))
        state = (waiting, shard_stages(arriving), held)
        state, (emitted, left) = jax.lax.scan(step, state, (jnp.arange(self.num_steps), fed))
        return ScheduleOutputs(carry=self._unload(state[0], emitted), held=state[2], left=self._live(left))

    def _live(self, left: Any) -> Any:
        """From [num_steps, num_stages, ...] to [num_stages, num_microbatches, ...], without the bubble."""
        cfg: BaseSchedule.Config = self.config

        def live(x: Tensor) -> Tensor:
            cut = lambda y, n: jax.lax.dynamic_slice_in_dim(y, n, cfg.num_microbatches)  # noqa: E731
            return jax.vmap(cut)(jnp.moveaxis(x, 1, 0), jnp.arange(cfg.num_stages))

        return jax.tree.map(live, left)

    @abc.abstractmethod
    def _load(self, inputs: Nested[Tensor]) -> tuple[Any, Nested[Tensor], Any]:
        """Makes ready for the first step.

        Args:
            inputs: A pair (carry, side); leaves [num_microbatches, ...].

        Returns:
            What waits, carried from step to step; what the stages "get from the stage before" in the first step,
            which must be like a micro-batch; and what a step gets of its own, leaves [num_steps, ...].
        """

    @abc.abstractmethod
    def _feed(self, waiting: Any, fed: Any, *, step: Tensor) -> Nested[Tensor]:
        """The micro-batch that the first stage begins, leaves [num_stages, ...]; others' entries do not matter."""

    @abc.abstractmethod
    def _take(
        self, waiting: Any, made: tuple[Any, Any], *, stage_ids: Tensor, step: Tensor
    ) -> tuple[Any, Any]:
        """Puts what the stages made, (carry, side), where it waits; returns (waiting, what to stack over the steps)."""

    @abc.abstractmethod
    def _unload(self, waiting: Any, emitted: Any) -> Nested[Tensor]:
        """The results of all micro-batches, [num_microbatches, ...], after the last step."""
