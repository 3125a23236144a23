"""A plan as text for people."""

from typing import Optional

from axlearn.common.aot_compilation._plan import BETWEEN_SLICES, WITHIN_SLICE, Plan

_GIB = 2**30
# What a bar of the memory has at most, in characters.
_BAR_WIDTH = 40


def plan_text(plan: Plan) -> str:
    """Returns memory, work, traffic, times and a verdict of a plan, a line each."""
    return "\n".join([*_head(plan), *_memory(plan), *_work(plan), *_times(plan), *_verdict(plan)])


def _head(plan: Plan) -> list[str]:
    mesh = ", ".join(f"{name}={size}" for name, size in plan.mesh_shape.items() if size > 1) or "one device"
    slices = f" in {plan.num_slices} slices" if plan.num_slices > 1 else ""
    across = f" ({', '.join(plan.slice_axes)} from slice to slice)" if plan.slice_axes else ""
    return [
        f"{plan.machine}: {plan.num_devices} devices{slices}, mesh {mesh}{across}",
        f"{plan.num_params / 1e9:.3g} billion parameters, {plan.tokens:,} tokens a step",
    ]


def _memory(plan: Plan) -> list[str]:
    peak_name = "peak, by the compiler"
    width = max(map(len, [*plan.parts, peak_name]))
    lines = [
        f"  {name:<{width}} {size / _GIB:9.3f} GiB {_bar(size / plan.memory_bytes)}".rstrip()
        for name, size in plan.parts.items()
    ]
    share = plan.peak_bytes / plan.memory_bytes
    peak = f"{plan.peak_bytes / _GIB:9.3f} GiB of {plan.memory_bytes / _GIB:g} GiB ({share:.0%})"
    lines.append(f"  {peak_name:<{width}} {peak if plan.peak_bytes else '  not known'}")
    if plan.host_bytes:
        lines.append(f"  {'on the host':<{width}} {plan.host_bytes / _GIB:9.3f} GiB")
    return ["Memory of each device:", *lines]


def _bar(share: float) -> str:
    return "#" * max(0, min(_BAR_WIDTH, round(share * _BAR_WIDTH)))


def _work(plan: Plan) -> list[str]:
    moved = f", {(plan.product_bytes + plan.other_bytes) / 1e9:.4g} GB to and from memory"
    moved += f" ({plan.other_bytes / 1e9:.4g} GB of it without a product)"
    lines = [
        "Work of each device in a step:",
        f"  {plan.flops / plan.num_devices / 1e12:.4g} TFLOP ({plan.flops / plan.model_flops:.2f} x the model's own)"
        + ("" if plan.failure else moved),
    ]
    for row in plan.traffic:
        lines.append(
            f"  {row.kind} over {', '.join(row.axes)}: {row.count} times, {row.sent_bytes / 1e9:.4g} GB sent, "
            f"{row.link}{_seconds(row.seconds, before=', ')}{', overlaps' if row.overlaps else ''}"
        )
    return lines


def _times(plan: Plan) -> list[str]:
    lines = [
        "Time of a step, each at the vendor's full rate:",
        f"  compute {_seconds(plan.compute_seconds)}, memory {_seconds(plan.memory_seconds)}, "
        f"{WITHIN_SLICE} {_seconds(plan.link_seconds(WITHIN_SLICE))}, "
        f"{BETWEEN_SLICES} {_seconds(plan.link_seconds(BETWEEN_SLICES))}",
    ]
    if plan.failure:
        return [lines[0], f"  compute {_seconds(plan.compute_seconds)}; the rest takes a program"]
    step = plan.step_seconds()
    if step is not None:
        lines += [
            f"  predicted: {_with_mfu(plan, step.predicted)}, as the program is written",
            f"  {_with_mfu(plan, step.best)} if everything overlaps, {_with_mfu(plan, step.worst)} if no "
            "communication does",
        ]
        if plan.host_bytes:
            lines.append("  transfers to and from the host are not counted in any of these")
    return lines


def _with_mfu(plan: Plan, seconds: float) -> str:
    return f"{seconds:.3g} s (MFU {plan.mfu(seconds) or 0:.0%})"


def _seconds(value: Optional[float], *, before: str = "") -> str:
    return f"{before}not known" if value is None else f"{before}{value:.3g} s"


def _verdict(plan: Plan) -> list[str]:
    if plan.fits:
        return ["It fits."]
    if plan.failure:
        verdict = f"It does not compile: {plan.failure}."
    else:
        verdict = f"It does not fit: {(plan.peak_bytes - plan.memory_bytes) / _GIB:.3g} GiB too much."
    return [verdict, *(f"  {line}" for line in plan.advice)]
