"""Which devices take part in a collective together: the three ways in which XLA writes `replica_groups`."""

import math
import re
from typing import Optional

import numpy as np

_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{((?:\{[0-9, ]*\},?)*)\}")
_IOTA = re.compile(r"replica_groups=\[([0-9,]+)\]<=\[([0-9,]+)\](?:T\(([0-9,]+)\))?")
_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, *device_ids=\(\[([0-9,]+)\](?:T\(([0-9,]+)\))?\))?\s*\{([^}]*)\}"
)
_AXIS = re.compile(r"'([^']+)'=([0-9]+)")


def parse_groups(attributes: str, *, num_devices: int) -> Optional[list[tuple[int, ...]]]:
    """Reads the groups of devices between which a collective moves data.

    Args:
        attributes: The attributes of a collective, as text.
        num_devices: The devices of the program.

    Returns:
        The groups, as places in the program's list of devices; of a `collective-permute`, its pairs of source and
        target. None where the text has none.

    Reference:
        The forms: `{{0,1},{2,3}}`; `[2,2]<=[2,2]T(1,0)`, the numbers 0, 1, ... in the second shape, transposed and
        cut into groups of the first's last size; `mesh['a'=2,'b'=2] {'a'}`, the devices that differ along axis a only,
        which are numbered as `device_ids=([2,2]T(1,0))` says.
    """
    match = _MESH.search(attributes)
    if match:
        return _mesh_groups(match[1], match[4], ids=_iota(match[2], match[3]) if match[2] else None)
    match = _IOTA.search(attributes)
    if match:
        return _iota_groups(match[1], match[2], match[3])
    match = _LISTED.search(attributes)
    if match is None:
        return None
    groups = [_numbers(group) for group in re.findall(r"\{([0-9, ]*)\}", match[1])]
    # No groups at all: everybody together.
    return groups or [tuple(range(num_devices))]


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part.strip())


def _iota_groups(groups: str, shape: str, order: Optional[str]) -> list[tuple[int, ...]]:
    return [tuple(row.tolist()) for row in _iota(shape, order).reshape(-1, _numbers(groups)[-1])]


def _iota(shape: str, order: Optional[str]) -> np.ndarray:
    dims = _numbers(shape)
    ids = np.arange(math.prod(dims)).reshape(dims)
    return ids if order is None else ids.transpose(_numbers(order))


def _mesh_groups(axes: str, along: str, *, ids: Optional[np.ndarray]) -> list[tuple[int, ...]]:
    sizes = {name: int(size) for name, size in _AXIS.findall(axes)}
    moving = [list(sizes).index(name) for name in re.findall(r"'([^']+)'", along)]
    staying = [i for i in range(len(sizes)) if i not in moving]
    shape = tuple(sizes.values())
    ids = np.arange(math.prod(shape)).reshape(shape) if ids is None else ids.reshape(shape)
    group_size = math.prod(ids.shape[i] for i in moving)
    return [tuple(row.tolist()) for row in ids.transpose([*staying, *moving]).reshape(-1, group_size)]


def axes_of_groups(
    groups: list[tuple[int, ...]], *, mesh_shape: dict[str, int], is_permute: bool = False
) -> tuple[str, ...]:
    """Names the mesh axes along which the devices of a group differ.

    Args:
        groups: From `parse_groups`.
        mesh_shape: The sizes of the mesh's axes by name, outermost first; the program's devices are in its order.
        is_permute: Whether the groups are pairs of source and target.

    Returns:
        The axes, in the order of the mesh; empty where no device gets anything from another.
    """
    shape = tuple(mesh_shape.values())
    differing: set[int] = set()
    for group in groups:
        if len(group) < 2 or (is_permute and group[0] == group[1]):
            continue
        places = np.array([np.unravel_index(device, shape) for device in group])
        differing.update(np.flatnonzero((places != places[0]).any(axis=0)).tolist())
    return tuple(name for i, name in enumerate(mesh_shape) if i in differing)
