"""Where arrays live: specs, sharding constraints, and the way of a batch from the host to the mesh."""

import dataclasses
import enum
import math
from collections.abc import Sequence
from typing import Any, Optional, Union

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from axlearn.common.utils._mesh import current_mesh
from axlearn.common.utils._trees import Nested, Tensor

NestedPartitionSpec = Optional[Nested[PartitionSpec]]


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """An array that need not exist yet.

    Attributes:
        shape: Its shape.
        dtype: Its type; None: not decided.
        mesh_axes: How its dimensions lie on the mesh; None: replicated.
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
        spec = PartitionSpec() if self.mesh_axes is None else PartitionSpec(*self.mesh_axes)
        return NamedSharding(_require_mesh(), spec, memory_kind=self.memory_kind)


def _require_mesh() -> Union[Mesh, AbstractMesh]:
    mesh = current_mesh()
    if mesh is None:
        raise RuntimeError("There is no mesh here. Expected to be called inside `with use_mesh(mesh):`.")
    return mesh


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


def _only_axes(spec: Sequence[Any], *, axis_names: set[str]) -> PartitionSpec:
    """The spec without the axes that are not in `axis_names`."""

    def keep(entry: Any) -> Any:
        if isinstance(entry, str):
            return entry if entry in axis_names else None
        if isinstance(entry, tuple | list):
            return tuple(name for name in entry if name in axis_names) or None
        return entry

    return PartitionSpec(*(keep(entry) for entry in spec))


def maybe_shard(x: Tensor, spec: Optional[Sequence[Any]]) -> Tensor:
    """Tells the compiler how an array lies on the mesh, as far as there is one.

    Args:
        x: An array.
        spec: A PartitionSpec, or what makes one. Axes that the mesh does not have, or that are manual inside
            of `shard_map`, are left out. None: `x` returns as it is.

    Returns:
        `x`, constrained where there is a mesh.
    """
    mesh = current_mesh()
    if spec is None or mesh is None:
        return x
    manual = set(getattr(mesh, "manual_axes", ()))
    auto_axes = set(mesh.axis_names) - manual
    if not auto_axes:
        return x
    return jax.lax.with_sharding_constraint(x, _only_axes(spec, axis_names=auto_axes))


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
        num_shards = math.prod(mesh.shape[axis] for axis in axes)
        if shape[dim] % num_shards != 0:
            raise ValueError(
                f"{path or 'array'}: dimension {dim} has size {shape[dim]}, which the {num_shards} shards "
                f"of mesh axes {axes} do not divide. Expected a multiple of {num_shards}; change the batch "
                "size or the mesh shape."
            )


def host_to_global_array(
    host_arrays: Nested[Union[np.ndarray, Tensor]],
    *,
    partition: Union[DataPartitionType, PartitionSpec, Nested[PartitionSpec]] = DataPartitionType.FULL,
) -> Nested[Tensor]:
    """Puts what this process holds of a batch onto the mesh of the current thread.

    Args:
        host_arrays: A tree of arrays; each process passes its own part of the global batch, of equal size.
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
        if sharding.is_fully_addressable:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            _check_divides(name, host_array.shape, spec=spec, mesh=mesh)
        return jax.make_array_from_process_local_data(sharding, host_array)

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
