"""Kinds of machines by the names that `--mesh_selector` gives them: how many devices, of which kind, how much memory.

A name is `tpu-VERSION-SIZE[-SLICES]`, `gpu-TYPE-COUNT` or `neuron-TYPE-COUNT`. SIZE counts what the cloud does: tensor
cores of v3, v4, v5p and 7x, chips of v5litepod (v5e) and v6e. COUNT counts GPUs, and NeuronCores as jax sees them.
"""

import difflib
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple, Optional, TypeVar

from axlearn.common.config import error_message

_GIB = 2**30
# Chips of the block, 4 x 4 x 4, that larger slices of a three-dimensional torus are built of.
_CUBE = 64
_Entry = TypeVar("_Entry")


class Machine(NamedTuple):
    """All machines of a job.

    Attributes:
        name: The name, such as "tpu-v5litepod-256-4".
        accelerator: "tpu", "gpu" or "neuron".
        device_kind: What jax calls a device, or for what jax does not know offline, the vendor's name.
        num_slices: Parts that only a data centre's network connects; 1 for GPUs, whose hosts it connects all.
        devices_per_slice: Devices, as jax counts them, of one part.
        memory_bytes: Memory of one device that programs have; less than the vendor names where the system takes some.
        topology: The shape of a slice for ahead-of-time compilation, such as "v5e:16x16". None: not a TPU.
    """

    name: str
    accelerator: str
    device_kind: str
    num_slices: int
    devices_per_slice: int
    memory_bytes: int
    topology: Optional[str] = None

    @property
    def num_devices(self) -> int:
        """Devices of all slices."""
        return self.num_slices * self.devices_per_slice


class _Tpu(NamedTuple):
    """A generation of TPUs.

    Attributes:
        device_kind: As in `jax.Device.device_kind`.
        size_per_chip: What a name counts for each chip.
        devices_per_chip: What jax counts for each chip.
        gib_per_device: The GiB that programs have on each device.
        torus_dims: Dimensions of the network between the chips of a slice.
        topology: How ahead-of-time compilation calls it.
    """

    device_kind: str
    size_per_chip: int
    devices_per_chip: int
    gib_per_device: float
    torus_dims: int
    topology: str


# https://docs.cloud.google.com/tpu/docs/ v3, v4, v5e, v5p, v6e, tpu7x (2025), sections "System architecture" and
# "Configurations"; the devices per chip and the kinds are jax's, by ahead-of-time topologies (2026-11).
# What programs have of the 32, 32, 16, 95, 32 and 192 GB of a chip is what libtpu says where they do not fit ("Used
# 16.1G of 15.75G hbm"), by our own plans or in public issues; of 7x nobody told, and v5e's share is assumed.
_TPUS: Mapping[str, _Tpu] = {
    "v3": _Tpu("TPU v3", 2, 2, 15.48, 2, "v3"),
    "v4": _Tpu("TPU v4", 2, 1, 30.75, 3, "v4"),
    "v5litepod": _Tpu("TPU v5 lite", 1, 1, 15.75, 2, "v5e"),
    "v5p": _Tpu("TPU v5", 2, 1, 95.74, 3, "v5p"),
    "v6e": _Tpu("TPU v6 lite", 1, 1, 31.25, 2, "v6e"),
    "7x": _Tpu("TPU7x", 2, 2, 94.5, 3, "tpu7x"),
}
_TPU_ALIASES = {"v5e": "v5litepod", "v5lite": "v5litepod"}

# The kind of each GPU or NeuronCore and its memory in GiB, by the type of the machine: the clouds' pages on machine
# types (2025). A Trainium2 chip of 96 GiB is four NeuronCores to jax (logical cores of two).
_DEVICES: Mapping[str, tuple[str, int]] = {
    "a3-highgpu-8g": ("NVIDIA H100 80GB HBM3", 80),
    "a3-megagpu-8g": ("NVIDIA H100 80GB HBM3", 80),
    "a3-ultragpu-8g": ("NVIDIA H200", 141),
    "a4-highgpu-8g": ("NVIDIA B200", 180),
    "p4de.24xlarge": ("NVIDIA A100-SXM4-80GB", 80),
    "p5.48xlarge": ("NVIDIA H100 80GB HBM3", 80),
    "trn2.48xlarge": ("AWS Trainium2", 24),
    "trn2n.48xlarge": ("AWS Trainium2", 24),
}
_TPU_NAME = re.compile(r"tpu-([a-z0-9]+)-(\d+)(?:-(\d+))?")
_OTHER_NAME = re.compile(r"(gpu|neuron)-(.+)-(\d+)")
# The chips and slices of names that are offered; any other is understood just as well. A slice of a two-dimensional
# torus has at most 256 chips, one of a three-dimensional torus several thousand.
_OFFERED_CHIPS = {2: 256, 3: 4096}
_OFFERED_SLICES = (1, 2, 4, 8, 16)
_OFFERED_COUNTS = tuple(2**i for i in range(3, 13))


