"""What a step takes of each device: memory by its parts, operations, traffic, and the time of each."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, Optional

WITHIN_SLICE = "links of a slice"
BETWEEN_SLICES = "network between slices"


@dataclasses.dataclass(frozen=True)
class AxisTraffic:
    """What collectives of one kind move along the same mesh axes.

    Attributes:
        kind: Such as "all-gather".
        axes: The mesh axes.
        link: `WITHIN_SLICE` or `BETWEEN_SLICES`.
        overlaps: Whether the program computes while they run; else it waits for each.
        count: How many run in a step, loops counted.
        sent_bytes: What each device sends in a step.
        seconds: What that takes at the full speed of the links along the axes; None: not known.
    """

    kind: str
    axes: tuple[str, ...]
    link: str
    overlaps: bool
    count: int
    sent_bytes: float
    seconds: Optional[float]


@dataclasses.dataclass(frozen=True)
class PlannedParameter:
    """A parameter of the model on the mesh.

    Attributes:
        path: Such as "decoder/emb/token_emb/weight".
        shape: Of all of it.
        dtype: Such as "float32".
        spec: The mesh axes of each dim, empty where it is whole.
        num_bytes: Of the part that a device has.
        num_parts: In how many different parts it lies on the devices; 1: each device has all of it.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    spec: tuple[tuple[str, ...], ...]
    num_bytes: int
    num_parts: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a step takes on a machine. Bytes and seconds are those of one device.

    Attributes:
        machine: The machine's name.
        num_devices: Its devices.
        num_slices: Its slices.
        mesh_shape: The sizes of the mesh's axes by name.
        slice_axes: The axes of the mesh that lead from slice to slice.
        memory_bytes: What a device has for programs.
        parts: Bytes of the state by its parts, of the batch, and of what the step holds in between ("activations and
            temporaries").
        peak_bytes: What the compiler says that the step takes in all.
        host_bytes: What the step holds in the memory of the host; the time of moving it is in none of the seconds.
        parameters: The parameters, in the order of the model.
        num_params: Parameters of the model.
        tokens: Tokens of a global batch.
        model_flops: Operations that the model takes per step over all devices, `6 N + 12 L H Q T` per token.
        flops: Operations of the program per step over all devices; more than the model's where it recomputes.
        product_bytes: What operations with matrix products, and kernels, read and write in a step.
        other_bytes: What all other operations read and write.
        traffic: What moves between devices.
        compute_seconds: Of the operations, at the peak rate; None where the device's rates are not known.
        product_memory_seconds: Of `product_bytes`, at the memory's full speed.
        other_memory_seconds: Of `other_bytes`, likewise.
        compile_seconds: What compiling took here.
        failure: Why there is no program; then what only the program tells is 0, and `peak_bytes` is the state, the
            batch and what the compiler asked for beside them, if it said. None: there is one.
        advice: What to change where it does not fit.
        whole: The paths of large parameters that the mesh could split further, by `Programs.whole_parameters`.
    """

    machine: str
    num_devices: int
    num_slices: int
    mesh_shape: dict[str, int]
    slice_axes: tuple[str, ...]
    memory_bytes: int
    parts: dict[str, int]
    peak_bytes: int
    host_bytes: int
    parameters: Sequence[PlannedParameter]
    num_params: int
    tokens: int
    model_flops: float
    flops: float
    product_bytes: int
    other_bytes: int
    traffic: Sequence[AxisTraffic]
    compute_seconds: Optional[float]
    product_memory_seconds: Optional[float]
    other_memory_seconds: Optional[float]
    compile_seconds: float
    failure: Optional[str] = None
    advice: Sequence[str] = ()
    whole: Sequence[str] = ()

    @property
    def fits(self) -> bool:
        """Whether the step fits into the memory of a device."""
        return self.failure is None and self.peak_bytes <= self.memory_bytes

    @property
    def state_bytes(self) -> int:
        """What a device holds from step to step."""
        return sum(size for name, size in self.parts.items() if name not in NOT_STATE)

    @property
    def memory_seconds(self) -> Optional[float]:
        """The time of all that is read and written; None: not known."""
        if self.product_memory_seconds is None or self.other_memory_seconds is None:
            return None
        return self.product_memory_seconds + self.other_memory_seconds

    def link_seconds(self, link: str, *, overlaps: Optional[bool] = None) -> Optional[float]:
        """The time of traffic over a kind of link, one after another; None where a part of it is not known.

        Args:
            link: `WITHIN_SLICE` or `BETWEEN_SLICES`.
            overlaps: Which part of it. None: all.
        """
        rows = [x for x in self.traffic if x.link == link and overlaps in (None, x.overlaps)]
        seconds = [x.seconds for x in rows]
        return None if any(x is None for x in seconds) else sum(x for x in seconds if x is not None)

    def step_seconds(self) -> Optional["StepSeconds"]:
        """Returns the time of a step under three assumptions; None where the device's rates are not known."""
        links = [
            [self.link_seconds(link, overlaps=x) for link in (WITHIN_SLICE, BETWEEN_SLICES)]
            for x in (False, True)
        ]
        waited = [x for x in links[0] if x is not None]
        beside = [x for x in links[1] if x is not None]
        times = (self.compute_seconds, self.product_memory_seconds, self.other_memory_seconds)
        compute, of_products, of_others = times
        known = len(waited) == len(beside) == 2 and self.failure is None
        if not known or compute is None or of_products is None or of_others is None:
            return None
        both = [x + y for x, y in zip(waited, beside, strict=True)]
        on_device = max(compute, of_products) + of_others
        return StepSeconds(
            best=max(compute, of_products + of_others, *both),
            predicted=max(on_device + sum(waited), *beside),
            worst=on_device + sum(both),
        )

    def mfu(self, seconds: float) -> Optional[float]:
        """The part of the peak rate that a step of so many seconds uses for the model's own operations."""
        if not self.flops or self.compute_seconds is None:
            return None
        return self.model_flops / self.flops * self.compute_seconds / seconds

    def to_json(self) -> dict[str, Any]:
        """Returns the plan as JSON values."""
        values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Plan":
        """Returns the plan that `to_json` made the values of."""
        traffic = [AxisTraffic(**{**x, "axes": tuple(x["axes"])}) for x in values["traffic"]]
        parameters = [
            PlannedParameter(
                **{**x, "shape": tuple(x["shape"]), "spec": tuple(tuple(axes) for axes in x["spec"])}
            )
            for x in values["parameters"]
        ]
        lists = {name: tuple(values[name]) for name in ("slice_axes", "advice", "whole")}
        return cls(**{**values, **lists, "traffic": traffic, "parameters": parameters})


ACTIVATIONS = "activations and temporaries"
NOT_STATE = frozenset(["batch", ACTIVATIONS, "program"])


@dataclasses.dataclass(frozen=True)
class StepSeconds:
    """The seconds of a step, each part of it at the vendor's full rate; without what moves to the host and back.

    Attributes:
        best: If everything overlaps.
        predicted: As the program is written: products at the peak rate or the memory's, whichever takes longer; then
            all other operations at the memory's; then what the program waits for. What it need not wait for overlaps.
        worst: As predicted, and no communication overlaps.
    """

    best: float
    predicted: float
    worst: float
