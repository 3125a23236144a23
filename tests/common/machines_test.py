"""Names of machines mean what the clouds' pages say."""

import re

import pytest

from axlearn.common.flops import peak_flops
from axlearn.common.machines import machine_of


@pytest.mark.parametrize(
    ("name", "num_devices", "num_slices", "topology"),
    [
        # A v4 or v5p is called by its tensor cores, of which jax sees two as one device.
        ("tpu-v4-8", 4, 1, "v4:2x2x1"),
        ("tpu-v4-1024", 512, 1, "v4:8x8x8"),
        ("tpu-v5p-16", 8, 1, "v5p:2x2x2"),
        ("tpu-v5p-512", 256, 1, "v5p:4x8x8"),
        ("tpu-v5p-1024", 512, 1, "v5p:8x8x8"),
        ("tpu-v5p-2048", 1024, 1, "v5p:8x8x16"),
        ("tpu-v5p-384", 192, 1, "v5p:4x4x12"),
        ("tpu-v5p-12288", 6144, 1, "v5p:16x16x24"),
        # A v5e or v6e by its chips.
        ("tpu-v5litepod-8", 8, 1, "v5e:2x4"),
        ("tpu-v5litepod-256", 256, 1, "v5e:16x16"),
        ("tpu-v5litepod-256-4", 1024, 4, "v5e:16x16"),
        ("tpu-v5e-256-4", 1024, 4, "v5e:16x16"),
        ("tpu-v6e-256-8", 2048, 8, "v6e:16x16"),
        # A chip of a v3 or 7x is two devices.
        ("tpu-v3-32", 32, 1, "v3:4x4"),
        ("tpu-7x-128", 128, 1, "tpu7x:4x4x4"),
        ("gpu-p5.48xlarge-256", 256, 1, None),
        ("gpu-a3-highgpu-8g-512", 512, 1, None),
        ("neuron-trn2.48xlarge-64", 64, 1, None),
    ],
)
def test_a_name_says_how_many_devices_there_are(name, num_devices, num_slices, topology):
    machine = machine_of(name)
    assert (machine.num_devices, machine.num_slices, machine.topology) == (num_devices, num_slices, topology)


def test_memory_is_that_of_a_device_and_not_of_a_chip():
    gib = 2**30
    assert 94 * gib < machine_of("tpu-7x-128").memory_bytes < 96 * gib
    assert 15 * gib < machine_of("tpu-v3-8").memory_bytes < 16 * gib


def test_memory_is_what_libtpu_leaves_to_programs():
    """By its own messages: "Used 16.54G of 15.75G hbm"."""
    gib = 2**30
    assert machine_of("tpu-v5litepod-256").memory_bytes == 15.75 * gib
    assert machine_of("tpu-v5p-512").memory_bytes == int(95.74 * gib)
    assert machine_of("tpu-v4-8").memory_bytes == 30.75 * gib
    assert machine_of("tpu-v6e-8").memory_bytes == 31.25 * gib


@pytest.mark.parametrize("name", ["tpu-v5p-512", "tpu-v6e-256", "tpu-7x-128", "gpu-a4-highgpu-8g-256"])
def test_the_rate_of_each_kind_of_device_is_known(name):
    assert peak_flops(machine_of(name).device_kind) is not None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5p-512", "'v5p-512' is no kind of machine"),
        ("tpu-v5x-512", "Did you mean 'v5p'"),
        ("tpu-v5p-511", "there is no slice of 255.5 chips"),
        ("tpu-v5litepod-48", "there is no slice of 48 chips"),
        ("tpu-v5p-0", "has no devices"),
        ("tpu-v5p-512-0", "has no devices"),
        ("gpu-p6.48xlarge-8", "Did you mean 'p5.48xlarge'"),
    ],
)
def test_a_wrong_name_is_refused_with_the_reason(name, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        machine_of(name)
