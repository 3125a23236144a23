"""Where arrays live: specs, sharding constraints, and the way of a batch from the host to the mesh."""

import dataclasses
import enum
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Optional, Union

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from axlearn.common.utils._mesh import current_mesh
from axlearn.common.utils._trees import Nested, Tensor

NestedPartitionSpec = Optional[Nested[PartitionSpec]]


class DroppedAxes(NamedTuple):
    """Mesh axes that a partition spec names for a dimension that does not divide over them.

    Attributes:
        dim: Which dimension.
        size: Its size.
        axes: The axes that are left out, all of them longer than 1.
        num_shards: What the size would have to be a multiple of for all axes of the spec to apply.
    """

    dim: int
    size: int
    axes: tuple[str, ...]
    num_shards: int

    def __str__(self) -> str:
        names = ", ".join(repr(axis) for axis in self.axes)
        return (
            f"dimension {self.dim} is not split over {names}: its size {self.size} is no multiple of "
            f"{self.num_shards}"
        )


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """An array that need not exist yet.

    Attributes:
        shape: Its shape.
        dtype: Its type; None: not decided.
        mesh_axes: How its dimensions lie on the mesh; None: replicated. On a mesh over whose axes a dimension
            does not divide, it is split over fewer of them; see `fit_to_mesh`.
        memory_kind: "device" or "pinned_host"; None: the default memory of the device.
    """

    shape: Sequence[int]
    dtype: Optional[Any] = None
    mesh_axes: Optional[PartitionSpec] = None
    memory_kind: Optional[str] = None

    @property
    def sharding(self) -> NamedSharding:
        """The sharding of this array on the mesh of the current thread.

        Raises:
            RuntimeError: Outside of `use_mesh`.
        """
        mesh = _require_mesh()
        spec, _ = fit_to_mesh(self.mesh_axes or (), shape=self.shape, mesh=mesh)
        return NamedSharding(mesh, spec, memory_kind=self.memory_kind)

    @property
    def dropped_axes(self) -> tuple[DroppedAxes, ...]:
        """What of `mesh_axes` does not apply on the mesh of the current thread, because it does not divide.

        Raises:
            RuntimeError: Outside of `use_mesh`.
        """
        return fit_to_mesh(self.mesh_axes or (), shape=self.shape, mesh=_require_mesh())[1]


def _require_mesh() -> Union[Mesh, AbstractMesh]:
    mesh = current_mesh()
    if mesh is None:
        raise RuntimeError("There is no mesh here. Expected to be called inside `with use_mesh(mesh):`.")
    return mesh


def fit_to_mesh(
    spec: Union[PartitionSpec, Sequence[Any]], *, shape: Sequence[int], mesh: Union[Mesh, AbstractMesh]
) -> tuple[PartitionSpec, tuple[DroppedAxes, ...]]:
    """Leaves out of a partition spec what the shape does not divide over.

    jax splits arrays into equal parts only. So that any model fits on any mesh, a dimension that does not
    divide over all axes that its spec names is split over the first of them, as many as it divides over. It
    is a function of spec, shape and mesh alone: a parameter, its optimizer state, its average and its
    checkpoint lie alike.

    Args:
        spec: A PartitionSpec, or what makes one. Axes that the mesh does not have are left for jax to refuse.
        shape: The shape of the array.
        mesh: The mesh.

    Returns:
        The spec that applies, and what was left out of it.
    """
    entries, dropped = list(spec), []
    for dim, (entry, size) in enumerate(zip(spec, shape, strict=False)):
        axes = (entry,) if isinstance(entry, str) else entry
        if not isinstance(axes, tuple | list) or not all(axis in mesh.shape for axis in axes):
            continue
        num_kept = next(n for n in range(len(axes), -1, -1) if size % _num_shards(axes[:n], mesh) == 0)
        if num_kept == len(axes):
            continue
        kept = tuple(axes[:num_kept])
        entries[dim] = kept[0] if len(kept) == 1 else kept or None
        left_out = tuple(axis for axis in axes[num_kept:] if mesh.shape[axis] > 1)
        dropped.append(DroppedAxes(dim, size, axes=left_out, num_shards=_num_shards(axes, mesh)))
    return PartitionSpec(*entries), tuple(dropped)


