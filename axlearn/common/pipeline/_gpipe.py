"""The schedule of GPipe: what waits is everywhere."""

from typing import Any

import jax
import jax.numpy as jnp

from axlearn.common.config import config_class
from axlearn.common.pipeline._schedule import BaseSchedule, first_of_each, shard_stages
from axlearn.common.utils import Nested, Tensor


class GPipeSchedule(BaseSchedule):
    """All micro-batches wait on every device of the pipeline, those that are done on every device too.

    Needs no more communication than the way from stage to stage, and one broadcast of the results at the end; each
    device holds the inputs and the results of all micro-batches.
    """

    @config_class
    class Config(BaseSchedule.Config):
        """Configures `GPipeSchedule`."""

    def _load(self, inputs: Nested[Tensor]) -> tuple[Any, Nested[Tensor], Any]:
        num_stages = self.config.num_stages
        # Every stage has its own copy, so that derivatives are added up over stages once, behind the loop.
        copies = jax.tree.map(lambda x: jnp.broadcast_to(x[None], (num_stages, *x.shape)), inputs)
        copies = shard_stages(copies, num_leading=2)

        def all_steps(x: Tensor) -> Tensor:
            bubble = jnp.broadcast_to(x[:, -1:], (num_stages, num_stages - 1, *x.shape[2:]))
            return jnp.moveaxis(jnp.concatenate([x, jax.lax.stop_gradient(bubble)], axis=1), 1, 0)

        return (), first_of_each(copies), jax.tree.map(all_steps, copies)

    def _feed(self, waiting: Any, fed: Any, *, step: Tensor) -> Nested[Tensor]:
        return fed

    def _take(
        self, waiting: Any, made: tuple[Any, Any], *, stage_ids: Tensor, step: Tensor
    ) -> tuple[Any, Any]:
        return waiting, made[0]

    def _unload(self, waiting: Any, emitted: Any) -> Nested[Tensor]:
        num_stages = self.config.num_stages

        def unload(x: Tensor) -> Tensor:
            made = jnp.moveaxis(x[num_stages - 1 :], 1, 0)
            # A sum with zeros, that is a broadcast as one all-reduce; for a slice, compilers add a way to device 0.
            is_last = (jnp.arange(num_stages) == num_stages - 1).reshape(-1, *(1,) * (made.ndim - 1))
            return jnp.sum(jnp.where(is_last, made, jnp.zeros_like(made)), axis=0, dtype=made.dtype)

        return jax.tree.map(unload, emitted)
