"""Parameters that are whole on every device along axes of the mesh over which others are split."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Optional

import numpy as np
from jax.sharding import Mesh

from axlearn.common.config import ConfigBase, error_message
from axlearn.common.trainer._memory import format_bytes, is_on_host, shard_bytes
from axlearn.common.utils import VDict, flatten_items

# What is not worth a line of its own: norm scales and biases. The norms of 405B, 126 x 16384 floats, are 8 MiB, and
# 0.0005 % of its parameters; the smallest table of a recipe here, 2048 x 192, is 1.5 MiB.
_SMALL_BYTES = 2**20
_SMALL_SHARE = 1e-3

# The parts of a parameter's path that are called otherwise in the config. A stack runs its layers in a child, and they
# have the stack's field `layer`; so have those of the stages of a pipeline.
_STACKS = [(r"\bpipeline/layer/", ""), (r"\brepeat/layer\b", "layer")]
# Children of which their parent's config has another name.
_FIELDS = [
    (r"layer(\d+)", "layer"),
    (r"linear1_\d+", "linear1"),
    (r"i_proj", "input_linear"),
    (r"o_proj", "output_linear"),
    (r"(?:q|k|v|qkv)_proj", "layer"),
]


@dataclasses.dataclass(frozen=True)
class WholeParameter:
    """A parameter that the mesh could split further.

    Attributes:
        path: Its path in the model.
        shape: Its shape, over all devices.
        dtype: The name of its type.
        spec: Its partition spec, an entry a dim.
        axes: The axes along which it is whole, with their sizes.
        num_bytes: Of the part that each device has.
        state_bytes: Of the optimizer's state of the same shape on each device; 0 where that is on the host.
        better_spec: A spec that splits it over these axes, as its layer says it: without the dims that stack layers.
        field: Where in the model's config the spec is set; None: not known.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    spec: tuple[Any, ...]
    axes: Mapping[str, int]
    num_bytes: int
    state_bytes: int
    better_spec: tuple[Any, ...]
    field: Optional[str]

    @property
    def saved_bytes(self) -> int:
        """Bytes that each device would save."""
        kept = (self.num_bytes + self.state_bytes) / math.prod(self.axes.values())
        return self.num_bytes + self.state_bytes - int(kept)

    def what(self) -> str:
        """What is wrong, without a full stop."""
        axes = ", ".join(f"{axis!r} ({size})" for axis, size in self.axes.items())
        state = f" and {format_bytes(self.state_bytes)} of optimizer state" if self.state_bytes else ""
        return (
            f"{' x '.join(map(str, self.shape))} {self.dtype} with spec {self.spec} is whole along {axes}: "
            f"{format_bytes(self.num_bytes)}{state} on each device, {format_bytes(self.saved_bytes)} more than if "
            "split there"
        )

    def advice(self) -> str:
        """What to set."""
        if self.field is None:
            return f"Set param_partition_spec={self.better_spec} in the config of its layer"
        return f'--set "{self.field}={self.better_spec}" splits it'

    def sentence(self, *, where: str) -> str:
        """All of it in a line.

        Args:
            where: The path of the model.
        """
        message = error_message(where=f"{where}/{self.path}", what=self.what(), advice=self.advice())
        return " ".join(message.split("\n  "))


@dataclasses.dataclass(frozen=True)
class WholeParameters:
    """What is whole although the mesh could split it.

    Attributes:
        large: What is worth a line, by what each device would save, most first.
        num_small: The number of the others: norm scales, biases.
        small_bytes: Of the others and their optimizer state on each device.
    """

    large: tuple[WholeParameter, ...]
    num_small: int
    small_bytes: int


def find_whole_parameters(
    state_specs: Any, *, mesh: Mesh, model_cfg: Optional[ConfigBase] = None
) -> WholeParameters:
    """Finds parameters that are whole along an axis over which other parameters are split.

    An axis over which no parameter is split, such as "data", replicates them all, which is what it is for. Where a
    layer asks for an axis and its dim does not divide, `TensorSpec.dropped_axes` tells, and nothing is found here.

    Args:
        state_specs: A `TrainerState` of specs; on its mesh.
        mesh: The mesh.
        model_cfg: The config of the model, where fields are looked up; None: advice names none.
    """
    specs = dict(flatten_items(state_specs.model))
    entries = {path: _entries(spec.sharding.spec, ndim=len(spec.shape)) for path, spec in specs.items()}
    splitting = {axis for dims in entries.values() for dim in dims for axis in dim if mesh.shape[axis] > 1}
    total = sum(math.prod(spec.shape) * np.dtype(spec.dtype).itemsize for spec in specs.values())
    states = _optimizer_states(state_specs.learner, specs=specs, platform=mesh.devices.flat[0].platform)
    large: list[WholeParameter] = []
    small: list[WholeParameter] = []
    for path, spec in specs.items():
        own_spec = _padded(spec.mesh_axes or (), ndim=len(spec.shape))
        asked = {axis for dim in _entries(own_spec, ndim=len(own_spec)) for axis in dim}
        open_axes = [axis for axis in mesh.axis_names if axis in splitting - asked]
        # No layer can say how the layers of its stack are split.
        first_dim = _num_stack_dims(state_specs.model, path)
        dim, axes = _best_split(
            spec.shape, entries[path], first_dim=first_dim, open_axes=open_axes, sizes=mesh.shape
        )
        if not axes:
            continue
        found = WholeParameter(
            path=path,
            shape=tuple(int(size) for size in spec.shape),
            dtype=np.dtype(spec.dtype).name,
            spec=own_spec,
            axes={axis: int(mesh.shape[axis]) for axis in axes},
            num_bytes=shard_bytes(spec),
            state_bytes=states.get(path, 0),
            better_spec=_with_axes(own_spec, dim=dim, axes=axes)[first_dim:],
            field=None
            if model_cfg is None
            else _field_of(path, layer_spec=own_spec[first_dim:], cfg=model_cfg),
        )
        is_small = found.num_bytes < max(_SMALL_BYTES, _SMALL_SHARE * total)
        (small if is_small else large).append(found)
    return WholeParameters(
        large=tuple(sorted(large, key=lambda found: -found.saved_bytes)),
        num_small=len(small),
        small_bytes=sum(found.num_bytes + found.state_bytes for found in small),
    )


