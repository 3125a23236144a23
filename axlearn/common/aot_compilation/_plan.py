"""What a compiled step takes of each device: memory by its parts, operations, traffic, and the time of each."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Optional

import jax
import numpy as np

from axlearn.common.aot_compilation._compile import CompiledStep
from axlearn.common.aot_compilation._flops import flops_of
from axlearn.common.aot_compilation._speeds import speeds_of
from axlearn.common.compiled_program import Collective, bytes_accessed, collectives_of
from axlearn.common.machines import Machine
from axlearn.common.trainer import compiled_memory

WITHIN_SLICE = "links of a slice"
BETWEEN_SLICES = "network between slices"


@dataclasses.dataclass(frozen=True)
class AxisTraffic:
    """What collectives of one kind move along the same mesh axes.

    Attributes:
        kind: Such as "all-gather".
        axes: The mesh axes.
        link: `WITHIN_SLICE` or `BETWEEN_SLICES`.
        count: How many run in a step, loops counted.
        sent_bytes: What each device sends in a step.
        seconds: What that takes at the full speed of the links along the axes; None: not known.
    """

    kind: str
    axes: tuple[str, ...]
    link: str
    count: int
    sent_bytes: float
    seconds: Optional[float]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a step takes on a machine. Bytes and seconds are those of one device.

    Attributes:
        machine: The machine's name.
        num_devices: Its devices.
        mesh_shape: The sizes of the mesh's axes by name.
        memory_bytes: What a device has.
        parts: Bytes of the state by its parts, of the batch, and of what the step holds in between ("activations and
            temporaries").
        peak_bytes: What the compiler says that the step takes in all.
        num_params: Parameters of the model.
        tokens: Tokens of a global batch.
        model_flops: Operations that the model takes per step over all devices, `6 N + 12 L H Q T` per token.
        flops: Operations of the program per step over all devices; more than the model's where it recomputes.
        accessed_bytes: What the operations of a step read and write.
        traffic: What moves between devices.
        compute_seconds: Of the operations, at the peak rate; None where the device's rates are not known.
        memory_seconds: Of what is read and written, at the memory's full speed.
        compile_seconds: What compiling took here.
    """

    machine: str
    num_devices: int
    mesh_shape: dict[str, int]
    memory_bytes: int
    parts: dict[str, int]
    peak_bytes: int
    num_params: int
    tokens: int
    model_flops: float
    flops: float
    accessed_bytes: int
    traffic: Sequence[AxisTraffic]
    compute_seconds: Optional[float]
    memory_seconds: Optional[float]
    compile_seconds: float

    @property
    def fits(self) -> bool:
        """Whether the step fits into the memory of a device."""
        return self.peak_bytes <= self.memory_bytes

    def link_seconds(self, link: str) -> Optional[float]:
        """The time of all traffic over a kind of link, one after another; None where a part of it is not known."""
        seconds = [x.seconds for x in self.traffic if x.link == link]
        return None if any(x is None for x in seconds) else sum(x for x in seconds if x is not None)

    def step_seconds(self) -> Optional[tuple[float, float]]:
        """The time of a step if everything overlaps, and if nothing does but compute and memory; None: not known."""
        if self.compute_seconds is None or self.memory_seconds is None:
            return None
        links = [self.link_seconds(WITHIN_SLICE), self.link_seconds(BETWEEN_SLICES)]
        if any(x is None for x in links):
            return None
        on_device = max(self.compute_seconds, self.memory_seconds)
        moving = [x for x in links if x is not None]
        return max(on_device, *moving), on_device + sum(moving)

    def to_json(self) -> dict[str, Any]:
        """Returns the plan as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Plan":
        """Returns the plan that `to_json` made the values of."""
        traffic = [AxisTraffic(**{**x, "axes": tuple(x["axes"])}) for x in values["traffic"]]
        return cls(**{**values, "traffic": traffic})


def make_plan(step: CompiledStep, *, machine: Machine) -> Plan:
    """Reads a plan off a compiled step.

    Args:
        step: The step, compiled for the devices of the machine.
        machine: The machine.

    Returns:
        The plan.
    """
    text = step.compiled.as_text() or ""
    memory = compiled_memory(step.compiled)
    assert memory is not None, "a backend that compiles ahead of time states the memory"
    needs = step.trainer.programs.memory_needs()
    speeds = speeds_of(machine)
    flops = flops_of(step.traced.jaxpr)
    accessed = bytes_accessed(text)
    input_ids = step.trainer.input.element_spec()["input_ids"]
    tokens = int(np.prod(input_ids.shape))
    collectives = collectives_of(text, mesh_shape=dict(step.mesh.shape), slice_axes=_slice_axes(step.mesh))
    return Plan(
        machine=machine.name,
        num_devices=machine.num_devices,
        mesh_shape=dict(step.mesh.shape),
        memory_bytes=machine.memory_bytes,
        parts={
            **needs.state,
            "batch": needs.batch,
            "activations and temporaries": memory.temporary,
            "program": memory.code,
        },
        peak_bytes=memory.total,
        num_params=sum(
            int(np.prod(spec.shape)) for spec in jax.tree.leaves(step.trainer.trainer_state_specs.model)
        ),
        tokens=tokens,
        model_flops=step.trainer.model.flops_per_token(input_ids.shape[-1]).full * tokens,
        flops=flops,
        accessed_bytes=accessed,
        traffic=_traffic(collectives, mesh=step.mesh, machine=machine),
        compute_seconds=None if speeds is None else flops / machine.num_devices / speeds.flops,
        memory_seconds=None if speeds is None else accessed / speeds.memory,
        compile_seconds=step.seconds,
    )


def _traffic(
    collectives: Sequence[Collective], *, mesh: jax.sharding.Mesh, machine: Machine
) -> list[AxisTraffic]:
    groups: dict[tuple[str, tuple[str, ...], bool], list[Collective]] = {}
    for collective in collectives:
        key = (collective.kind, collective.axes, collective.is_between_slices)
        groups.setdefault(key, []).append(collective)
    rows = []
    for (kind, axes, is_between_slices), members in groups.items():
        sent = sum(x.sent_bytes for x in members)
        speed = _speed(axes, is_between_slices=is_between_slices, mesh=mesh, machine=machine)
        rows.append(
            AxisTraffic(
                kind=kind,
                axes=axes,
                link=BETWEEN_SLICES if is_between_slices else WITHIN_SLICE,
                count=sum(x.num_runs for x in members),
                sent_bytes=sent,
                seconds=None if speed is None else sent / speed,
            )
        )
    return sorted(rows, key=lambda row: -row.sent_bytes)


def _speed(
    axes: tuple[str, ...], *, is_between_slices: bool, mesh: jax.sharding.Mesh, machine: Machine
) -> Optional[float]:
    """The bytes per second and device of what carries the traffic along axes; None: not known.

    Within a slice that are the two links of each dimension of the torus along which the devices of a group differ.
    """
    speeds = speeds_of(machine)
    if speeds is None:
        return None
    if is_between_slices:
        return speeds.network
    groups = _devices_along(axes, mesh=mesh)
    coordinates = [np.array([getattr(device, "coords", (0,)) for device in group]) for group in groups]
    dims = max(int((x != x[0]).any(axis=0).sum()) for x in coordinates)
    return 2 * max(dims, 1) * speeds.link


def _slice_axes(mesh: jax.sharding.Mesh) -> tuple[str, ...]:
    """The axes along which there are devices of several slices."""

    def leads_out(axis: str) -> bool:
        groups = _devices_along((axis,), mesh=mesh)
        return any(len({getattr(device, "slice_index", 0) for device in group}) > 1 for group in groups)

    return tuple(axis for axis in mesh.axis_names if leads_out(axis))


def _devices_along(axes: tuple[str, ...], *, mesh: jax.sharding.Mesh) -> list[list[Any]]:
    names = list(mesh.axis_names)
    moving = [names.index(axis) for axis in axes]
    staying = [i for i in range(len(names)) if i not in moving]
    size = int(np.prod([mesh.devices.shape[i] for i in moving]))
    return [list(row) for row in mesh.devices.transpose([*staying, *moving]).reshape(-1, size)]
