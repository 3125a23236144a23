"""What every input has in common: batches with a position, their place on the mesh, their shapes."""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Optional, Union

import jax
import numpy as np
from jax.sharding import PartitionSpec

from axlearn.common.config import (
    InstantiableConfig,
    config_class,
    error_message,
    maybe_instantiate,
    maybe_set_config,
)
from axlearn.common.input_dispatch import BaseInputDispatcher
from axlearn.common.module import Module, nowrap
from axlearn.common.utils import (
    BatchPart,
    Nested,
    Tensor,
    TensorSpec,
    batch_part,
    current_mesh,
    input_partition_spec,
    match_regex_rules,
    maybe_shard,
)

Batch = dict[str, np.ndarray]
BatchPartitioner = Callable[[Nested[Tensor]], Nested[Tensor]]


def lm_element_spec(shape: tuple[int, ...]) -> dict[str, TensorSpec]:
    """Returns shape and dtype of each array of a language model's batch, or of one row of it.

    Args:
        shape: (batch_size, seq_len) of a batch, (seq_len,) of a row.
    """
    keys = ("input_ids", "target_labels", "input_segment_ids", "input_positions")
    return {
        **dict.fromkeys(keys, TensorSpec(shape=shape, dtype=np.int32)),
        "target_num_bytes": TensorSpec(shape=shape[:-1], dtype=np.int32),
    }


class PathAndRank(NamedTuple):
    """Which leaves of a batch a partition rule is for. A plain tuple of the two does as well."""

    # Regular expression that the whole path has to match; None: any path.
    path: Optional[str]
    # Number of dimensions that the leaf has to have; None: any number.
    rank: Optional[int]

    def __repr__(self) -> str:
        # Rules are keys of a config field, and dumps show them as plain tuples.
        return repr(tuple(self))


def partition_by_path_rank(
    path_rank_to_partition: Mapping[
        Union[PathAndRank, tuple[Optional[str], Optional[int]]], Optional[PartitionSpec]
    ],
) -> BatchPartitioner:
    """Returns a function that lays the leaves of a batch on the mesh by their path and rank.

    Args:
        path_rank_to_partition: Rules, of which the first that matches a leaf decides. The spec may hold
            `PartitionSpec.UNCONSTRAINED`; axes that the mesh does not have are left out; None leaves the leaf
            as it is.

    Returns:
        A function from a batch to the same batch with sharding constraints. Outside of a mesh, and on a mesh
        of one device, they are void. It raises ValueError for a leaf that no rule matches.
    """
    rules = [(PathAndRank(*key), spec) for key, spec in path_rank_to_partition.items()]

    def spec_of(path: str, rank: int) -> Optional[PartitionSpec]:
        for rule, spec in rules:
            path_matches = rule.path is None or match_regex_rules(path, rules=[(rule.path, True)])
            if path_matches and rule.rank in (None, rank):
                return spec
        raise ValueError(
            error_message(
                where=f"input batch: {path}",
                what=f"no partition rule matches this leaf of rank {rank}",
                expected="one of " + ", ".join(repr(rule) for rule, _ in rules),
                advice="Add a rule to path_rank_to_partition, such as (None, None) for all that is left.",
            )
        )

    def partition(batch: Nested[Tensor]) -> Nested[Tensor]:
        def constrain(key_path: Any, leaf: Tensor) -> Tensor:
            path = jax.tree_util.keystr(key_path, simple=True, separator="/")
            spec = spec_of(path, leaf.ndim)
            return maybe_shard(leaf, None if spec is None else tuple(spec))

        constrained: Nested[Tensor] = jax.tree_util.tree_map_with_path(constrain, batch)
        return constrained

    return partition


class Feed(NamedTuple):
    """The part of every global batch that one process reads: one of equal, consecutive parts.

    Without a dispatcher, the part that its devices hold, of as many as that makes: processes whose devices hold the
    same rows read the same part. With one, of those that read.
    """

    process_index: int
    num_processes: int