def _entries(spec: Any, *, ndim: int) -> list[tuple[str, ...]]:
    """The axes of each dim."""
    named = [(entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in spec]
    return [*named, *[()] * (ndim - len(named))]


def _padded(spec: Any, *, ndim: int) -> tuple[Any, ...]:
    return (*spec, *[None] * (ndim - len(spec)))


def _with_axes(spec: tuple[Any, ...], *, dim: int, axes: Sequence[str]) -> tuple[Any, ...]:
    joined = (*_entries(spec, ndim=len(spec))[dim], *axes)
    return (*spec[:dim], joined[0] if len(joined) == 1 else joined, *spec[dim + 1 :])


def _num_stack_dims(specs: Any, path: str) -> int:
    """How many leading dims of a parameter stack layers: as many as there are `VDict`s around it."""
    num_dims = 0
    for name in path.split("/"):
        num_dims += isinstance(specs, VDict)
        specs = specs[name]
    return num_dims


def _best_split(
    shape: Sequence[int],
    entries: Sequence[tuple[str, ...]],
    *,
    first_dim: int,
    open_axes: Sequence[str],
    sizes: Mapping[str, int],
) -> tuple[int, list[str]]:
    """The dim from `first_dim` on that divides over most devices of more axes, the last of equals, and these axes."""
    best: tuple[int, list[str]] = (first_dim, [])
    for dim in range(first_dim, len(shape)):
        num_shards, axes = math.prod(sizes[axis] for axis in entries[dim]), []
        for axis in open_axes:
            if shape[dim] % (num_shards * sizes[axis]) == 0:
                num_shards *= sizes[axis]
                axes.append(axis)
        if math.prod(sizes[axis] for axis in axes) >= math.prod(sizes[axis] for axis in best[1]):
            best = dim, axes
    return best


def _optimizer_states(learner_specs: Any, *, specs: Mapping[str, Any], platform: str) -> dict[str, int]:
    """Bytes on each device of the optimizer's arrays that are shaped like a parameter, by its path."""
    sizes: dict[str, int] = {}
    for path, leaf in flatten_items(learner_specs):
        parts = path.split("/")
        owner = next((p for i in range(len(parts)) if (p := "/".join(parts[i:])) in specs), None)
        is_there = platform == "cpu" or not is_on_host(leaf)
        if owner is not None and tuple(leaf.shape) == tuple(specs[owner].shape) and is_there:
            sizes[owner] = sizes.get(owner, 0) + shard_bytes(leaf)
    return sizes


def _field_of(path: str, *, layer_spec: tuple[Any, ...], cfg: ConfigBase) -> Optional[str]:
    """The dotted path of the field of a model's config that splits a parameter, where one is found that says so now."""
    for pattern, name in _STACKS:
        path = re.sub(pattern, name, path)
    fields, value = ["model"], cfg
    for name in path.split("/")[:-1]:
        field, value = _child_config(value, name)
        fields.append(field)
    own = getattr(value, "param_partition_spec", None)
    if own is None or _entries(own, ndim=len(own)) != _entries(layer_spec, ndim=len(layer_spec)):
        return None
    return ".".join([*fields, "param_partition_spec"])


def _child_config(cfg: Any, name: str) -> tuple[str, Any]:
    """The field of a config from which a child gets its own, and what is there. None: it is not known."""
    for pattern, field in [(name, name), *_FIELDS]:
        match = re.fullmatch(pattern, name)
        if match is None or not isinstance(cfg, ConfigBase) or field not in cfg:
            continue
        value = getattr(cfg, field)
        if isinstance(value, list | tuple) and match.groups():
            # A config for each layer.
            index = int(match[1])
            field, value = f"{field}[{index}]", value[index]
        if isinstance(value, ConfigBase):
            return field, value
    return name, None
