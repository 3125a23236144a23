"""What to change where a step does not fit: changes that were tried on the trainer's specs, which compiles nothing."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Optional

import numpy as np

from axlearn.common.aot_compilation._plan import ACTIVATIONS, Plan
from axlearn.common.config import InstantiableConfig, apply_overrides, config_for_function
from axlearn.common.optimizers import offload_optimizer
from axlearn.common.trainer_config_modifier import GradientAccumulationModifier

_GIB = 2**30
# A change that saves less than this part of a device's memory is not worth a line.
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
    trials = _Trials(plan, trainer_config=trainer_config, devices=devices)
    split = trials.splits()
    wider = _all_devices_over_fsdp(plan)
    changes = [[override] for override in split]
    changes += [split] if len(split) > 1 else []
    changes += [[wider, *split]] if wider is not None else []
    return [
        _what_takes_most(plan),
        *(trials.overrides(change) for change in changes),
        *trials.offload(),
        *trials.smaller_activations(),
    ]


def _what_takes_most(plan: Plan) -> str:
    state, needed = plan.state_bytes, plan.peak_bytes
    if state > plan.memory_bytes:
        return f"The state alone is {_gib(state)} of {_gib(plan.memory_bytes)}:"
    rest = f" of {_gib(needed)}" if needed else ""
    return f"The state is {_gib(state)}{rest}, and a device has {_gib(plan.memory_bytes)}:"


def _all_devices_over_fsdp(plan: Plan) -> Optional[str]:
    """An override that splits the state over all devices, where it is not yet."""
    if plan.mesh_shape.get("fsdp", 0) in (0, 1) or plan.mesh_shape.get("data", 1) == 1:
        return None
    shape = [
        -1 if name == "fsdp" else 1 if name == "data" else size for name, size in plan.mesh_shape.items()
    ]
    return f"mesh_shape=({','.join(map(str, shape))})"


class _Trials:
    """Tries changes on trainers, of which only specs are made.

    Args:
        plan: The plan of the step.
        trainer_config: The trainer's config that was planned.
        devices: The devices for which it was.
    """

    def __init__(self, plan: Plan, *, trainer_config: InstantiableConfig, devices: np.ndarray):
        self._plan = plan
        self._trainer_config = trainer_config
        self._devices = devices
        self._programs = trainer_config.clone().instantiate(parent=None, devices=devices).programs

    def splits(self) -> list[str]:
        """Returns overrides that split the large parameters that are whole where the mesh splits others."""
        return [
            f"{x.field}={x.better_spec}"
            for x in self._programs.whole_parameters().large
            if x.field is not None and x.saved_bytes >= _WORTH_A_LINE * self._plan.memory_bytes
        ]

    def overrides(self, overrides: Sequence[str]) -> str:
        """Returns what overrides do to the state, in a line."""
        flags = " ".join(f'--set "{override}"' for override in overrides)
        try:
            state = self._state_after(lambda cfg: apply_overrides(cfg, list(overrides)))
        except ValueError as e:
            return f"{flags} is refused: {str(e).splitlines()[0]}"
        more = "" if state <= self._plan.memory_bytes else ", not enough by itself"
        is_wider = any(override.startswith("mesh_shape=") for override in overrides)
        slow = ", gathered over the network between slices" if is_wider and self._plan.num_slices > 1 else ""
        return f"{flags}: the state is {_gib(state)} then{more}{slow}"

    def offload(self) -> Iterator[str]:
        """Yields what an optimizer that waits on the host saves, if anything."""
        if not hasattr(self._trainer_config.learner, "optimizer"):
            return

        def change(cfg: Any) -> None:
            cfg.learner.optimizer = config_for_function(offload_optimizer).set(
                optimizer=cfg.learner.optimizer
            )

        state = self._state_after(change)
        saved = self._plan.state_bytes - state
        if saved > _WORTH_A_LINE * self._plan.memory_bytes:
            yield (
                f"offload_optimizer(...) around learner.optimizer: {_gib(saved)} of the optimizer wait on the host, "
                f"the state is {_gib(state)} then"
            )

    def smaller_activations(self) -> Iterator[str]:
        """Yields ways to hold less between forward and backward, if the state leaves room for any."""
        plan = self._plan
        room = plan.memory_bytes - plan.state_bytes
        activations = plan.parts.get(ACTIVATIONS) or max(plan.peak_bytes - plan.state_bytes, 0)
        if room <= 0 or activations <= 0:
            return
        told = f"activations and temporaries are {_gib(activations)}, and there is room for {_gib(room)}"
        steps = self._accumulation(at_least=activations / room)
        if steps is not None:
            yield f"GradientAccumulationModifier with grad_acc_steps={steps}: {told}"
        yield f"A remat_spec that saves less (RematSpecModifier), which was not tried: {told}"

    def _accumulation(self, *, at_least: float) -> Optional[int]:
        """The micro-batches that a batch divides into, so many times more than now; None: it has too few rows."""
        transformation = getattr(self._trainer_config.learner, "forward_fn_transformation", None)
        now = getattr(transformation, "steps", 1)
        input_ids = self._programs.batch_specs()["input_ids"]
        rows = input_ids.sharding.shard_shape(input_ids.shape)[0] // now
        for times in range(2, rows + 1):
            if rows % times == 0 and times >= at_least and self._accumulates(now * times):
                return now * times
        return None

    def _accumulates(self, steps: int) -> bool:
        modifier = GradientAccumulationModifier.default_config().set(grad_acc_steps=steps).instantiate()
        try:
            self._state_after(modifier)
        except ValueError:
            return False
        return True

    def _state_after(self, change: Callable[[Any], Any]) -> int:
        """The bytes of the state on each device after a change of the config; raises what the trainer does."""
        cfg = self._trainer_config.clone()
        change(cfg)
        trainer = cfg.instantiate(parent=None, devices=self._devices)
        return sum(trainer.programs.memory_needs().state.values())


def _gib(size: float) -> str:
    return f"{size / _GIB:.3g} GiB"