class DataIterator:
    """Batches that are a pure function of their index, with a position that can be saved and set.

    The position is one number for all processes of a run. Setting it replays nothing.
    """

    def __init__(
        self,
        *,
        batches_from: Callable[[int], Iterator[Batch]],
        fingerprint: Mapping[str, Union[str, int, float, None]],
    ):
        """Starts at the first batch.

        Args:
            batches_from: Returns the batches from an index on, index 0 being the first.
            fingerprint: What the batches are a function of, beside their index, as JSON values by name.
        """
        self._batches_from = batches_from
        self._fingerprint = dict(fingerprint)
        self._next_step = 0
        self._batches: Optional[Iterator[Batch]] = None

    def __iter__(self) -> "DataIterator":
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            self._batches = self._batches_from(self._next_step)
        batch = next(self._batches)
        self._next_step += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """Returns the position as JSON: the index of the next batch, and the fingerprint of the data."""
        return {"next_step": self._next_step, "fingerprint": dict(self._fingerprint)}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes to a position that `get_state` returned, in this process or another one.

        Raises:
            ValueError: If the position is of other data than these, naming what differs, or is no position.
        """
        fields = state if isinstance(state, Mapping) else {}
        next_step, fingerprint = fields.get("next_step"), fields.get("fingerprint")
        if (
            not isinstance(next_step, int)
            or isinstance(next_step, bool)
            or next_step < 0
            or not isinstance(fingerprint, Mapping)
        ):
            raise ValueError(
                error_message(
                    where="input_iter",
                    what=f"{state!r} is not a position in the data",
                    expected='{"next_step": N, "fingerprint": {...}} with N >= 0',
                )
            )
        differing = [
            f"{name} was {fingerprint.get(name)!r}, is {self._fingerprint.get(name)!r}"
            for name in sorted({*fingerprint, *self._fingerprint})
            if fingerprint.get(name) != self._fingerprint.get(name)
        ]
        if differing:
            raise ValueError(
                error_message(
                    where="input_iter",
                    what=f"the saved position belongs to other data: {'; '.join(differing)}",
                    expected="the data that the run was started with",
                    advice="Set back what has changed, or start a new run in another directory.",
                )
            )
        self._next_step = next_step
        self._batches = None

    def set_step(self, step: int) -> None:
        """Goes behind the batches of the first `step` steps of a run over these data, which had other positions."""
        self._next_step = step
        self._batches = None


class Input(Module):
    """Where batches come from. Subclasses implement `batches` and `element_spec`.

    A batch is a dict of numpy arrays with one leading batch dimension. For language models the keys are
    `input_ids`, `target_labels`, `input_segment_ids`, `input_positions` ([batch, seq_len] int32) and
    `target_num_bytes` ([batch] int32).
    """

    @config_class
    class Config(Module.Config):
        # How batches lie on the mesh when they come from the host; None: split over all axes of the mesh.
        partition_spec: Optional[PartitionSpec] = None
        # Which process reads which part of the batch, and how a batch that does not divide over the devices
        # lies on them (`input_dispatch`); None: equal consecutive parts in the order of the processes.
        input_dispatcher: Optional[InstantiableConfig[Any]] = None
        # Makes the function that lays the batch on the mesh inside the step; None: it stays as it came.
        input_partitioner: Optional[InstantiableConfig[Any]] = None

    def __init__(self, cfg: Config, *, parent: Optional[Module]):
        super().__init__(cfg, parent=parent)
        self._dispatcher: Optional[BaseInputDispatcher] = None
        if cfg.input_dispatcher is not None:
            dispatcher_cfg: Any = cfg.input_dispatcher.clone()
            if getattr(dispatcher_cfg, "num_batch_shards", 0) is None:
                maybe_set_config(dispatcher_cfg, num_batch_shards=self._num_batch_shards())
            if getattr(dispatcher_cfg, "num_physical_feeds", 0) is None and jax.process_count() > 1:
                part = self._physical_part()
                maybe_set_config(
                    dispatcher_cfg, num_physical_feeds=part.num_parts, physical_feed_index=part.part_index
                )
            self._dispatcher = self._add_child("input_dispatcher", dispatcher_cfg)
        self._partitioner: Optional[BatchPartitioner] = maybe_instantiate(cfg.input_partitioner)

    @property
    def partition_spec(self) -> PartitionSpec:
        """How batches lie on the mesh of the current thread when they come from the host."""
        spec = self.config.partition_spec
        # An empty spec, for whole batches on every device, is false as a truth value.
        return input_partition_spec() if spec is None else spec

    def _num_batch_shards(self) -> Optional[int]:
        """Returns into how many parts the mesh of the current thread cuts a batch; None without a mesh."""
        mesh = current_mesh()
        if mesh is None:
            return None
        spec = self.partition_spec
        axes = spec[0] if len(spec) else None
        axes = (axes,) if isinstance(axes, str) else axes or ()
        return math.prod(mesh.shape.get(axis, 1) for axis in axes)

    def _mesh_part(self) -> BatchPart:
        """Returns the part of the batch that the devices of this process hold; without a mesh, one per process."""
        if current_mesh() is None:
            return BatchPart(jax.process_index(), jax.process_count())
        return batch_part(self.partition_spec)

    def _physical_part(self) -> BatchPart:
        """Returns the part of the physical batch that this process hands in, if all processes have one like it.

        Raises:
            ValueError: If the mesh cuts the batch unevenly over the processes.
        """
        part = self._mesh_part()
        if current_mesh() is None:
            return part
        counts = [
            batch_part(self.partition_spec, process_index=i).num_parts for i in range(jax.process_count())
        ]
        if len(set(counts)) > 1:
            raise ValueError(
                error_message(
                    where=f"{self.path()}.input_dispatcher",
                    what=f"the mesh gives the processes unequal parts of a batch: 1/n each with n={counts}",
                    expected="a mesh in which all processes hold equal, consecutive parts",
                    advice="Put an axis of the batch in front of all others in mesh_shape.",
                )
            )
        return part

    @property
    def num_feeds(self) -> int:
        """Into how many parts the processes cut every batch to read it."""
        if self._dispatcher is not None:
            return int(self._dispatcher.feed_read_config()["num_shards"])
        return self._mesh_part().num_parts

    @property
    def vocab_size(self) -> Optional[int]:
        """Number of ids that batches may hold, counted from 0; None where the input does not know. May read data."""
        return None

    @nowrap
    def batches(self) -> DataIterator:
        """Returns an iterator over the batches from the first one on.

        Training data never ends; evaluation data does.
        """
        raise NotImplementedError(type(self))

    @nowrap
    def element_spec(self) -> dict[str, TensorSpec]:
        """Returns shape and dtype of each array of a global batch as it comes from the hosts.

        Reads no data. Where the arrays lie is the matter of `partition_spec`.
        """
        raise NotImplementedError(type(self))

    def __iter__(self) -> Iterator[Batch]:
        return self.batches()

    def _feed(self, global_batch_size: int) -> Feed:
        """Returns the part of every batch that this process reads.

        Raises:
            ValueError: If the batch does not divide over the processes, or the dispatcher has another size.
        """
        if self._dispatcher is not None:
            expected = self._dispatcher.config.global_logical_batch_size
            if global_batch_size != expected:
                raise ValueError(
                    error_message(
                        where=f"{self.path()}.global_batch_size",
                        what=f"{global_batch_size} is not what the dispatcher divides",
                        expected=f"input_dispatcher.global_logical_batch_size={expected}",
                    )
                )
            part = self._dispatcher.feed_read_config()
            return Feed(process_index=part["shard_index"], num_processes=part["num_shards"])
        index, count = self._mesh_part()
        if global_batch_size < 1 or global_batch_size % count:
            raise ValueError(
                error_message(
                    where=f"{self.path()}.global_batch_size",
                    what=f"{global_batch_size} does not divide over the {count} parts that processes read",
                    expected=f"a positive multiple of {count}",
                )
            )
        return Feed(process_index=index, num_processes=count)

    @nowrap
    def _to_physical(self, batch: Batch) -> Batch:
        """Returns what this process hands in, from the rows that it has read."""
        return batch if self._dispatcher is None else self._dispatcher.logical_to_physical_batch(batch)

    @nowrap
    def _to_physical_spec(self, spec: dict[str, TensorSpec]) -> dict[str, TensorSpec]:
        return spec if self._dispatcher is None else self._dispatcher.logical_to_physical_shapes(spec)

    @nowrap
    def logical_rows(self, batch: Batch) -> Batch:
        """Returns a batch that `batches` gave without the rows that are only there to fill up the mesh."""
        return batch if self._dispatcher is None else self._dispatcher.physical_rows_to_logical_rows(batch)

    @nowrap
    def dispatch_global_batch(self, batch: Nested[Tensor]) -> Nested[Tensor]:
        """Lays a global batch on the mesh as the model wants it; called inside the jitted step.

        Args:
            batch: The global batch as it came from the host.

        Returns:
            The rows that the dispatcher has read, with the constraints of `input_partitioner`.
        """
        if self._dispatcher is not None:
            batch = self._dispatcher.physical_to_logical_batch(batch)
        return batch if self._partitioner is None else self._partitioner(batch)

    @nowrap
    def partition_rows(self, rows: Nested[Tensor]) -> Nested[Tensor]:
        """Lays some rows of a dispatched batch, such as a micro-batch, on the mesh as the batch lies there.

        Args:
            rows: A part of what `dispatch_global_batch` returned.

        Returns:
            The same rows with constraints; axes that their number does not divide over are left out.
        """
        if self._partitioner is not None:
            return self._partitioner(rows)
        spec = tuple(self.partition_spec)
        constrained: Nested[Tensor] = jax.tree.map(lambda x: maybe_shard(x, spec[: x.ndim]), rows)
        return constrained

    @nowrap
    def write_assets(self, directory: Union[str, os.PathLike[str]]) -> None:
        """Writes what it takes to read and write text as this input does, such as a tokenizer; here: nothing.

        Args:
            directory: A folder of the run, made where something is written.
        """
        del directory