def _num_shards(axes: Sequence[str], mesh: Union[Mesh, AbstractMesh]) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def with_sharding_constraint(x: Any, spec: Any) -> Any:
    """Tells the compiler how an array (or each array of a tree) lies on the mesh.

    Args:
        x: An array or a tree of arrays.
        spec: A PartitionSpec, or a tree of them that is a prefix of `x`.

    Returns:
        `x`, constrained.

    Raises:
        RuntimeError: If there is no mesh; `maybe_shard` passes then.
        ValueError: If the spec names an axis that the mesh does not have.
    """
    _require_mesh()
    return jax.lax.with_sharding_constraint(x, spec)


def _only_axes(spec: Union[PartitionSpec, Sequence[Any]], *, axis_names: set[str]) -> PartitionSpec:
    """The spec without the axes that are not in `axis_names`."""

    def keep(entry: Any) -> Any:
        if isinstance(entry, str):
            return entry if entry in axis_names else None
        if isinstance(entry, tuple | list):
            return tuple(name for name in entry if name in axis_names) or None
        return entry

    return PartitionSpec(*(keep(entry) for entry in spec))


def maybe_shard(x: Tensor, spec: Union[PartitionSpec, Sequence[Any], None]) -> Tensor:
    """Tells the compiler how an array lies on the mesh, as far as there is one.

    Args:
        x: An array.
        spec: A PartitionSpec, or what makes one. Axes that the mesh does not have, that are manual inside of
            `shard_map`, or that a dimension does not divide over (see `fit_to_mesh`), are left out. None: `x`
            returns as it is.

    Returns:
        `x`, constrained where there is a mesh.
    """
    applicable = applicable_spec(spec, shape=np.shape(x))
    return x if applicable is None else jax.lax.with_sharding_constraint(x, applicable)


def applicable_spec(
    spec: Union[PartitionSpec, Sequence[Any], None], *, shape: Sequence[int]
) -> Optional[PartitionSpec]:
    """What of a partition spec applies to an array of this shape here; see `maybe_shard`.

    Args:
        spec: A PartitionSpec, or what makes one.
        shape: The shape of the array.

    Returns:
        The spec, as long as `spec`. None where there is no mesh that is not manual, or no spec.
    """
    mesh = current_mesh()
    if spec is None or mesh is None:
        return None
    auto_axes = set(mesh.axis_names) - set(getattr(mesh, "manual_axes", ()))
    if not auto_axes:
        return None
    return fit_to_mesh(_only_axes(spec, axis_names=auto_axes), shape=shape, mesh=mesh)[0]


class DataPartitionType(enum.Enum):
    """How host arrays become global arrays.

    FULL: the first dimension is split over all axes of the mesh. REPLICATED: every device has everything.
    BATCH: the first dimension is split over the axes "data" and "fsdp", the second over "seq", as far as the
    mesh has them.
    """

    FULL = "full"
    REPLICATED = "replicated"
    BATCH = "batch"


def input_partition_spec() -> PartitionSpec:
    """The spec that splits the first dimension over all axes of the mesh of the current thread."""
    return PartitionSpec(tuple(_require_mesh().axis_names))


def data_partition_type_to_spec(partition: Union[DataPartitionType, PartitionSpec]) -> PartitionSpec:
    """The spec of a `DataPartitionType` on the mesh of the current thread; what is a spec stays as it is."""
    if not isinstance(partition, DataPartitionType):
        return partition
    if partition == DataPartitionType.FULL:
        return input_partition_spec()
    if partition == DataPartitionType.REPLICATED:
        return PartitionSpec()
    return _only_axes((("data", "fsdp"), ("seq",)), axis_names=set(_require_mesh().axis_names))


def _check_divides(path: str, shape: Sequence[int], *, spec: PartitionSpec, mesh: Mesh) -> None:
    for dim, entry in enumerate(spec):
        axes = (entry,) if isinstance(entry, str) else tuple(entry or ())
        num_shards = _num_shards(axes, mesh)
        if shape[dim] % num_shards != 0:
            raise ValueError(
                f"{path or 'array'}: dimension {dim} has size {shape[dim]}, which the {num_shards} shards "
                f"of mesh axes {axes} do not divide. Expected a multiple of {num_shards}; change the batch "
                "size or the mesh shape."
            )


class BatchPart(NamedTuple):
    """One of equal, consecutive parts of the rows of a batch.

    Attributes:
        part_index: Which one, from 0 on.
        num_parts: How many there are.
    """

    part_index: int
    num_parts: int


