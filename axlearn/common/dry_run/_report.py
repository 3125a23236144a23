"""What a dry run finds out about a trainer: every array, its place, the memory and the operations of a step."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Optional

import numpy as np
from jax.sharding import PartitionSpec

from axlearn.common.dry_run._estimate import step_peak_bytes
from axlearn.common.flops import FlopsPerToken
from axlearn.common.trainer import (
    CompiledMemory,
    MemoryNeeds,
    MemoryThere,
    SpmdTrainer,
    WholeParameters,
    compiled_memory,
)
from axlearn.common.trainer import shard_bytes as shard_bytes_of
from axlearn.common.utils import flatten_items


@dataclasses.dataclass(frozen=True)
class ArrayRow:
    """One array.

    Attributes:
        path: Its path.
        shape: Its shape, over all devices.
        dtype: The name of its type.
        axes: The mesh axes over which each dimension is split; those of size 1 are left out.
        dropped: The mesh axes that its layer asked for and that do not divide the dimension.
        bytes_per_device: Bytes of the part that one device has.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    axes: tuple[tuple[str, ...], ...]
    dropped: tuple[str, ...]
    bytes_per_device: int

    @property
    def size(self) -> int:
        """The number of its elements."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class DryRun:
    """What would happen if a trainer ran.

    Attributes:
        name: The path of the trainer.
        devices: How many devices of which kind, in words.
        mesh: The size of each mesh axis by its name.
        parameters: The model's parameters.
        batch: The arrays of a batch.
        flops_per_token: Of training; None where the model does not tell.
        tokens_per_step: Positions of a batch, padding included; None where the batch has no tokens.
        needs: Bytes per device, the activations among them an estimate.
        there: Bytes there; None where nobody can tell.
        compiled: What the compiler says; None where it was not asked, or does not say.
        whole: The parameters that are whole along axes of the mesh that split others.
    """

    name: str
    devices: str
    mesh: Mapping[str, int]
    parameters: tuple[ArrayRow, ...]
    batch: tuple[ArrayRow, ...]
    flops_per_token: Optional[FlopsPerToken]
    tokens_per_step: Optional[int]
    needs: MemoryNeeds
    there: Optional[MemoryThere]
    compiled: Optional[CompiledMemory]
    whole: WholeParameters

    @property
    def num_parameters(self) -> int:
        """The number of the model's parameters."""
        return sum(row.size for row in self.parameters)

    @property
    def needed_bytes(self) -> int:
        """Bytes per device: what the compiler says where it was asked, else the estimate."""
        return self.needs.total if self.compiled is None else self.compiled.total

    @property
    def fits(self) -> Optional[bool]:
        """Whether a run would fit; None where nobody can tell."""
        return None if self.there is None else self.needed_bytes <= self.there.num_bytes


def dry_run(trainer: SpmdTrainer, *, there: Optional[MemoryThere], compile_step: bool = False) -> DryRun:
    """Finds out what a trainer would take, from shapes alone: no array is made, nothing is read or written.

    Args:
        trainer: The trainer.
        there: The memory there, such as `memory_there` returns; None if that is not known.
        compile_step: Whether to compile the step too, for the memory that its compiler states.
    """
    programs = trainer.programs
    needs = estimated_needs(trainer)
    batch = dict(flatten_items(programs.batch_specs()))
    compiled = compiled_memory(trainer.compile_train_step()) if compile_step else None
    with trainer.mesh() as mesh:
        sizes = {str(name): int(size) for name, size in mesh.shape.items()}
        devices = list(mesh.devices.flat)
        parameters = [_row(path, spec, sizes) for path, spec in flatten_items(programs.state_specs.model)]
        rows = [_row(path, spec, sizes) for path, spec in batch.items()]
    input_ids = batch.get("input_ids")
    flops_fn = getattr(trainer.model, "flops_per_token", None)
    return DryRun(
        name=trainer.path(),
        devices=f"{len(devices)} x {devices[0].device_kind}",
        mesh=sizes,
        parameters=tuple(parameters),
        batch=tuple(rows),
        flops_per_token=None if input_ids is None or flops_fn is None else flops_fn(input_ids.shape[-1]),
        tokens_per_step=None if input_ids is None else math.prod(input_ids.shape),
        needs=needs,
        there=there,
        compiled=compiled,
        whole=programs.whole_parameters(),
    )


def estimated_needs(trainer: SpmdTrainer) -> MemoryNeeds:
    """Returns what a run takes of each device, an estimate of the activations included.

    Args:
        trainer: The trainer.
    """
    needs = trainer.programs.memory_needs()
    return dataclasses.replace(needs, activations=max(step_peak_bytes(trainer) - needs.gradients, 0))


def _row(path: str, spec: Any, axis_sizes: Mapping[str, int]) -> ArrayRow:
    """Describes an array by its spec; on a mesh."""
    axes = _axes(spec.sharding.spec, ndim=len(spec.shape), axis_sizes=axis_sizes)
    wanted = _axes(getattr(spec, "mesh_axes", None), ndim=len(spec.shape), axis_sizes=axis_sizes)
    return ArrayRow(
        path=path,
        shape=tuple(int(dim) for dim in spec.shape),
        dtype=np.dtype(spec.dtype).name,
        axes=axes,
        dropped=tuple(axis for dim, entry in enumerate(wanted) for axis in entry if axis not in axes[dim]),
        bytes_per_device=shard_bytes_of(spec),
    )


def _axes(
    spec: Optional[PartitionSpec], *, ndim: int, axis_sizes: Mapping[str, int]
) -> tuple[tuple[str, ...], ...]:
    """Returns for each dimension the mesh axes of a spec that have more than one device."""
    entries = [(entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in (spec or ())]
    entries += [()] * (ndim - len(entries))
    return tuple(tuple(axis for axis in entry if axis_sizes.get(axis, 1) > 1) for entry in entries)
