"""The schedule that streams: what waits is spread over the stages, and goes round."""

from typing import Any

import jax
import jax.numpy as jnp

from axlearn.common.config import config_class, error_message
from axlearn.common.pipeline._schedule import (
    BaseSchedule,
    first_of_each,
    select_stages,
    shard_stages,
    shift_stages,
)
from axlearn.common.utils import Nested, Tensor


class StreamSchedule(BaseSchedule):
    """Each device of the pipeline holds its share of the micro-batches that wait, and of those that are done.

    Micro-batches lie in N rows of M / N, row n with stage n. Step t begins with the micro-batch in row 0 and column
    t mod (M / N); then this column moves up by one row, and into the place that becomes free in the last row goes what
    the last stage has just made. At the end results lie where their micro-batches lay, but for a rotation of
    columns. This costs a second collective-permute per step, which does not wait for the stage's computation, and takes
    from each device the inputs and results of the others.
    """

    @config_class
    class Config(BaseSchedule.Config):
        """Configures `StreamSchedule`."""

    def __init__(self, cfg: Config):
        super().__init__(cfg)
        if cfg.num_microbatches % cfg.num_stages:
            below = cfg.num_microbatches // cfg.num_stages * cfg.num_stages
            raise ValueError(
                error_message(
                    where="StreamSchedule",
                    what=f"num_microbatches={cfg.num_microbatches} for num_stages={cfg.num_stages}",
                    expected="a multiple of the number of stages: each holds the same number of micro-batches",
                    nearest=[x for x in (below, below + cfg.num_stages) if x],
                    advice="Or use GPipeSchedule, which takes any number",
                )
            )

    @property
    def _num_columns(self) -> int:
        return self.config.num_microbatches // self.config.num_stages

    def _load(self, inputs: Nested[Tensor]) -> tuple[Any, Nested[Tensor], Any]:
        num_stages = self.config.num_stages
        rows = jax.tree.map(lambda x: x.reshape(num_stages, -1, *x.shape[1:]), inputs)
        rows = shard_stages(rows, num_leading=2)
        return rows, first_of_each(rows), ()

    def _column(self, waiting: Any, step: Tensor) -> Nested[Tensor]:
        index = step % self._num_columns
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, axis=1, keepdims=False), waiting)

    def _feed(self, waiting: Any, fed: Any, *, step: Tensor) -> Nested[Tensor]:
        return self._column(waiting, step)

    def _take(
        self, waiting: Any, made: tuple[Any, Any], *, stage_ids: Tensor, step: Tensor
    ) -> tuple[Any, Any]:
        is_last = stage_ids == self.config.num_stages - 1
        column = shard_stages(select_stages(is_last, made, shift_stages(self._column(waiting, step), -1)))
        index = step % self._num_columns
        put = lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, index, axis=1)  # noqa: E731
        return shard_stages(jax.tree.map(put, waiting, column), num_leading=2), ()

    def _unload(self, waiting: Any, emitted: Any) -> Nested[Tensor]:
        num_stages = self.config.num_stages

        def unload(x: Tensor) -> Tensor:
            return jnp.roll(x, 1 - num_stages, axis=1).reshape(-1, *x.shape[2:])

        return jax.tree.map(unload, waiting[0])
