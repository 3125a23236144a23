"""How fast the parts of a TPU are, as its vendor states."""

from collections.abc import Mapping
from typing import NamedTuple, Optional

from axlearn.common.flops import peak_flops
from axlearn.common.machines import Machine


class Speeds(NamedTuple):
    """Rates of one device, per second.

    Attributes:
        flops: Operations in bfloat16.
        memory: Bytes to and from its memory.
        link: Bytes out on one link to a neighbour in the slice. A torus has two links for each of its dimensions.
        network: Bytes out to other slices, its part of what the host has. None: not stated.
    """

    flops: float
    memory: float
    link: float
    network: Optional[float]


# The bytes per second of a chip to its memory, on one link one way, and by its part of the host's network:
# https://docs.cloud.google.com/tpu/docs/ v4, v5e, v5p, v6e, tpu7x (2025). The pages state what all links of a chip
# carry together: 2400 Gbit/s on 6 (v4), 1600 on 4 (v5e), 4800 on 6 (v5p), 3200 on 4 (v6e), 9600 on 6 both ways (7x).
# A host of 4 chips of v4 or v5p has 200 Gbit/s; for pods of 256 chips of v5e and v6e they state 6.4 and 25.6 Tbit/s.
_PER_CHIP: Mapping[str, tuple[float, float, Optional[float]]] = {
    "v4": (1228e9, 50e9, 50e9 / 8),
    "v5e": (819e9, 50e9, 25e9 / 8),
    "v5p": (2765e9, 100e9, 50e9 / 8),
    "v6e": (1640e9, 100e9, 100e9 / 8),
    "tpu7x": (7380e9, 100e9, None),
}
_DEVICES_PER_CHIP = {"tpu7x": 2}


def speeds_of(machine: Machine) -> Optional[Speeds]:
    """Returns the speeds of a machine's devices, or None where they are not known."""
    generation = (machine.topology or "").partition(":")[0]
    flops = peak_flops(machine.device_kind)
    if generation not in _PER_CHIP or flops is None:
        return None
    memory, link, network = _PER_CHIP[generation]
    devices = _DEVICES_PER_CHIP.get(generation, 1)
    return Speeds(
        flops=flops,
        memory=memory / devices,
        link=link / devices,
        network=None if network is None else network / devices,
    )
