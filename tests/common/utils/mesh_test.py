"""Mesh shapes, their inference and their errors."""

import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType

from axlearn.common.utils import (
    HybridMeshShape,
    build_mesh,
    create_device_mesh,
    current_mesh,
    infer_mesh_shape,
    use_mesh,
)


class FakeDevice:
    """As much of a device as the choice of a mesh looks at."""

    def __init__(self, index, *, process_index=0, platform="cpu"):
        self.id = index
        self.process_index = process_index
        self.platform = platform
        self.device_kind = platform

    def __repr__(self):
        return f"FakeDevice({self.id}, process {self.process_index})"


def fake_devices(num_devices, *, num_processes=1, platform="cpu"):
    per_process = num_devices // num_processes
    return [FakeDevice(i, process_index=i // per_process, platform=platform) for i in range(num_devices)]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.data())
def test_one_unknown_axis_is_inferred(shape, data):
    axis = data.draw(st.integers(0, len(shape) - 1))
    unknown = [*shape[:axis], -1, *shape[axis + 1 :]]
    assert infer_mesh_shape(unknown, num_devices=math.prod(shape)) == tuple(shape)


def test_a_shape_without_unknown_axis_is_returned_as_it_is():
    shape = (2, 4)
    assert infer_mesh_shape(shape, num_devices=5) is shape
    assert infer_mesh_shape((-1, 2)) == (jax.device_count() // 2, 2)


def test_a_shape_that_does_not_match_says_what_would():
    with pytest.raises(ValueError) as error:
        build_mesh(mesh_shape=(4, 3), mesh_axis_names=("data", "model"), devices=fake_devices(16))
    assert str(error.value) == (
        "mesh_shape=(4, 3): product 12 does not match 16 devices. Expected a shape whose product is 16, "
        "such as (4, 4);\n"
        "  axis names are ('data', 'model'); at most one axis may be -1, to be inferred."
    )


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((-1, -1), r"2 axes are -1, for 8 devices. .* such as \(8, 1\)"),
        ((-1, 2, -1), r"2 axes are -1, for 8 devices. .* such as \(4, 2, 1\)"),
        ((-1, 3), r"the known axes have product 3, which does not divide 8 devices"),
        ((0, 8), r"0 is not the size of an axis for 8 devices"),
        ((8, -2), r"-2 is not the size of an axis"),
    ],
)
def test_illegal_shapes_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        create_device_mesh(shape, devices=fake_devices(8))


def test_names_must_fit_the_shape():
    with pytest.raises(ValueError, match=r"has 2 axes, but mesh_axis_names=\('data',\) has 1"):
        build_mesh(mesh_shape=(8, 1), mesh_axis_names=("data",))
    with pytest.raises(ValueError, match="a name occurs twice"):
        build_mesh(mesh_shape=(8, 1), mesh_axis_names=("data", "data"))


def test_a_mesh_has_auto_axes_and_is_current_inside_use_mesh():
    mesh = build_mesh(mesh_shape=(-1, 2), mesh_axis_names=("data", "model"))
    assert dict(mesh.shape) == {"data": 4, "model": 2}
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert current_mesh() is None
    with use_mesh(mesh):
        assert current_mesh() == mesh
        seen = []
        jax.jit(lambda x: seen.append(current_mesh()) or x)(1.0)
        assert seen[0].axis_names == ("data", "model")
    assert current_mesh() is None


def test_the_first_long_axis_is_split_over_processes():
    mesh = create_device_mesh((1, 4, 2), devices=fake_devices(8, num_processes=2))
    processes = np.vectorize(lambda device: device.process_index)(mesh)
    assert processes.shape == (1, 4, 2)
    assert processes[0].tolist() == [[0, 0], [0, 0], [1, 1], [1, 1]]
    with pytest.raises(ValueError, match=r"axis 0, .* has size 3, which 2 slices or processes do not divide"):
        create_device_mesh((3, 2), devices=fake_devices(6, num_processes=2))


def test_on_gpu_a_first_axis_that_does_not_divide_gives_a_flat_mesh():
    mesh = create_device_mesh((3, 2), devices=fake_devices(6, num_processes=2, platform="gpu"))
    assert [device.id for device in mesh.flatten()] == list(range(6))


def test_a_hybrid_shape_infers_within_and_across_processes():
    shape = HybridMeshShape(ici_mesh_shape=(-1, 2), dcn_mesh_shape=(-1, 1))
    assert len(shape) == 2
    mesh = create_device_mesh(shape, devices=fake_devices(8, num_processes=2))
    assert mesh.shape == (4, 2)
    processes = np.vectorize(lambda device: device.process_index)(mesh)
    assert processes.tolist() == [[0, 0], [0, 0], [1, 1], [1, 1]]
    with pytest.raises(
        ValueError, match=r"mesh_shape.dcn_mesh_shape=\(3, 1\): product 3 does not match 2 slices"
    ):
        create_device_mesh(HybridMeshShape((2, 2), (3, 1)), devices=fake_devices(8, num_processes=2))
    assert create_device_mesh(HybridMeshShape((4, 2), (1, 1))).shape == (4, 2)


def test_a_hybrid_shape_lies_within_the_only_process_where_there_is_one(caplog):
    shape = HybridMeshShape(ici_mesh_shape=(1, -1, 2), dcn_mesh_shape=(2, -1, 1))
    mesh = create_device_mesh(shape, devices=fake_devices(8))
    assert [[[device.id for device in row] for row in part] for part in mesh] == [
        [[0, 1], [2, 3]],
        [[4, 5], [6, 7]],
    ]
    (record,) = caplog.records
    assert "is for 2 slices or processes, but there is one" in record.getMessage()
    with pytest.raises(ValueError, match=r"product 3 does not match 1 slices or processes"):
        create_device_mesh(HybridMeshShape((4, 2), (3, 1)), devices=fake_devices(8))
    with pytest.raises(ValueError, match=r"product 8 does not match 4 devices of each of 2 parts"):
        create_device_mesh(HybridMeshShape((4, 2), (2, 1)), devices=fake_devices(8))
