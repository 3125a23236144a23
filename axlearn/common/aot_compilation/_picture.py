"""A plan as one picture: the mesh, how each parameter lies on it, memory against what there is, and time."""

import math

from axlearn.common.aot_compilation import _svg as svg
from axlearn.common.aot_compilation._plan import (
    ACTIVATIONS,
    BETWEEN_SLICES,
    WITHIN_SLICE,
    Plan,
    PlannedParameter,
)

_GIB = 2**30
_WIDTH, _MARGIN = 1000, 24
_GREEN, _BLUE, _ORANGE, _RED, _GRAY, _PURPLE = (
    "#4c9f70",
    "#4878a8",
    "#e0a030",
    "#c8453c",
    "#c9ccd1",
    "#8667a8",
)
# By the parts of a plan; what is not here is gray.
_PART_COLORS = {"parameters": _BLUE, "optimizer": _PURPLE, ACTIVATIONS: _ORANGE, "program": _GRAY}
# Squares of the mesh that are drawn along an axis; longer axes end in dots.
_MAX_SQUARES = 16


def plan_picture(plan: Plan, *, title: str) -> str:
    """Returns a plan as a picture in SVG.

    Args:
        plan: The plan.
        title: What is planned, such as "fuji-7B-v2-flash on tpu-v5p-512".
    """
    top, shapes = 34.0, [svg.text(_MARGIN, 34, title, size=20, bold=True)]
    for part in (_mesh, _memory, _time, _parameters):
        drawn, height = part(plan, top + 26)
        shapes += drawn
        top += 26 + height
    return svg.picture(shapes, width=_WIDTH, height=top + _MARGIN, title=title)