def batch_part(spec: PartitionSpec, *, process_index: Optional[int] = None) -> BatchPart:
    """Returns the smallest part of a batch that holds all rows on the devices of a process.

    Processes whose devices hold the same rows (replicas, parts of a model) have the same part. Where a process' rows
    do not lie together, its part has more than these: then it reads some rows for nothing, and none is missing.

    Args:
        spec: How the batch lies on the mesh of the current thread.
        process_index: The process. None: this one.

    Returns:
        The part; the whole batch where there is one process, or no device of the process in the mesh.

    Raises:
        RuntimeError: If there is no mesh.
    """
    mesh = _require_mesh()
    if jax.process_count() == 1 or not len(spec) or spec[0] is None:
        return BatchPart(0, 1)
    assert isinstance(mesh, Mesh), "batch_part is for the host, outside of jit."
    process_index = jax.process_index() if process_index is None else process_index
    num_shards = _num_shards((spec[0],) if isinstance(spec[0], str) else tuple(spec[0]), mesh)
    places: Any = NamedSharding(mesh, PartitionSpec(spec[0])).devices_indices_map((num_shards,))
    held = [
        index[0].indices(num_shards)[0]
        for device, index in places.items()
        if device.process_index == process_index
    ]
    if not held:
        return BatchPart(0, 1)
    for num_parts in (n for n in range(num_shards, 1, -1) if num_shards % n == 0):
        size = num_shards // num_parts
        if min(held) // size == max(held) // size:
            return BatchPart(min(held) // size, num_parts)
    return BatchPart(0, 1)


def host_to_global_array(
    host_arrays: Nested[Union[np.ndarray, Tensor]],
    *,
    partition: Union[DataPartitionType, PartitionSpec, Nested[PartitionSpec]] = DataPartitionType.FULL,
) -> Nested[Tensor]:
    """Puts what this process holds of a batch onto the mesh of the current thread.

    Args:
        host_arrays: A tree of arrays; each process passes its own part of the global batch, which is its
            `batch_part` of the array's spec.
        partition: How the global arrays lie on the mesh: one for all, or a tree that is a prefix of
            `host_arrays`. What a spec says beyond the rank of an array is left out.

    Returns:
        The tree of global arrays.

    Raises:
        ValueError: If a dimension does not divide over its mesh axes.
        RuntimeError: If there is no mesh.
    """
    mesh = _require_mesh()
    assert isinstance(mesh, Mesh), "host_to_global_array is for the host, outside of jit."
    is_partition = lambda node: isinstance(node, PartitionSpec | DataPartitionType)  # noqa: E731

    def put(path: Any, host_array: Any, spec: PartitionSpec) -> Tensor:
        host_array = np.asarray(host_array)
        spec = PartitionSpec(*spec[: host_array.ndim])
        sharding = NamedSharding(mesh, spec)
        part = batch_part(spec) if host_array.ndim else BatchPart(0, 1)
        shape = (*(part.num_parts * size for size in host_array.shape[:1]), *host_array.shape[1:])
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        _check_divides(name, shape, spec=spec, mesh=mesh)
        if sharding.is_fully_addressable:
            return jax.make_array_from_process_local_data(sharding, host_array)

        def shard(index: Optional[tuple[slice, ...]]) -> np.ndarray:
            if not index:
                return host_array
            start, stop, _ = index[0].indices(shape[0])
            offset = part.part_index * host_array.shape[0]
            rows: np.ndarray = host_array[(slice(start - offset, stop - offset), *index[1:])]
            return rows

        return jax.make_array_from_callback(shape, sharding, shard)

    specs = jax.tree.map(data_partition_type_to_spec, partition, is_leaf=is_partition)
    specs = jax.tree.broadcast(specs, host_arrays, is_leaf=is_partition)
    return jax.tree_util.tree_map_with_path(put, host_arrays, specs)


def global_to_host_array(global_arrays: Nested[Tensor]) -> Nested[np.ndarray]:
    """Fetches arrays to the host, as a whole.

    Args:
        global_arrays: A tree of arrays. Those that lie on devices of other processes too must be replicated.

    Returns:
        A tree of numpy arrays.

    Raises:
        ValueError: If this process cannot see all of an array.
    """

    def fetch(path: Any, x: Any) -> np.ndarray:
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(
                f"{name or 'array'}: lies on devices of several processes ({x.sharding}). Expected a "
                "replicated array."
            )
        return np.asarray(x)

    return jax.tree_util.tree_map_with_path(fetch, global_arrays)
