"""A plan, read off a step: what its trainer, the traced program and the compiled one say of it."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Optional, Union

import jax
import numpy as np

from axlearn.common.aot_compilation._compile import CompiledStep, TracedStep
from axlearn.common.aot_compilation._flops import flops_of
from axlearn.common.aot_compilation._plan import (
    ACTIVATIONS,
    BETWEEN_SLICES,
    WITHIN_SLICE,
    AxisTraffic,
    Plan,
    PlannedParameter,
)
from axlearn.common.aot_compilation._program import CompiledFacts, compiled_facts
from axlearn.common.aot_compilation._speeds import speeds_of
from axlearn.common.compiled_program import Collective, bytes_accessed, collectives_of
from axlearn.common.machines import Machine
from axlearn.common.trainer import shard_bytes
from axlearn.common.utils import flatten_items

# As XLA for TPU numbers its memories in layouts: what lies elsewhere than in these is in the vector units' own memory.
_TPU_MAIN_MEMORY = (0,)


def make_plan(
    step: Union[TracedStep, CompiledStep], *, machine: Machine, facts: Optional[CompiledFacts] = None
) -> Plan:
    """Reads a plan off a step.

    Args:
        step: The step, for the devices of the machine; compiled if `facts` is None.
        machine: The machine.
        facts: What was kept of the compiled program. None: it is the step's own.

    Returns:
        The plan.
    """
    if facts is None:
        assert isinstance(step, CompiledStep), "a step that is not compiled has no facts of its own"
        facts = compiled_facts(step.compiled, seconds=step.seconds)
    spaces = _TPU_MAIN_MEMORY if machine.accelerator == "tpu" else None
    accessed = bytes_accessed(facts.text, spaces=spaces)
    slice_axes = _slice_axes(step.mesh)
    collectives = collectives_of(facts.text, mesh_shape=dict(step.mesh.shape), slice_axes=slice_axes)
    speeds = speeds_of(machine)
    return _plan_of(
        step,
        machine=machine,
        parts={ACTIVATIONS: facts.memory.temporary, "program": facts.memory.code},
        peak_bytes=facts.memory.total,
        host_bytes=facts.host_bytes,
        product_bytes=accessed.products,
        other_bytes=accessed.others,
        traffic=_traffic(collectives, mesh=step.mesh, machine=machine),
        product_memory_seconds=None if speeds is None else accessed.products / speeds.memory,
        other_memory_seconds=None if speeds is None else accessed.others / speeds.memory,
        compile_seconds=facts.seconds,
    )


def make_failed_plan(
    step: TracedStep, *, machine: Machine, failure: str, temporary_bytes: int, compile_seconds: float
) -> Plan:
    """Returns what is known of a step that its compiler gave up on.

    Args:
        step: The step.
        machine: The machine.
        failure: Why it gave up.
        temporary_bytes: The memory that it asked for beside state and batch; 0: it did not say.
        compile_seconds: What trying took.
    """
    plan = _plan_of(
        step,
        machine=machine,
        parts={ACTIVATIONS: temporary_bytes} if temporary_bytes else {},
        peak_bytes=0,
        host_bytes=0,
        product_bytes=0,
        other_bytes=0,
        traffic=(),
        product_memory_seconds=None,
        other_memory_seconds=None,
        compile_seconds=compile_seconds,
        failure=failure,
    )
    return dataclasses.replace(plan, peak_bytes=sum(plan.parts.values()) if temporary_bytes else 0)


def _plan_of(
    step: Union[TracedStep, CompiledStep], *, machine: Machine, parts: dict[str, int], **facts: Any
) -> Plan:
    """A plan of what is known of a step without its program, and of `facts`."""
    needs = step.trainer.programs.memory_needs()
    input_ids = step.trainer.input.element_spec()["input_ids"]
    tokens = int(np.prod(input_ids.shape))
    flops = flops_of(step.traced.jaxpr)
    speeds = speeds_of(machine)
    parameters = _planned_parameters(step.trainer)
    return Plan(
        machine=machine.name,
        num_devices=machine.num_devices,
        num_slices=machine.num_slices,
        mesh_shape=dict(step.mesh.shape),
        slice_axes=_slice_axes(step.mesh),
        memory_bytes=machine.memory_bytes,
        parts={**needs.state, "batch": needs.batch, **parts},
        parameters=parameters,
        whole=tuple(x.path for x in step.trainer.programs.whole_parameters().large),
        num_params=sum(math.prod(x.shape) for x in parameters),
        tokens=tokens,
        model_flops=step.trainer.model.flops_per_token(input_ids.shape[-1]).full * tokens,
        flops=flops,
        compute_seconds=None if speeds is None else flops / machine.num_devices / speeds.flops,
        **facts,
    )


def _planned_parameters(trainer: Any) -> list[PlannedParameter]:
    """Returns how the parameters of a trainer's model lie on its mesh, in the order of the model."""
    with trainer.mesh():
        return [
            _planned_parameter(path, spec) for path, spec in flatten_items(trainer.trainer_state_specs.model)
        ]


def _planned_parameter(path: str, spec: Any) -> PlannedParameter:
    shape = tuple(spec.shape)
    sharding = spec.sharding
    # What jax calls None, a name or a tuple of names, for each of the first dims.
    entries = [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]
    axes = [() if x is None else (x,) if isinstance(x, str) else tuple(x) for x in entries]
    return PlannedParameter(
        path=path,
        shape=shape,
        dtype=np.dtype(spec.dtype).name,
        spec=tuple(tuple(name for name in names if sharding.mesh.shape[name] > 1) for names in axes),
        num_bytes=shard_bytes(spec),
        num_parts=math.prod(shape) // max(math.prod(sharding.shard_shape(shape)), 1),
    )


def _traffic(
    collectives: Sequence[Collective], *, mesh: jax.sharding.Mesh, machine: Machine
) -> list[AxisTraffic]:
    groups: dict[tuple[str, tuple[str, ...], bool, bool], list[Collective]] = {}
    for collective in collectives:
        key = (collective.kind, collective.axes, collective.is_between_slices, collective.is_async)
        groups.setdefault(key, []).append(collective)
    rows = []
    for (kind, axes, is_between_slices, is_async), members in groups.items():
        sent = sum(x.sent_bytes for x in members)
        speed = _speed(axes, is_between_slices=is_between_slices, mesh=mesh, machine=machine)
        rows.append(
            AxisTraffic(
                kind=kind,
                axes=axes,
                link=BETWEEN_SLICES if is_between_slices else WITHIN_SLICE,
                overlaps=is_async,
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
