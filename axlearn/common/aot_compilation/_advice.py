"""What to change where a step does not fit: changes that were tried on the trainer's specs, which compiles nothing."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Optional

import numpy as np

from axlearn.common.aot_compilation._plan import ACTIVATIONS, Plan, PlannedParameter
from axlearn.common.config import InstantiableConfig, apply_overrides

_GIB = 2**30
# A parameter that takes less than this part of a device's memory is not worth a line.
_WORTH_A_LINE = 0.01


def advise(plan: Plan, *, trainer_config: InstantiableConfig, devices: np.ndarray) -> list[str]:
    """Returns what makes a step smaller, the cheapest first, a line each; empty where it fits.

    Args:
        plan: The plan of the step.
        trainer_config: The trainer's config that was planned; it is not changed.
        devices: The devices for which it was.
    """
    if plan.fits:
        return []
    lines = [_what_takes_most(plan)]
    split = list(_split_parameters(plan, trainer_config))
    wider = _all_devices_over_fsdp(plan)
    changes = [[override] for override in split]
    changes += [split] if len(split) > 1 else []
    changes += [[wider, *split]] if wider is not None else []
    for change in changes:
        lines.append(_tried(plan, change, trainer_config=trainer_config, devices=devices))
    optimizer = plan.parts.get("optimizer", 0)
    if optimizer > _WORTH_A_LINE * plan.memory_bytes:
        lines.append(
            f"offload_optimizer(...) around learner.optimizer: {_gib(optimizer)} of the optimizer wait on the host, "
            f"the state is {_gib(plan.state_bytes - optimizer)} then"
        )
    return [*lines, *_smaller_activations(plan)]


def _what_takes_most(plan: Plan) -> str:
    state, needed = plan.state_bytes, plan.peak_bytes
    if state > plan.memory_bytes:
        return f"The state alone is {_gib(state)} of {_gib(plan.memory_bytes)}:"
    rest = f" of {_gib(needed)}" if needed else ""
    return f"The state is {_gib(state)}{rest}, and a device has {_gib(plan.memory_bytes)}:"


def _split_parameters(plan: Plan, trainer_config: InstantiableConfig) -> Iterator[str]:
    """Yields overrides that split the large parameters of which each device has all."""
    for parameter in sorted(plan.parameters, key=lambda x: -x.num_bytes):
        if parameter.num_parts > 1 or parameter.num_bytes < _WORTH_A_LINE * plan.memory_bytes:
            continue
        path = ".".join(["model", *parameter.path.split("/")[:-1]])
        layer = _config_at(trainer_config, path)
        spec = None if layer is None else _split_spec(parameter, layer, mesh_shape=plan.mesh_shape)
        if spec is not None:
            yield f"{path}.param_partition_spec={spec}"


def _config_at(cfg: Any, path: str) -> Optional[Any]:
    for name in path.split("."):
        cfg = getattr(cfg, name, None)
    return cfg if hasattr(cfg, "param_partition_spec") else None


def _split_spec(
    parameter: PlannedParameter, layer: Any, *, mesh_shape: dict[str, int]
) -> Optional[tuple[Optional[str], ...]]:
    """The layer's spec with the mesh's longest axis on the longest dim over which it divides."""
    spec = layer.param_partition_spec or (None,) * len(parameter.shape)
    axis = max(mesh_shape, key=lambda name: mesh_shape[name])
    named = [x for x in spec if isinstance(x, str)]
    if len(spec) != len(parameter.shape) or len(named) + sum(x is None for x in spec) != len(spec):
        return None
    # An axis that the mesh has only once may give its dim away.
    free = [i for i, x in enumerate(spec) if x is None and parameter.shape[i] % mesh_shape[axis] == 0]
    if not free or axis in named:
        return None
    dim = max(free, key=lambda i: parameter.shape[i])
    return tuple(axis if i == dim else x for i, x in enumerate(spec))


def _all_devices_over_fsdp(plan: Plan) -> Optional[str]:
    """An override that splits the state over all devices, where it is not yet."""
    if plan.mesh_shape.get("fsdp", 0) in (0, 1) or plan.mesh_shape.get("data", 1) == 1:
        return None
    shape = [
        -1 if name == "fsdp" else 1 if name == "data" else size for name, size in plan.mesh_shape.items()
    ]
    return f"mesh_shape=({','.join(map(str, shape))})"


def _tried(
    plan: Plan, overrides: Sequence[str], *, trainer_config: InstantiableConfig, devices: np.ndarray
) -> str:
    """What changes do to the state, by the specs of a trainer that has them."""
    flags = " ".join(f'--set "{override}"' for override in overrides)
    cfg = trainer_config.clone()
    try:
        apply_overrides(cfg, list(overrides))
        trainer = cfg.instantiate(parent=None, devices=devices)
        state = sum(trainer.programs.memory_needs().state.values())
    except ValueError as e:
        return f"{flags} is refused: {str(e).splitlines()[0]}"
    more = "" if state <= plan.memory_bytes else ", not enough by itself"
    is_wider = any(override.startswith("mesh_shape=") for override in overrides)
    slow = ", gathered over the network between slices" if is_wider and plan.num_slices > 1 else ""
    return f"{flags}: the state is {_gib(state)} then{more}{slow}"


def _smaller_activations(plan: Plan) -> list[str]:
    room = plan.memory_bytes - plan.state_bytes
    activations = plan.parts.get(ACTIVATIONS) or max(plan.peak_bytes - plan.state_bytes, 0)
    if room <= 0 or activations <= 0:
        return []
    steps = 2 ** math.ceil(math.log2(max(activations / room, 2)))
    return [
        f"GradientAccumulationModifier with grad_acc_steps={steps}, or a remat_spec that saves less "
        f"(RematSpecModifier): activations and temporaries are {_gib(activations)}, and there is room for {_gib(room)}"
    ]


def _gib(size: float) -> str:
    return f"{size / _GIB:.3g} GiB"
