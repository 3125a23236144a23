"""Devices that are not there: enough of them for jax to lay arrays out over, on which nothing can run."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Union

import numpy as np

from axlearn.common.machines import Machine
from axlearn.common.utils import HybridMeshShape, MeshShape

# What a device says it is where no machine is named.
_ANY_KIND = "device"


@dataclasses.dataclass(frozen=True)
class AbsentDevice:
    """What meshes and shardings ask of a `jax.Device`.

    Attributes:
        id: Its number.
        process_index: That of the slice it is in, so that meshes over several slices are split as they would be.
        platform: In capitals, as jax has no such platform: "TPU" would make jax ask for its place in the torus, which
            decides over the order of devices and not over shapes.
        device_kind: As of a `jax.Device`.
    """

    id: int
    process_index: int
    platform: str
    device_kind: str


def devices_of(machine: Machine) -> np.ndarray:
    """Returns the devices of a machine, in one dimension; those of a slice next to each other."""
    return np.array(
        [
            AbsentDevice(
                id=i,
                process_index=i // machine.devices_per_slice,
                platform=machine.accelerator.upper(),
                device_kind=machine.device_kind,
            )
            for i in range(machine.num_devices)
        ]
    )


def least_devices_for(mesh_shape: Union[MeshShape, HybridMeshShape]) -> np.ndarray:
    """Returns as many devices as a mesh takes at the least: axes to be inferred count as 1.

    Args:
        mesh_shape: The shape.
    """
    if isinstance(mesh_shape, HybridMeshShape):
        num_slices, per_slice = _least(mesh_shape.dcn_mesh_shape), _least(mesh_shape.ici_mesh_shape)
    else:
        num_slices, per_slice = 1, _least(mesh_shape)
    return np.array(
        [
            AbsentDevice(id=i, process_index=i // per_slice, platform="ANY", device_kind=_ANY_KIND)
            for i in range(num_slices * per_slice)
        ]
    )


def _least(mesh_shape: Sequence[int]) -> int:
    # A size that is none is for the mesh to refuse.
    return math.prod(size for size in mesh_shape if isinstance(size, int) and size > 0)
