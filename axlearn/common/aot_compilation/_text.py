"""A plan as text for people."""

from typing import Optional

from axlearn.common.aot_compilation._plan import BETWEEN_SLICES, WITHIN_SLICE, Plan

_GIB = 2**30


def plan_text(plan: Plan) -> str:
    """Returns memory, work, traffic, times and a verdict of a plan, a line each."""
    return "\n".join([*_head(plan), *_memory(plan), *_work(plan), *_times(plan), *_verdict(plan)])


def _head(plan: Plan) -> list[str]:
    mesh = ", ".join(f"{name}={size}" for name, size in plan.mesh_shape.items() if size > 1) or "one device"
    return [
        f"{plan.machine}: {plan.num_devices} devices, mesh {mesh}",
        f"{plan.num_params / 1e9:.3g} billion parameters, {plan.tokens:,} tokens a step",
    ]


def _memory(plan: Plan) -> list[str]:
    width = max(map(len, plan.parts))
    lines = [
        f"  {name:<{width}} {size / _GIB:9.3f} GiB {_bar(size / plan.memory_bytes)}"
        for name, size in plan.parts.items()
    ]
    share = plan.peak_bytes / plan.memory_bytes
    return [
        "Memory of each device:",
        *lines,
        f"  {'peak, by the compiler':<{width}} {plan.peak_bytes / _GIB:9.3f} GiB of {plan.memory_bytes / _GIB:g} GiB "
        f"({share:.0%})",
    ]


def _bar(share: float, *, width: int = 40) -> str:
    return "#" * max(0, min(width, round(share * width)))


def _work(plan: Plan) -> list[str]:
    lines = [
        "Work of each device in a step:",
        f"  {plan.flops / plan.num_devices / 1e12:.4g} TFLOP ({plan.flops / plan.model_flops:.2f} x the model's own), "
        f"{plan.accessed_bytes / 1e9:.4g} GB to and from memory",
    ]
    for row in plan.traffic:
        lines.append(
            f"  {row.kind} over {', '.join(row.axes)}: {row.count} times, {row.sent_bytes / 1e9:.4g} GB sent, "
            f"{row.link}{_seconds(row.seconds, before=', ')}"
        )
    return lines


def _times(plan: Plan) -> list[str]:
    bounds = plan.step_seconds()
    lines = [
        "Time of a step, each at the vendor's full rate:",
        f"  compute {_seconds(plan.compute_seconds)}, memory {_seconds(plan.memory_seconds)}, "
        f"{WITHIN_SLICE} {_seconds(plan.link_seconds(WITHIN_SLICE))}, "
        f"{BETWEEN_SLICES} {_seconds(plan.link_seconds(BETWEEN_SLICES))}",
    ]
    if bounds is not None and plan.compute_seconds:
        busy = plan.model_flops / plan.flops * plan.compute_seconds
        best, worst = bounds
        lines.append(
            f"  {best:.3g} s if everything overlaps (MFU {busy / best:.0%}), {worst:.3g} s if no communication "
            f"does (MFU {busy / worst:.0%})"
        )
    return lines


def _seconds(value: Optional[float], *, before: str = "") -> str:
    return f"{before}not known" if value is None else f"{before}{value:.3g} s"


def _verdict(plan: Plan) -> list[str]:
    if plan.fits:
        return ["It fits."]
    missing = plan.peak_bytes - plan.memory_bytes
    temporary = plan.parts["activations and temporaries"]
    if temporary > plan.peak_bytes / 2:
        advice = (
            "Activations take most: save less (remat_spec, or offload), accumulate gradients over more "
            "micro-batches, or split rows or positions over more devices."
        )
    else:
        advice = (
            "The state takes most: split it over more devices (fsdp or model), or keep the optimizer's state on "
            "the host (offload_optimizer)."
        )
    return [f"It does not fit: {missing / _GIB:.3g} GiB too much. {advice}"]