def _mesh(plan: Plan, top: float) -> tuple[list[str], float]:
    """Slices as boxes, in each its devices in rows along the innermost axis."""
    sizes = {name: size for name, size in plan.mesh_shape.items() if size > 1} or {"one device": 1}
    words = " x ".join(f"{name} {size}" for name, size in sizes.items())
    slices = (
        f" in {plan.num_slices} slices, {', '.join(plan.slice_axes)} across" if plan.num_slices > 1 else ""
    )
    heading = f"{plan.num_devices} devices{slices}: {words}"
    shapes = [svg.text(_MARGIN, top + 12, heading, bold=True)]
    inner_name, inner = list(sizes.items())[-1]
    per_slice = plan.num_devices // plan.num_slices
    rows = max(per_slice // inner, 1)
    shown_slices = min(plan.num_slices, 4)
    width = (_WIDTH - 2 * _MARGIN - 12 * (shown_slices - 1)) / shown_slices
    shown_rows, shown = min(rows, 4), min(inner, per_slice, _MAX_SQUARES if shown_slices < 3 else 8)
    height = 16.0 * shown_rows + 34
    for i in range(shown_slices):
        left = _MARGIN + i * (width + 12)
        shapes.append(svg.rect(left, top + 22, width, height, fill="#f5f6f8", stroke="#9aa0a8"))
        shapes += _devices(left + 8, top + 30, width - 16, rows=shown_rows, columns=shown)
        along = min(inner, per_slice)
        more = f"{rows} rows of {along} along {inner_name}" if rows > 1 else f"{along} along {inner_name}"
        more += f", a box is {along // shown}" if along > shown else ""
        label = f"slice {i}: {more}" if plan.num_slices > 1 else more
        shapes.append(svg.text(left + width / 2, top + 16 + height, label, size=11, anchor="middle"))
    if plan.num_slices > shown_slices:
        shapes.append(
            svg.text(
                _WIDTH - _MARGIN, top + 12, f"and {plan.num_slices - shown_slices} more slices", anchor="end"
            )
        )
    return shapes, height + 26


def _devices(left: float, top: float, width: float, *, rows: int, columns: int) -> list[str]:
    pitch = width / columns
    return [
        svg.rect(left + column * pitch, top + 16 * row, pitch - 3, 12, fill="#8fb4d9")
        for row in range(rows)
        for column in range(columns)
    ]


def _memory(plan: Plan, top: float) -> tuple[list[str], float]:
    """The parts of a device's memory in a row, and a line where the memory ends."""
    verdict = "fits" if plan.fits else "does not fit"
    peak = f"{plan.peak_bytes / _GIB:.1f}" if plan.peak_bytes else "?"
    heading = f"Memory of a device: {peak} GiB at its peak of {plan.memory_bytes / _GIB:g} GiB: it {verdict}"
    shapes = [svg.text(_MARGIN, top + 12, heading, bold=True, fill="#222" if plan.fits else _RED)]
    parts = {name: size for name, size in plan.parts.items() if size}
    scale = (_WIDTH - 2 * _MARGIN) / max(plan.memory_bytes, sum(parts.values()), 1)
    limit = _MARGIN + scale * plan.memory_bytes
    shapes.append(svg.rect(_MARGIN, top + 22, scale * plan.memory_bytes, 30, fill="#eef0f3"))
    left = float(_MARGIN)
    for name, size in parts.items():
        color = _PART_COLORS.get(name, _GRAY)
        shapes.append(
            svg.rect(left, top + 22, scale * size, 30, fill=color, title=f"{name}: {size / _GIB:.3f} GiB")
        )
        left += scale * size
    shapes.append(svg.line(limit, top + 16, limit, top + 58, stroke=_RED, dash="4 2"))
    shapes.append(
        svg.text(limit, top + 70, f"{plan.memory_bytes / _GIB:g} GiB", size=11, fill=_RED, anchor="end")
    )
    shapes += _legend(
        {name: (size / _GIB, _PART_COLORS.get(name, _GRAY)) for name, size in parts.items()}, top + 72
    )
    if plan.host_bytes:
        told = f"and {plan.host_bytes / _GIB:.1f} GiB in the memory of the host"
        shapes.append(svg.text(_WIDTH - _MARGIN, top + 12, told, size=12, anchor="end"))
    return shapes, 78


def _legend(entries: dict[str, tuple[float, str]], y: float, *, unit: str = "GiB") -> list[str]:
    shapes, left = [], float(_MARGIN)
    for name, (value, color) in entries.items():
        # What rounds to nothing is only in the titles.
        if value < 0.005:
            continue
        label = f"{name} {value:.2f} {unit}"
        shapes += [svg.rect(left, y - 10, 11, 11, fill=color), svg.text(left + 16, y, label, size=12)]
        left += 34 + 6.3 * len(label)
    return shapes


def _time(plan: Plan, top: float) -> tuple[list[str], float]:
    """The time of each kind of work as a bar of its own, and the time of a step that they make."""
    step = plan.step_seconds()
    bars = {
        "matrix products and kernels": (plan.compute_seconds, _GREEN),
        "memory": (plan.memory_seconds, _BLUE),
        WITHIN_SLICE: (plan.link_seconds(WITHIN_SLICE), _ORANGE),
        BETWEEN_SLICES: (plan.link_seconds(BETWEEN_SLICES), _RED),
    }
    known = {name: (value, color) for name, (value, color) in bars.items() if value}
    if step is not None:
        mfu = plan.mfu(step.predicted) or 0
        heading = f"Time of a step: {step.predicted:.3g} s predicted (MFU {mfu:.0%}), {step.best:.3g} s if all overlaps"
        heading += ", without transfers to the host" if plan.host_bytes else ""
        longest = max(step.worst, *(value for value, _ in known.values()))
    else:
        heading, longest = "Time of a step: not known", max([1e-9, *(value for value, _ in known.values())])
    shapes = [svg.text(_MARGIN, top + 12, heading, bold=True)]
    left, y = _MARGIN + 200.0, top + 22
    scale = (_WIDTH - _MARGIN - 70 - left) / longest
    for name, (value, color) in known.items():
        shapes += [
            svg.text(left - 8, y + 12, name, size=12, anchor="end"),
            svg.rect(left, y, scale * value, 15, fill=color),
            svg.text(left + scale * value + 6, y + 12, f"{value:.3g} s", size=12),
        ]
        y += 20
    if step is not None:
        at = left + scale * step.predicted
        shapes.append(svg.line(at, top + 18, at, y + 2, dash="4 2"))
        shapes.append(svg.text(at, y + 14, "predicted", size=11, anchor="middle"))
        y += 14
    return shapes, y - top


def _parameters(plan: Plan, top: float) -> tuple[list[str], float]:
    """A row for each parameter: its dims, which axes split them, and what a device has of it."""
    heading = f"{plan.num_params / 1e9:.3g} billion parameters, and what each device has of them"
    shapes = [svg.text(_MARGIN, top + 12, heading, bold=True)]
    if plan.whole:
        told = f"red: could be split further ({len(plan.whole)})"
        shapes.append(svg.text(_WIDTH - _MARGIN, top + 12, told, size=12, fill=_RED, anchor="end"))
    largest = max((x.num_bytes for x in plan.parameters), default=1)
    y = top + 22
    for parameter in plan.parameters:
        color = _RED if parameter.path in plan.whole else _BLUE
        width = 150 * math.sqrt(parameter.num_bytes / largest)
        told = _size(parameter.num_bytes)
        told += f", 1 of {parameter.num_parts} parts" if parameter.num_parts > 1 else ", whole"
        shapes += [
            svg.text(
                _MARGIN, y + 11, _short(parameter.path), size=11, fill=color if color == _RED else "#222"
            ),
            svg.text(430, y + 11, _dims(parameter), size=11),
            svg.rect(670, y + 1, max(width, 1), 11, fill=color, title=f"{parameter.path}: {told}"),
            svg.text(_WIDTH - _MARGIN, y + 11, told, size=11, anchor="end"),
        ]
        y += 17
    return shapes, y - top


def _short(path: str) -> str:
    """A path without what is the same in all layers of a stack."""
    return path.replace("transformer/repeat/layer/", "layer/").removeprefix("decoder/")


def _dims(parameter: PlannedParameter) -> str:
    """Such as "32 x 11008 x 4096 / fsdp"."""
    names = ["".join(f" / {axis}" for axis in axes) for axes in parameter.spec]
    return " x ".join(f"{dim}{name}" for dim, name in zip(parameter.shape, names, strict=True))


def _size(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.2f} GiB" if num_bytes >= _GIB // 10 else f"{num_bytes / 2**20:.2f} MiB"
