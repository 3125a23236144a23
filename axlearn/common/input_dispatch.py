"""Which process reads which rows of a batch, and how a batch gets a size that the mesh can hold.

The *logical* batch is the one the model sees. The *physical* batch is the one that lies on the mesh when it comes
from the hosts: it has padding rows where the logical one does not divide over processes and devices. The step
takes them out again before the model sees them, so that they change no number.

A *physical feed* is a process that hands in its part of the physical batch, which all do. A *logical feed* is one
that reads data: it hands in its rows of the logical batch, with padding behind them; the others hand in padding.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

import jax
import jax.numpy as jnp
import numpy as np

from axlearn.common.config import REQUIRED, Required, config_class, error_message
from axlearn.common.module import Module, nowrap
from axlearn.common.utils import Nested, Tensor, TensorSpec

HostBatch = dict[str, Any]
BatchSpec = dict[str, TensorSpec]

# Of padding rows: no target, also for those who see the physical batch. Everything else is zeros.
PADDING_VALUES = {"target_labels": -1}


class BaseInputDispatcher(Module):
    """Divides batches over feeds. Every method is a pure function of the config and the shapes."""

    @config_class
    class Config(Module.Config):
        # Number of rows of the batch that the model sees, at least 1.
        global_logical_batch_size: Required[int] = REQUIRED

    @nowrap
    def feed_read_config(self) -> dict[str, int]:
        """Returns which part of the logical batch this process is to read: `num_shards` and `shard_index`.

        A process that is no logical feed reads what another one reads, so that it sees as many batches.
        """
        raise NotImplementedError(type(self))

    @property
    def feed_logical_batch_size(self) -> int:
        """The number of rows that a logical feed reads of each batch."""
        raise NotImplementedError(type(self))

    @nowrap
    def logical_to_physical_batch(self, batch: HostBatch) -> HostBatch:
        """Returns this process' part of the physical batch.

        Args:
            batch: The rows that it has read, as `feed_read_config` says.
        """
        raise NotImplementedError(type(self))

    @nowrap
    def physical_rows_to_logical_rows(self, batch: HostBatch) -> HostBatch:
        """Returns the rows of the logical batch in this process' part of the physical one, maybe none."""
        raise NotImplementedError(type(self))

    @nowrap
    def logical_to_physical_shapes(self, specs: BatchSpec) -> BatchSpec:
        """Returns the shapes of the global physical batch from those of the global logical one."""
        raise NotImplementedError(type(self))

    @nowrap
    def physical_to_logical_batch(self, batch: Nested[Tensor]) -> Nested[Tensor]:
        """Returns the global logical batch; called inside the jitted step with the global physical one."""
        raise NotImplementedError(type(self))


class _Layout(NamedTuple):
    num_physical_feeds: int
    physical_feed_index: int
    # The physical feeds that read, in the order of their rows of the logical batch.
    logical_feed_indices: tuple[int, ...]
    feed_logical_batch_size: int
    feed_physical_batch_size: int

    @property
    def is_identity(self) -> bool:
        return (
            self.logical_feed_indices == tuple(range(self.num_physical_feeds))
            and self.feed_logical_batch_size == self.feed_physical_batch_size
        )


