"""The collectives of a program: what moves between devices, along which axes of the mesh, how much and how often."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from axlearn.common.compiled_program._computations import Computation, Instruction, array_sizes, parse_program
from axlearn.common.compiled_program._groups import axes_of_groups, parse_groups
from axlearn.common.compiled_program._trips import called_by, executions_of

_KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "collective-permute",
    "all-to-all",
    "ragged-all-to-all",
    "collective-broadcast",
)
# XLA for TPU writes a reduce-scatter as an all-reduce and the slice that is kept, in a computation of this name.
_FUSED_REDUCE_SCATTER = "all-reduce-scatter"
# And one that computes while it moves, in a computation of this name.
_FUSED_TO_OVERLAP = "async_collective_fusion"

_TRANSFER = re.compile(r'_xla_megascale_transfer_type="([A-Z_]+)"')
_TRANSFER_SLICES = re.compile(r'_xla_megascale_target="\{([0-9,]+)\}')
_TRANSFER_KINDS = {
    "ALL_GATHER": "all-gather",
    "ALL_REDUCE": "all-reduce",
    "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all",
    "ONE_TO_ONE": "collective-permute",
}


class Collective(NamedTuple):
    """A collective of a compiled program.

    Attributes:
        kind: Such as "all-gather".
        axes: The mesh axes along which it moves data, outermost first.
        group_size: The devices that take part in it together.
        whole_bytes: The bytes of the whole array: what an all-gather makes, what a reduction takes, on each device.
        num_runs: How often it runs in one run of the program.
        is_between_slices: Whether it goes over the network between slices, by way of their hosts.
        op_name: What jax calls the operation that it is for, such as "jit(step)/while/body/dot_general".
        is_async: Whether the program goes on while it runs; else it waits.
    """

    kind: str
    axes: tuple[str, ...]
    group_size: int
    whole_bytes: int
    num_runs: int
    is_between_slices: bool
    op_name: str
    is_async: bool

    @property
    def sent_bytes(self) -> float:
        """Bytes that each device sends in one run of the program, by algorithms that use every link (rings).

        Reference:
            Thakur, Rabenseifner and Gropp, Optimization of Collective Communication Operations in MPICH, 2005,
            section 4.
        """
        share = (self.group_size - 1) / self.group_size
        per_run = {"all-reduce": 2 * share, "collective-permute": 1.0, "collective-broadcast": 1.0}
        return self.whole_bytes * self.num_runs * per_run.get(self.kind, share)


def collectives_of(
    text: str, *, mesh_shape: Mapping[str, int], slice_axes: Sequence[str] = ()
) -> list[Collective]:
    """Lists the collectives of a compiled program that move anything.

    Between slices XLA for TPU has no collectives but transfers to other slices' hosts, which say what they stand for;
    they are listed as that.

    Args:
        text: From `Compiled.as_text()`.
        mesh_shape: The sizes of the mesh's axes by name, outermost first, as in `Mesh.shape`.
        slice_axes: The axes of the mesh that lead from one slice into another, outermost first.

    Returns:
        The collectives, in the order of the text.

    Raises:
        UnknownTripCountError: If the trips of a loop cannot be told.
    """
    computations = parse_program(text)
    counts = executions_of(computations)
    asynchronous = _asynchronous(computations)
    found = []
    for computation in computations.values():
        for instruction in computation.instructions.values():
            count = counts[computation.name]
            is_async = computation.name in asynchronous
            collective = _collective(
                instruction, computation, count=count, mesh_shape=dict(mesh_shape), is_async=is_async
            ) or _transfer(instruction, computation, count=count, axes=tuple(slice_axes))
            if collective is not None:
                found.append(collective)
    return found


def _asynchronous(computations: Mapping[str, Computation]) -> set[str]:
    """The computations that run beside what starts them, and those into which collectives were fused to overlap."""
    started = {
        name
        for computation in computations.values()
        for instruction in computation.instructions.values()
        if instruction.operation == "async-start"
        for name in called_by(instruction)
    }
    return started | {name for name in computations if _FUSED_TO_OVERLAP in name}


def _collective(
    instruction: Instruction,
    computation: Computation,
    *,
    count: int,
    mesh_shape: dict[str, int],
    is_async: bool,
) -> Collective | None:
    kind = instruction.operation.removesuffix("-start")
    if kind not in _KINDS or count == 0:
        return None
    num_devices = 1
    for size in mesh_shape.values():
        num_devices *= size
    groups = parse_groups(instruction.attributes, num_devices=num_devices)
    if groups is None:
        groups = [tuple(range(num_devices))]
    is_permute = kind == "collective-permute"
    axes = axes_of_groups(groups, mesh_shape=mesh_shape, is_permute=is_permute)
    if not axes:
        return None
    group_size = len(groups) if is_permute else max(map(len, groups))
    whole = _whole_bytes(instruction, kind, computation, group_size=group_size)
    if _FUSED_REDUCE_SCATTER in computation.name and kind == "all-reduce":
        kind = "reduce-scatter"
    is_async = is_async or instruction.operation.endswith("-start")
    return Collective(kind, axes, group_size, whole, count, False, _op_name(instruction), is_async)


def _transfer(
    instruction: Instruction, computation: Computation, *, count: int, axes: tuple[str, ...]
) -> Collective | None:
    """What a transfer to the hosts of other slices stands for; None where it is something else."""
    transfer = _TRANSFER.search(instruction.attributes)
    if instruction.operation != "send" or transfer is None or count == 0:
        return None
    kind = _TRANSFER_KINDS.get(transfer[1], transfer[1].lower())
    # Written {1,2}x{0:3}: the slices, and the devices in each.
    slices = _TRANSFER_SLICES.search(instruction.attributes)
    group_size = len(slices[1].split(",")) if slices else 2
    sent = sum(array_sizes(computation.instructions[instruction.operands[0]].shape))
    whole = sent * group_size if kind == "all-gather" else sent
    return Collective(kind, axes, group_size, whole, count, True, _op_name(instruction), True)


def _whole_bytes(instruction: Instruction, kind: str, computation: Computation, *, group_size: int) -> int:
    """The whole array's bytes, from the operands: the shape of an asynchronous start holds more than the result."""
    operands = [computation.instructions.get(name) for name in instruction.operands]
    taken = sum(sum(array_sizes(x.shape)) for x in operands if x is not None)
    return taken * group_size if kind == "all-gather" else taken


def _op_name(instruction: Instruction) -> str:
    match = re.search(r'op_name="([^"]*)"', instruction.attributes)
    return match[1] if match else ""
