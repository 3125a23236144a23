"""Meshes on the networks of TPUs: hops between neighbours along each axis, and which axes leave a slice."""

import itertools
import types

import numpy as np
import pytest

from axlearn.common.aot_compilation import topology_devices
from axlearn.common.machines import Machine
from axlearn.common.utils import HybridMeshShape, create_device_mesh


def _devices(topology: str, *, num_slices: int = 1) -> list:
    pytest.importorskip("libtpu")
    machine = Machine(
        "", "tpu", "", num_slices=num_slices, devices_per_slice=0, memory_bytes=0, topology=topology
    )
    return list(topology_devices(machine))


def _hops(mesh: np.ndarray, *, axis: int, torus: tuple[int, ...]) -> np.ndarray:
    """The hops from each device to the next along an axis, around the torus where that is shorter. [rows, axis]"""
    rows = np.moveaxis(mesh, axis, -1).reshape(-1, mesh.shape[axis])
    places = np.array([[device.coords[: len(torus)] for device in row] for row in rows])
    apart = np.abs(places - np.roll(places, -1, axis=1))
    return np.minimum(apart, np.array(torus) - apart).sum(axis=-1)


# The topology, the mesh, and for each axis the hops: the most of one step, and the mean.
_CASES = [
    ("v5p:4x4x4", (4, 4, 4), [(1, 1), (1, 1), (1, 1)]),
    ("v5p:4x4x4", (4, 16), [(1, 1), (2, 1.25)]),
    ("v5p:4x4x4", (16, 4), [(2, 1.25), (1, 1)]),
    ("v5p:4x4x4", (1, 64), [(0, 0), (3, 1.32)]),
    ("v5p:4x8x8", (4, 64), [(1, 1), (2, 1.13)]),
    ("v4:8x8x8", (32, 16), [(3, 1.25), (2, 1.5)]),
    ("v5e:16x16", (16, 16), [(1, 1), (1, 1)]),
    ("v5e:16x16", (1, 256), [(0, 0), (2, 1.07)]),
    ("v6e:16x16", (16, 16), [(1, 1), (1, 1)]),
    ("v6e:16x16", (1, 256), [(0, 0), (2, 1.07)]),
    # The rings of our own.
    ("v5e:16x16", (8, 32), [(2, 2), (1, 1)]),
    ("v5e:16x16", (4, 64), [(4, 4), (1, 1)]),
    ("v6e:16x16", (2, 128), [(8, 8), (1, 1)]),
    ("v6e:16x16", (1, 8, 1, 32), [(0, 0), (2, 2), (0, 0), (1, 1)]),
]


@pytest.mark.tpu_aot
@pytest.mark.parametrize(("topology", "shape", "expected"), _CASES)
def test_neighbours_along_an_axis_are_neighbours_in_the_network(topology, shape, expected):
    torus = tuple(int(side) for side in topology.split(":")[1].split("x"))
    mesh = create_device_mesh(shape, devices=_devices(topology))
    assert mesh.shape == shape
    assert len({device.id for device in mesh.flat}) == mesh.size
    for axis, (most, mean) in enumerate(expected):
        hops = _hops(mesh, axis=axis, torus=torus)
        assert hops.max() <= most
        assert hops.mean() <= mean


@pytest.mark.tpu_aot
@pytest.mark.parametrize(
    ("shape", "slices_along"),
    [
        ((2, 256), [2, 1]),
        ((-1, 256), [2, 1]),
        ((1, 4, 128), [1, 2, 1]),
        (HybridMeshShape((1, 256), (2, 1)), [2, 1]),
        (HybridMeshShape((16, 16), (1, 2)), [1, 2]),
    ],
)
def test_only_the_axes_across_leave_a_slice(shape, slices_along):
    mesh = create_device_mesh(shape, devices=_devices("v5e:16x16", num_slices=2))
    for axis, num_slices in enumerate(slices_along):
        rows = np.moveaxis(mesh, axis, -1).reshape(-1, mesh.shape[axis])
        assert {len({device.slice_index for device in row}) for row in rows} == {num_slices}


def _square(kind: str = "TPU v5 lite") -> list:
    """What a slice of 16 x 16 chips looks like to the code that orders it, without libtpu."""
    return [
        types.SimpleNamespace(
            id=16 * y + x, platform="tpu", device_kind=kind, coords=(x, y, 0), slice_index=0
        )
        for y, x in itertools.product(range(16), range(16))
    ]


@pytest.mark.parametrize("shape", [(8, 32), (4, 64), (2, 128), (1, 4, 1, 64)])
def test_the_inner_axis_of_a_square_slice_is_a_ring_of_single_hops(shape):
    mesh = create_device_mesh(shape, devices=_square())
    assert mesh.shape == shape
    assert sorted(device.id for device in mesh.flat) == list(range(256))
    assert (_hops(mesh, axis=len(shape) - 1, torus=(16, 16)) == 1).all()
