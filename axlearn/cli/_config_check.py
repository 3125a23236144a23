"""`axlearn config check`: what is wrong with a config, found out without its machine."""

import argparse
import math
import re
from collections.abc import Iterator
from typing import Any

import jax

from axlearn.cli._config_source import Options, Source, Subject, find, load, parse_source
from axlearn.cli._config_terminal import Styled, print_json, print_lines
from axlearn.common.config import error_message
from axlearn.common.config_check import (
    CheckReport,
    Finding,
    Severity,
    check_config,
    fact_lines,
    finding_line,
    summary,
    with_findings,
)
from axlearn.common.machines import machine_of, usual_names
from axlearn.common.promises import broken_promises
from axlearn.common.trainer import find_mesh_rule
from axlearn.common.user_errors import error_text, is_for_users

OK, NOT_OK = 0, 1
_STYLES = {Severity.ERROR: "bold red", Severity.WARNING: "yellow", Severity.NOTE: "dim"}


def run(args: argparse.Namespace, options: Options) -> int:
    """Prints what is wrong with a config.

    Returns:
        0 if there is no error, 1 if there is one.
    """
    # A GPU that is here is none of the check's business, and somebody else may be using it.
    jax.config.update("jax_platforms", "cpu")
    source = parse_source(args.source, options)
    if args.all_rules:
        reports = list(_reports_of_rules(source, options))
    else:
        reports = [_check(source, options)]
    if args.json:
        print_json({"checks": [_json_report(report) for report in reports]})
    else:
        for report in reports:
            print_lines(_lines(report, with_facts=not args.all_rules))
    return OK if all(report.is_ok for report in reports) else NOT_OK


def _check(source: Source, options: Options) -> CheckReport:
    """Checks a config; what its mesh rule or an override cannot be applied to is an error that is raised."""
    subject = load(source, options)
    report = check_config(subject.cfg, name=source.label, mesh_selector=source.mesh_selector)
    return with_findings(report, _promises(subject, options))


def _promises(subject: Subject, options: Options) -> list[Finding]:
    """What the recipe's name says and the config is not."""
    if subject.recipe is None:
        return []
    broken = broken_promises(
        subject.recipe,
        subject.cfg,
        mesh_selector=subject.source.mesh_selector,
        data_dir=options.data_dir,
    )
    return [Finding(Severity.WARNING, "", promise.message) for promise in broken]


def _reports_of_rules(source: Source, options: Options) -> Iterator[CheckReport]:
    """Checks a recipe for a machine of each of its mesh rules.

    Raises:
        ValueError: If there are no rules, or a machine is named.
    """
    cfg, _ = find(source, options)
    if source.mesh_selector or not cfg.mesh_rules:
        raise ValueError(
            error_message(
                where="--all_rules",
                what="a machine is named" if source.mesh_selector else f"{source.base} has no mesh rules",
                expected="a recipe with mesh rules, and no --mesh_selector",
            )
        )
    for i, (pattern, _) in enumerate(cfg.mesh_rules):
        yield _report_of_rule(source, options, cfg=cfg, index=i, pattern=pattern)


def _report_of_rule(source: Source, options: Options, *, cfg: Any, index: int, pattern: str) -> CheckReport:
    """Checks a recipe for the smallest usual machine of a rule that will do; if none will, for the largest."""
    names = [name for name in usual_names() if re.fullmatch(pattern, name)]
    names = [name for name in names if find_mesh_rule(cfg, mesh_selector=name).index == index]
    if not names and re.fullmatch(pattern, pattern):
        # A name of somebody's own.
        names = [pattern]
    label = f"{source.base}@mesh_rules[{index}] ({pattern!r})"
    if not names:
        note = Finding(
            Severity.NOTE, f"mesh_rules[{index}]", f"no machine that is known here matches {pattern!r}"
        )
        return CheckReport(label, None, 0, findings=(note,))
    try:
        # What the rule does is the same on all of its machines.
        subject = load(source._replace(mesh_selector=names[0]), options)
    except Exception as e:
        if not is_for_users(e):
            raise
        return CheckReport(label, None, 0, findings=(Finding(Severity.ERROR, "", error_text(e)),))
    name = _smallest_that_will_do(names, subject.cfg)
    subject = subject._replace(source=source._replace(mesh_selector=name))
    report = check_config(subject.cfg, name=subject.source.label, mesh_selector=name)
    return with_findings(report, _promises(subject, options))


def _smallest_that_will_do(names: list[str], cfg: Any) -> str:
    """The smallest machine on which a config has no error, as far as a check goes that takes little time."""
    for name in sorted(names, key=_size) if len(names) > 1 else []:
        if check_config(cfg, name=name, mesh_selector=name, trace_step=False).is_ok:
            return name
    return max(names, key=_size) if len(names) > 1 else names[0]


def _size(name: str) -> tuple[int, int, int]:
    machine = machine_of(name)
    return machine.num_devices, machine.num_slices, machine.memory_bytes


def _lines(report: CheckReport, *, with_facts: bool) -> Iterator[Styled]:
    facts = fact_lines(report) if with_facts else []
    yield from (Styled(line) for line in [*facts, *([""] if facts else [])])
    for finding in report.findings:
        is_known = not with_facts and finding.severity is Severity.NOTE
        if not is_known:
            yield Styled(finding_line(finding), _STYLES[finding.severity])
    yield Styled(summary(report), "bold" if report.is_ok else "bold red")


def _json_report(report: CheckReport) -> dict[str, Any]:
    machine, flops, needs = report.machine, report.flops_per_token, report.needs
    return {
        "config": report.name,
        "is_ok": report.is_ok,
        "machine": None if machine is None else machine._asdict(),
        "num_devices": report.num_devices,
        "mesh": dict(report.mesh),
        "num_parameters": report.num_parameters,
        "parameters": dict(report.parameters),
        "flops_per_token": None if flops is None else flops._asdict(),
        "tokens_per_step": report.tokens_per_step,
        "max_step": report.max_step if math.isfinite(report.max_step) else None,
        "bytes_per_device": None if needs is None else needs.parts(),
        "checkpoint_bytes": report.checkpoint_bytes,
        "findings": [
            {"severity": finding.severity.value, "path": finding.path, "message": finding.message}
            for finding in report.findings
        ],
    }
