"""Device meshes: from a shape with at most one unknown axis to a `jax.sharding.Mesh`."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, Optional, Union

import jax
import numpy as np
from absl import logging
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, Mesh

from axlearn.common import jax_compat

# The size of each mesh axis; at most one may be -1, to be inferred from the number of devices.
MeshShape = Sequence[int]


@dataclasses.dataclass
class HybridMeshShape:
    """A mesh over several granules (TPU slices, or processes) that a slow network connects.

    Attributes:
        ici_mesh_shape: Sizes of the axes within a granule; at most one may be -1.
        dcn_mesh_shape: Sizes of the axes across granules, as many; at most one may be -1. The mesh is their
            product, axis by axis. Where there is one granule only, such as the devices of one CPU, its devices
            are split into as many parts as this asks for, -1 counting as 1.
    """

    ici_mesh_shape: MeshShape
    dcn_mesh_shape: MeshShape

    def __len__(self) -> int:
        assert len(self.ici_mesh_shape) == len(self.dcn_mesh_shape)
        return len(self.ici_mesh_shape)


def _legal_shape(mesh_shape: Sequence[int], num_devices: int) -> tuple[int, ...]:
    """A shape near `mesh_shape` whose product is `num_devices`.

    The first axis that was to be inferred takes what the others leave; else the last one that can changes.
    """
    if -1 in mesh_shape:
        open_axis = list(mesh_shape).index(-1)
        mesh_shape = [max(size, 1) for size in mesh_shape]
        known = math.prod(size for i, size in enumerate(mesh_shape) if i != open_axis)
        if num_devices % known == 0:
            return (*mesh_shape[:open_axis], num_devices // known, *mesh_shape[open_axis + 1 :])
    for axis in reversed(range(len(mesh_shape))):
        others = math.prod(size for i, size in enumerate(mesh_shape) if i != axis)
        if others > 0 and num_devices % others == 0:
            return (*mesh_shape[:axis], num_devices // others, *mesh_shape[axis + 1 :])
    return (num_devices,) + (1,) * (len(mesh_shape) - 1)


def _mesh_shape_error(
    mesh_shape: Sequence[int],
    problem: str,
    *,
    num_devices: int,
    field: str = "mesh_shape",
    unit: str = "devices",
    axis_names: Optional[Sequence[str]] = None,
) -> ValueError:
    expected = f"Expected a shape whose product is {num_devices}"
    if len(mesh_shape):
        expected += f", such as {_legal_shape(tuple(mesh_shape), num_devices)}"
    names = "" if axis_names is None else f"axis names are {tuple(axis_names)}; "
    return ValueError(
        f"{field}={tuple(mesh_shape)}: {problem.format(devices=f'{num_devices} {unit}')}. {expected};\n"
        f"  {names}at most one axis may be -1, to be inferred."
    )


def _infer(
    mesh_shape: MeshShape,
    *,
    num_devices: int,
    field: str = "mesh_shape",
    unit: str = "devices",
    axis_names: Optional[Sequence[str]] = None,
) -> tuple[int, ...]:
    shape = tuple(mesh_shape)

    def error(problem: str) -> ValueError:
        return _mesh_shape_error(
            shape, problem, num_devices=num_devices, field=field, unit=unit, axis_names=axis_names
        )

    illegal = [size for size in shape if not isinstance(size, int | np.integer) or (size < 1 and size != -1)]
    if illegal:
        raise error(f"{illegal[0]!r} is not the size of an axis for {{devices}}")
    if shape.count(-1) > 1:
        raise error(f"{shape.count(-1)} axes are -1, for {{devices}}")
    if -1 in shape:
        known = math.prod(size for size in shape if size != -1)
        if num_devices % known != 0:
            raise error(f"the known axes have product {known}, which does not divide {{devices}}")
        return tuple(num_devices // known if size == -1 else int(size) for size in shape)
    if math.prod(shape) != num_devices:
        raise error(f"product {math.prod(shape)} does not match {{devices}}")
    return tuple(int(size) for size in shape)


def infer_mesh_shape(mesh_shape: MeshShape, *, num_devices: Optional[int] = None) -> MeshShape:
    """Replaces the one axis that is -1, if any, by what is left of the devices.

    Args:
        mesh_shape: The shape.
        num_devices: How many devices the mesh has. None: all devices of all processes.

    Returns:
        A shape without -1 whose product is `num_devices`; `mesh_shape` itself where it has no -1.

    Raises:
        ValueError: If more than one axis is -1, or the others do not divide the number of devices.
    """
    if -1 not in tuple(mesh_shape):
        return mesh_shape
    return _infer(mesh_shape, num_devices=jax.device_count() if num_devices is None else num_devices)


def _granule_attribute(devices: Sequence[Any]) -> str:
    """What tells fast neighbours apart: the slice on TPU, the process elsewhere."""
    return "slice_index" if devices[0].platform == "tpu" else "process_index"


def _num_granules(devices: Sequence[Any]) -> int:
    attribute = _granule_attribute(devices)
    # TPUs that do not say which slice they are in are in the same one.
    return len({getattr(device, attribute, 0) for device in devices})


# Whole slices of these are tori of 16 x 16 chips, the last two dimensions of whose meshes jax (0.10.2) may order worse
# than the chips are numbered: 1.5 to 1.9 hops to the next along an axis of 32, 64 or 128, where a ring of one hop each
# exists (`tests/common/utils/device_order_test.py`).
_SQUARE_KINDS = ("TPU v5 lite", "TPU v6 lite")
_SQUARE_SIDE = 16


def _square_mesh(shape: tuple[int, ...], devices: Sequence[Any]) -> Optional[np.ndarray]:
    """A mesh whose inner axis goes around blocks of whole rows of a square torus; None where that is not its form.

    Every step along the inner axis is one hop, from the last device to the first too.
    """
    lengths = [size for size in shape if size > 1]
    is_square = len(devices) == _SQUARE_SIDE**2 and getattr(devices[0], "device_kind", "") in _SQUARE_KINDS
    if not is_square or len(lengths) != 2 or lengths[1] % (2 * _SQUARE_SIDE) != 0:
        return None
    at = {tuple(device.coords[:2]): device for device in devices}
    if set(at) != {(x, y) for x in range(_SQUARE_SIDE) for y in range(_SQUARE_SIDE)}:
        return None
    num_rows = lengths[1] // _SQUARE_SIDE
    blocks = [[at[x, y + first] for x, y in _ring(num_rows)] for first in range(0, _SQUARE_SIDE, num_rows)]
    mesh = np.empty((len(blocks), lengths[1]), dtype=object)
    mesh[:] = blocks
    return mesh.reshape(shape)


def _ring(num_rows: int) -> list[tuple[int, int]]:
    """The places (x, y) of an even number of rows, each a hop from the one before, the last from the first."""
    inner = list(range(1, _SQUARE_SIDE))
    there = [(x, y) for y in range(num_rows) for x in (inner if y % 2 == 0 else inner[::-1])]
    return [*there, *((0, y) for y in reversed(range(num_rows)))]


def _single_granule_mesh(shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    square = _square_mesh(shape, devices)
    if square is not None:
        return square
    try:
        return mesh_utils.create_device_mesh(shape, devices=devices, allow_split_physical_axes=True)
    except NotImplementedError as e:
        # The physical topology has no assignment for this shape; any order of the devices is still correct.
        logging.warning("No topology-aware mesh of shape %s (%s); using the order of the devices.", shape, e)
        return np.asarray(devices).reshape(shape)


def _split_over_granules(
    shape: tuple[int, ...], *, num_granules: int, axis_names: Optional[Sequence[str]]
) -> HybridMeshShape:
    """Puts the granules on the first axis that is longer than one, where traffic is least."""
    axis = next((i for i, size in enumerate(shape) if size > 1), 0)
    if shape[axis] % num_granules != 0:
        which = f"axis {axis}" if axis_names is None else f"axis {axis_names[axis]!r}"
        raise ValueError(
            f"mesh_shape={shape}: {which}, the first that is longer than 1, has size {shape[axis]}, which "
            f"{num_granules} slices or processes do not divide. Expected a multiple of {num_granules} "
            "there, or a HybridMeshShape that says how the mesh extends over them."
        )
    return HybridMeshShape(
        ici_mesh_shape=(*shape[:axis], shape[axis] // num_granules, *shape[axis + 1 :]),
        dcn_mesh_shape=tuple(num_granules if i == axis else 1 for i in range(len(shape))),
    )


def _dcn_shape_of_one_granule(mesh_shape: HybridMeshShape) -> tuple[int, ...]:
    """The sizes across granules that are asked for; where it is left open, one."""
    return tuple(1 if size == -1 else size for size in mesh_shape.dcn_mesh_shape)


def _fits_one_granule(mesh_shape: HybridMeshShape, *, num_devices: int) -> bool:
    """Whether a single granule has the devices for the axes across granules, too."""
    num_parts = math.prod(_dcn_shape_of_one_granule(mesh_shape))
    return num_parts > 0 and num_devices % num_parts == 0


def _within_one_granule(
    mesh_shape: HybridMeshShape, *, num_devices: int, axis_names: Optional[Sequence[str]]
) -> tuple[int, ...]:
    """The mesh of the same axes where there is one granule only: what was to cross the slow network does not."""
    dcn_shape = _dcn_shape_of_one_granule(mesh_shape)
    num_parts = math.prod(dcn_shape)
    ici_shape = _infer(
        mesh_shape.ici_mesh_shape,
        num_devices=num_devices // num_parts,
        field="mesh_shape.ici_mesh_shape",
        unit="devices of a slice or process" if num_parts == 1 else f"devices of each of {num_parts} parts",
        axis_names=axis_names,
    )
    if num_parts > 1:
        logging.warning(
            "mesh_shape.dcn_mesh_shape=%s is for %d slices or processes, but there is one; its devices are split "
            "into %d parts instead.",
            tuple(mesh_shape.dcn_mesh_shape),
            num_parts,
            num_parts,
        )
    return tuple(x * y for x, y in zip(ici_shape, dcn_shape, strict=True))


def _create_device_mesh(
    mesh_shape: Union[MeshShape, HybridMeshShape],
    *,
    devices: Optional[Sequence[Any]],
    axis_names: Optional[Sequence[str]],
) -> np.ndarray:
    devices = jax.devices() if devices is None else list(np.asarray(devices).flatten())
    attribute = _granule_attribute(devices)
    num_granules = _num_granules(devices)
    if isinstance(mesh_shape, HybridMeshShape):
        if num_granules == 1 and _fits_one_granule(mesh_shape, num_devices=len(devices)):
            shape = _within_one_granule(mesh_shape, num_devices=len(devices), axis_names=axis_names)
            return _single_granule_mesh(shape, devices)
        hybrid = HybridMeshShape(
            ici_mesh_shape=_infer(
                mesh_shape.ici_mesh_shape,
                num_devices=len(devices) // num_granules,
                field="mesh_shape.ici_mesh_shape",
                unit="devices of a slice or process",
                axis_names=axis_names,
            ),
            dcn_mesh_shape=_infer(
                mesh_shape.dcn_mesh_shape,
                num_devices=num_granules,
                field="mesh_shape.dcn_mesh_shape",
                unit="slices or processes",
                axis_names=axis_names,
            ),
        )
    else:
        shape = _infer(mesh_shape, num_devices=len(devices), axis_names=axis_names)
        if num_granules == 1:
            return _single_granule_mesh(shape, devices)
        first = next((size for size in shape if size > 1), 1)
        if devices[0].platform == "gpu" and first % num_granules != 0:
            logging.warning(
                "mesh_shape=%s does not follow the %d processes; using a flat mesh.", shape, num_granules
            )
            return np.asarray(devices).reshape(shape)
        hybrid = _split_over_granules(shape, num_granules=num_granules, axis_names=axis_names)
    return mesh_utils.create_hybrid_device_mesh(
        tuple(hybrid.ici_mesh_shape),
        dcn_mesh_shape=tuple(hybrid.dcn_mesh_shape),
        devices=devices,
        process_is_granule=attribute == "process_index",
        allow_split_physical_axes=True,
    )


def create_device_mesh(
    mesh_shape: Union[MeshShape, HybridMeshShape], *, devices: Optional[Sequence[Any]] = None
) -> np.ndarray:
    """Arranges devices so that the axes of the mesh follow the network.

    Args:
        mesh_shape: The size of each axis; at most one may be -1. Over several slices (TPU) or processes, a
            plain shape splits its first axis that is longer than 1 over them.
        devices: The devices; None: all devices of all processes.

    Returns:
        The devices in an array of the (inferred) shape.

    Raises:
        ValueError: If the product does not match the number of devices, or the shape does not divide over the
            slices.
    """
    return _create_device_mesh(mesh_shape, devices=devices, axis_names=None)


def build_mesh(
    *,
    mesh_shape: Union[MeshShape, HybridMeshShape],
    mesh_axis_names: Sequence[str],
    devices: Optional[Sequence[Any]] = None,
) -> Mesh:
    """Builds a mesh; every axis has type Auto, so the compiler propagates shardings along it.

    Args:
        mesh_shape: As in `create_device_mesh`.
        mesh_axis_names: The name of each axis.
        devices: As in `create_device_mesh`.

    Returns:
        The mesh.

    Raises:
        ValueError: If names and shape do not fit each other, or the shape does not fit the devices.
    """
    names = tuple(mesh_axis_names)
    if len(set(names)) != len(names):
        raise ValueError(f"mesh_axis_names={names}: a name occurs twice. Expected distinct names.")
    if len(mesh_shape) != len(names):
        raise ValueError(
            f"mesh_shape={mesh_shape} has {len(mesh_shape)} axes, but mesh_axis_names={names} has "
            f"{len(names)}. Expected one size per name."
        )
    return jax_compat.auto_mesh(
        _create_device_mesh(mesh_shape, devices=devices, axis_names=names), axis_names=names
    )


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[Mesh]:
    """Makes `mesh` the mesh of the current thread inside a `with` block; not to be entered while jit traces."""
    with jax_compat.set_mesh(mesh):
        yield mesh


def current_mesh() -> Union[Mesh, AbstractMesh, None]:
    """The mesh that `use_mesh` set in this thread, or None; while jit traces, its form without devices."""
    return jax_compat.get_mesh()