class InputDispatcher(BaseInputDispatcher):
    """Every logical feed reads an equal, consecutive part of the logical batch; padding stands behind it.

    Where the batch divides over processes and devices, which is what one wants, it does nothing at all.
    """

    @config_class
    class Config(BaseInputDispatcher.Config):
        # Number of rows that lie on the mesh, a multiple of num_physical_feeds. None: the smallest that
        # divides over feeds and devices and holds the logical batch.
        global_physical_batch_size: Optional[int] = None
        # Number of processes that hand in a part of the batch. None: all.
        num_physical_feeds: Optional[int] = None
        # Which of them this process is, counted from 0. None: by its place among all processes.
        physical_feed_index: Optional[int] = None
        # The physical feeds that read data. None: the first n, n being the largest number of feeds over which
        # the logical batch divides.
        logical_feed_indices: Optional[Sequence[int]] = None
        # Into how many parts the mesh cuts a batch. None: set by the input from its `partition_spec`; one
        # per feed where there is no mesh.
        num_batch_shards: Optional[int] = None

    def __init__(self, cfg: Config, *, parent: Optional[Module]):
        super().__init__(cfg, parent=parent)
        self._layout = self._make_layout(cfg)

    def _make_layout(self, cfg: Config) -> _Layout:
        rows = cfg.global_logical_batch_size
        num_feeds = jax.process_count() if cfg.num_physical_feeds is None else cfg.num_physical_feeds
        index = jax.process_index() if cfg.physical_feed_index is None else cfg.physical_feed_index
        self._check(rows >= 1, "global_logical_batch_size", rows, "at least 1")
        self._check(num_feeds >= 1, "num_physical_feeds", num_feeds, "at least 1")
        self._check(0 <= index < num_feeds, "physical_feed_index", index, f"in [0, {num_feeds})")
        if cfg.logical_feed_indices is None:
            num_readers = next(n for n in range(min(num_feeds, rows), 0, -1) if rows % n == 0)
            readers = tuple(range(num_readers))
        else:
            readers = tuple(cfg.logical_feed_indices)
        self._check(
            bool(readers) and readers == tuple(sorted({*readers} & {*range(num_feeds)})),
            "logical_feed_indices",
            list(readers),
            f"some of 0 to {num_feeds - 1}, ascending",
        )
        self._check(
            rows % len(readers) == 0,
            "global_logical_batch_size",
            rows,
            f"a multiple of the {len(readers)} feeds",
        )
        feed_rows = rows // len(readers)
        # Whole shards for every feed, and as many rows as it reads.
        unit = math.lcm(num_feeds, cfg.num_batch_shards or 1)
        least = unit * -(-feed_rows * num_feeds // unit)
        physical = cfg.global_physical_batch_size
        if physical is None:
            physical = least
        self._check(
            physical >= least and physical % unit == 0,
            "global_physical_batch_size",
            physical,
            f"a multiple of {unit} from {least} on",
        )
        return _Layout(num_feeds, index, readers, feed_rows, physical // num_feeds)

    def _check(self, is_legal: bool, field: str, value: Any, expected: str) -> None:
        if not is_legal:
            raise ValueError(
                error_message(
                    where=f"{self.path()}.{field}", what=f"{value!r} cannot be used", expected=expected
                )
            )

    @property
    def num_logical_feeds(self) -> int:
        """The number of processes that read data."""
        return len(self._layout.logical_feed_indices)

    @property
    def logical_feed_index(self) -> Optional[int]:
        """Which of the logical feeds this process is; None if it is none."""
        layout = self._layout
        if layout.physical_feed_index not in layout.logical_feed_indices:
            return None
        return layout.logical_feed_indices.index(layout.physical_feed_index)

    @property
    def feed_logical_batch_size(self) -> int:
        return self._layout.feed_logical_batch_size

    @property
    def feed_physical_batch_size(self) -> int:
        """The number of rows that each process hands in."""
        return self._layout.feed_physical_batch_size

    @nowrap
    def feed_read_config(self) -> dict[str, int]:
        index = self.logical_feed_index
        return {"num_shards": self.num_logical_feeds, "shard_index": 0 if index is None else index}

    @nowrap
    def logical_to_physical_batch(self, batch: HostBatch) -> HostBatch:
        if self._layout.is_identity:
            return batch
        num_read = 0 if self.logical_feed_index is None else self.feed_logical_batch_size

        def pad(key_path: Any, rows: np.ndarray) -> np.ndarray:
            if len(rows) != self.feed_logical_batch_size:
                raise ValueError(
                    error_message(
                        where=f"{self.path()}: {jax.tree_util.keystr(key_path, simple=True, separator='/')}",
                        what=f"the feed has read {len(rows)} rows",
                        expected=f"feed_logical_batch_size={self.feed_logical_batch_size}",
                    )
                )
            name = jax.tree_util.keystr(key_path[-1:], simple=True)
            value = PADDING_VALUES.get(name, 0)
            physical = np.full((self.feed_physical_batch_size, *rows.shape[1:]), value, dtype=rows.dtype)
            physical[:num_read] = rows[:num_read]
            return physical

        physical: HostBatch = jax.tree_util.tree_map_with_path(pad, batch)
        return physical

    @nowrap
    def physical_rows_to_logical_rows(self, batch: HostBatch) -> HostBatch:
        if self._layout.is_identity:
            return batch
        num_read = 0 if self.logical_feed_index is None else self.feed_logical_batch_size
        rows: HostBatch = jax.tree.map(lambda x: x[:num_read], batch)
        return rows

    @nowrap
    def logical_to_physical_shapes(self, specs: BatchSpec) -> BatchSpec:
        num_rows = self.feed_physical_batch_size * self._layout.num_physical_feeds
        physical: BatchSpec = jax.tree.map(
            lambda spec: TensorSpec(shape=(num_rows, *spec.shape[1:]), dtype=spec.dtype), specs
        )
        return physical

    @nowrap
    def physical_to_logical_batch(self, batch: Nested[Tensor]) -> Nested[Tensor]:
        layout = self._layout
        if layout.is_identity:
            return batch
        # Where each logical row stands is known when the step is compiled.
        feeds = np.asarray(layout.logical_feed_indices)[:, None]
        places = feeds * layout.feed_physical_batch_size + np.arange(layout.feed_logical_batch_size)
        logical: Nested[Tensor] = jax.tree.map(lambda x: jnp.take(x, places.reshape(-1), axis=0), batch)
        return logical
