"""A report as text: plain lines, the same for the same findings."""

import math
from collections.abc import Mapping, Sequence

from axlearn.common.config_check._check import CheckReport
from axlearn.common.config_check._findings import Finding, Severity
from axlearn.common.trainer import format_bytes


def report_text(report: CheckReport) -> str:
    """Returns a report as text, without a final newline."""
    return "\n".join([*fact_lines(report), *([""] if report.needs else []), *finding_lines(report)])


def fact_lines(report: CheckReport) -> list[str]:
    """Returns what a config comes to; nothing where it could not be built."""
    if report.needs is None:
        return []
    lines = [("Machine", _machine(report)), ("Mesh", _mesh(report))]
    lines += [("Parameters", f"{report.num_parameters:,}"), *_rows(report.parameters)]
    if report.flops_per_token is not None:
        full, causal = report.flops_per_token
        lines.append(
            ("Operations", f"{full:.4g} FLOPs per token with full attention, {causal:.4g} with causal")
        )
    if report.tokens_per_step is not None:
        lines.append(("Tokens", _tokens(report, report.tokens_per_step)))
    there = "" if report.machine is None else f" of {format_bytes(report.machine.memory_bytes)}"
    lines.append(("Memory", f"{format_bytes(report.needs.total)}{there} per device, without activations"))
    lines += [(f"  {part}", format_bytes(size)) for part, size in report.needs.parts().items()]
    if report.checkpoint_bytes is not None:
        lines.append(("Checkpoint", format_bytes(report.checkpoint_bytes)))
    width = max(len(name) for name, _ in lines)
    return [f"{name:<{width}}  {text}" for name, text in lines]


def finding_lines(report: CheckReport) -> list[str]:
    """Returns the findings and, in the last line, how many there are of which kind."""
    return [*(finding_line(finding) for finding in report.findings), summary(report)]


def finding_line(finding: Finding) -> str:
    """Returns a finding as text; its further lines are indented."""
    where = f"{finding.path}: " if finding.path else ""
    text = f"{finding.severity.value}: {where}{finding.message}"
    return text if text.endswith((".", "?")) else f"{text}."


def summary(report: CheckReport) -> str:
    """Returns how many findings there are, in a line."""
    counts = [_count(report.of(severity), severity.value) for severity in Severity]
    return f"{report.name}: {', '.join(counts[:2])}" + (f", {counts[2]}" if report.of(Severity.NOTE) else "")


def _count(found: Sequence[Finding], what: str) -> str:
    return f"{len(found) or 'no'} {what}{'' if len(found) == 1 else 's'}"


def _machine(report: CheckReport) -> str:
    machine = report.machine
    if machine is None:
        plural = "" if report.num_devices == 1 else "s"
        return f"none in particular; the mesh takes at least {report.num_devices} device{plural}"
    slices = f" in {machine.num_slices} slices" if machine.num_slices > 1 else ""
    memory = format_bytes(machine.memory_bytes)
    return f"{machine.name}: {report.num_devices} x {machine.device_kind} of {memory}{slices}"


def _mesh(report: CheckReport) -> str:
    split = [f"{axis}={size}" for axis, size in report.mesh.items() if size > 1]
    whole = [axis for axis, size in report.mesh.items() if size == 1]
    return "; ".join(part for part in (", ".join(split), f"{', '.join(whole)}: 1" if whole else "") if part)


def _rows(parameters: Mapping[str, int]) -> list[tuple[str, str]]:
    return [(f"  {part}", f"{size:,}") for part, size in parameters.items()]


def _tokens(report: CheckReport, per_step: int) -> str:
    if not math.isfinite(report.max_step):
        return f"{per_step:,} per step"
    return f"{per_step:,} per step, {per_step * report.max_step:,.0f} in {report.max_step:,} steps"
