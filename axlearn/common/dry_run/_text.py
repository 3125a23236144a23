"""A dry run as text: plain lines, the same for the same findings."""

import re
from collections.abc import Sequence
from typing import Optional

from axlearn.common.dry_run._report import ArrayRow, DryRun
from axlearn.common.trainer import WholeParameter, array_bytes, format_bytes

_LAYER = re.compile(r"\blayer(\d+)\b")


def dry_run_text(report: DryRun) -> str:
    """Returns a dry run as text, without a final newline.

    Args:
        report: What was found.
    """
    sections = [
        [f"Dry run of {report.name}: nothing is run, read or written.", "", *_mesh_lines(report)],
        ["Parameters", *_parameter_lines(report)],
        *([["Whole where it could be split", *_whole_lines(report)]] if report.whole.large else []),
        ["Batch", *_table(_array_cells(report.batch))],
        ["Operations of training", *_flops_lines(report)],
        ["Memory per device", *_memory_lines(report)],
    ]
    if report.compiled is not None:
        sections.append(["Memory per device, by the compiler", *_compiled_lines(report)])
    sections.append([_verdict(report)])
    return "\n\n".join("\n".join(lines) for lines in sections)


def _mesh_lines(report: DryRun) -> list[str]:
    split = [f"{name}={size}" for name, size in report.mesh.items() if size > 1]
    whole = [name for name, size in report.mesh.items() if size == 1]
    parts = [", ".join(split)] if split else []
    if whole:
        parts.append(f"{', '.join(whole)}: 1")
    return [f"Devices: {report.devices}", f"Mesh:    {'; '.join(parts)}"]


def _parameter_lines(report: DryRun) -> list[str]:
    total = sum(array_bytes(row.shape, row.dtype) for row in report.parameters)
    per_device = sum(row.bytes_per_device for row in report.parameters)
    lines = _table(_array_cells(_without_repetition(report.parameters)))
    summary = (
        f"  {report.num_parameters:,} parameters in all, {format_bytes(total)}; per device "
        f"{format_bytes(per_device)}."
    )
    dropped = sorted({axis for row in report.parameters for axis in row.dropped})
    if not dropped:
        return [*lines, summary]
    return [
        *lines,
        summary,
        f"  (not {', '.join(dropped)}: does not divide the dimension, which stays whole.)",
    ]


def _whole_lines(report: DryRun) -> list[str]:
    """What each device would save, of what, and how; the rest in a line."""
    lines = [line for found in report.whole.large for line in _whole_parameter(found)]
    if report.whole.num_small:
        small = format_bytes(report.whole.small_bytes)
        lines.append(f"  Besides {report.whole.num_small} small ones, {small} on each device.")
    return lines


def _whole_parameter(found: WholeParameter) -> list[str]:
    return [f"  {found.path}: {found.what()}.", f"    {found.advice()}."]


def _array_cells(rows: Sequence[ArrayRow]) -> list[list[str]]:
    header = ["path", "shape", "dtype", "split over", "per device"]
    return [header, *(_cells(row) for row in rows)]


def _cells(row: ArrayRow) -> list[str]:
    return [
        row.path,
        " x ".join(map(str, row.shape)) or "scalar",
        row.dtype,
        _axes_text(row),
        format_bytes(row.bytes_per_device),
    ]


def _axes_text(row: ArrayRow) -> str:
    """For each dimension its axes; only "-" where the array is whole."""
    entries = ["+".join(entry) or "-" for entry in row.axes]
    text = " x ".join(entries) if any(row.axes) else "-"
    return f"{text} (not {', '.join(row.dropped)})" if row.dropped else text


def _without_repetition(rows: Sequence[ArrayRow]) -> list[ArrayRow]:
    """Makes one line of the same array of layers that are numbered: layer0 to layer79."""
    groups: dict[tuple[object, ...], list[ArrayRow]] = {}
    for row in rows:
        key = (_LAYER.sub("layer*", row.path), row.shape, row.dtype, row.axes, row.dropped)
        groups.setdefault(key, []).append(row)
    return [_as_one(group) for group in groups.values()]


def _as_one(group: list[ArrayRow]) -> ArrayRow:
    first = group[0]
    if len(group) == 1:
        return first
    return ArrayRow(
        path=f"{_LAYER.sub('layer*', first.path)} ({len(group)} of them)",
        shape=first.shape,
        dtype=first.dtype,
        axes=first.axes,
        dropped=first.dropped,
        bytes_per_device=sum(row.bytes_per_device for row in group),
    )


def _flops_lines(report: DryRun) -> list[str]:
    flops, tokens = report.flops_per_token, report.tokens_per_step
    if flops is None or tokens is None:
        return ["  The model does not tell."]
    rows = [
        ["FLOPs", "per token", f"per step of {tokens:,} tokens"],
        ["full attention", f"{flops.full:.4g}", f"{flops.full * tokens:.4g}"],
        ["causal attention", f"{flops.causal:.4g}", f"{flops.causal * tokens:.4g}"],
    ]
    return _table(rows, right_from=1)


# What the parts of the memory are, where the name does not say it.
_NOTES = {
    "gradients": "one per parameter that is optimized, in the type of its computation",
    "activations": "an estimate: what else the step holds at its peak, by walking through its traced program",
}


def _memory_lines(report: DryRun) -> list[str]:
    rows = [[name, format_bytes(size), _NOTES.get(name, "")] for name, size in report.needs.parts().items()]
    rows.append(["needed", format_bytes(report.needs.total), "the sum"])
    rows.append(_there_cells(report))
    return _table(rows, right_from=1, right_to=2)


def _there_cells(report: DryRun) -> list[str]:
    there = report.there
    return (
        ["there", "?", "unknown"] if there is None else ["there", format_bytes(there.num_bytes), there.source]
    )


def _compiled_lines(report: DryRun) -> list[str]:
    compiled = report.compiled
    assert compiled is not None
    needs = report.needs
    known = sum(needs.state.values()) + needs.batch
    rows = [
        ["", "compiler", "estimate"],
        ["state and batch", format_bytes(compiled.arguments), format_bytes(known)],
        ["temporary", format_bytes(compiled.temporary), format_bytes(needs.total - known)],
        ["new outputs", format_bytes(compiled.outputs - compiled.aliased), ""],
        ["code", format_bytes(compiled.code), ""],
        ["in all", format_bytes(compiled.total), format_bytes(needs.total)],
    ]
    return _table(rows, right_from=1)


def _verdict(report: DryRun) -> str:
    needed = format_bytes(report.needed_bytes)
    if report.there is None:
        return f"Whether {needed} per device fit is not known: these devices do not tell how much they have."
    there = format_bytes(report.there.num_bytes)
    word = "fits" if report.fits else "does not fit"
    return f"It {word}: {needed} of {there} per device."


def _table(
    rows: Sequence[Sequence[str]], *, right_from: int = 4, right_to: Optional[int] = None
) -> list[str]:
    """Aligns columns; those from `right_from` on, up to `right_to`, on the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    right = range(right_from, len(widths) if right_to is None else right_to)
    return [
        "  "
        + "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