def machine_of(name: str) -> Machine:
    """Returns what a name stands for.

    Args:
        name: As for `--mesh_selector`, such as "tpu-v5p-512" or "gpu-p5.48xlarge-256".

    Raises:
        ValueError: If the name is of no known form, or of no known type.
    """
    match = _TPU_NAME.fullmatch(name)
    if match:
        return _tpu(name, version=match[1], size=int(match[2]), num_slices=int(match[3] or 1))
    match = _OTHER_NAME.fullmatch(name)
    if match is None:
        raise ValueError(
            error_message(
                where="mesh_selector",
                what=f"{name!r} is no kind of machine",
                expected="tpu-VERSION-SIZE[-SLICES], gpu-TYPE-COUNT or neuron-TYPE-COUNT, such as tpu-v5p-512",
            )
        )
    kind, gib = _looked_up(match[2], _DEVICES, name=name)
    return Machine(
        name=name,
        accelerator=match[1],
        device_kind=kind,
        num_slices=1,
        devices_per_slice=_positive(int(match[3]), name=name),
        memory_bytes=gib * _GIB,
    )


def usual_names() -> Iterator[str]:
    """Yields names of machines as they are usually had, smaller ones of a kind first."""
    for version, tpu in _TPUS.items():
        num_chips = 4
        while num_chips <= _OFFERED_CHIPS[tpu.torus_dims]:
            for num_slices in _OFFERED_SLICES:
                slices = f"-{num_slices}" if num_slices > 1 else ""
                yield f"tpu-{version}-{num_chips * tpu.size_per_chip}{slices}"
            num_chips *= 2
    for kind in _DEVICES:
        accelerator = "neuron" if kind.startswith("trn") else "gpu"
        yield from (f"{accelerator}-{kind}-{count}" for count in _OFFERED_COUNTS)


def _tpu(name: str, *, version: str, size: int, num_slices: int) -> Machine:
    tpu = _looked_up(_TPU_ALIASES.get(version, version), _TPUS, name=name)
    num_chips = _positive(size, name=name) // tpu.size_per_chip
    shape = None if size % tpu.size_per_chip else _torus(num_chips, tpu.torus_dims)
    if shape is None:
        raise ValueError(
            error_message(
                where="mesh_selector",
                what=f"{name!r}: there is no slice of {size / tpu.size_per_chip:g} chips",
                expected=f"{tpu.size_per_chip} times a power of two"
                + (f" or times a multiple of {_CUBE}" if tpu.torus_dims == 3 else ""),
            )
        )
    return Machine(
        name=name,
        accelerator="tpu",
        device_kind=tpu.device_kind,
        num_slices=_positive(num_slices, name=name),
        devices_per_slice=num_chips * tpu.devices_per_chip,
        memory_bytes=int(tpu.gib_per_device * _GIB),
        topology=f"{tpu.topology}:{'x'.join(map(str, shape))}",
    )


def _torus(num_chips: int, num_dims: int) -> Optional[list[int]]:
    """The usual shape of a slice: as near to a square or a cube as can be, the smallest first; None: there is none."""
    if num_dims == 3 and num_chips % _CUBE == 0:
        return [4 * side for side in _most_equal_sides(num_chips // _CUBE)]
    if num_chips & (num_chips - 1):
        return None
    exponent = num_chips.bit_length() - 1
    shape = sorted(2 ** ((exponent + i) // num_dims) for i in range(num_dims))
    # Slices of less than a cube are written with their flat dimension last.
    return shape if shape[0] > 1 else shape[::-1]


def _most_equal_sides(volume: int) -> list[int]:
    boxes = (
        sorted((a, b, volume // (a * b)))
        for a in range(1, volume + 1)
        if volume % a == 0
        for b in range(1, volume // a + 1)
        if (volume // a) % b == 0
    )
    return min(boxes, key=sum)


def _positive(count: int, *, name: str) -> int:
    if count < 1:
        raise ValueError(
            error_message(
                where="mesh_selector", what=f"{name!r} has no devices", expected="a count of 1 or more"
            )
        )
    return count


def _looked_up(key: str, table: Mapping[str, _Entry], *, name: str) -> _Entry:
    if key in table:
        return table[key]
    nearest = difflib.get_close_matches(key, table, n=1)
    raise ValueError(
        error_message(
            where="mesh_selector",
            what=f"{name!r}: there is no type {key!r}",
            nearest=nearest,
            advice=f"Known types: {', '.join(table)}",
        )
    )
