"""A trainer built as shapes alone, for a machine that need not be there, and what is to be said about it."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Optional

import jax

from axlearn.common.config import REQUIRED, InstantiableConfig
from axlearn.common.config_check._devices import devices_of, least_devices_for
from axlearn.common.config_check._findings import (
    Finding,
    Severity,
    findings_of_config,
    vocabulary_sizes,
)
from axlearn.common.dry_run import silence
from axlearn.common.flops import FlopsPerToken
from axlearn.common.input_base import Input
from axlearn.common.machines import Machine, machine_of
from axlearn.common.trainer import MemoryNeeds, SpmdTrainer, array_bytes, format_bytes
from axlearn.common.user_errors import error_text, is_for_users
from axlearn.common.utils import flatten_items

# How deep the table of parameters looks: decoder/transformer.
_PART_DEPTH = 2


@dataclasses.dataclass(frozen=True)
class CheckReport:
    """What was found out about a trainer config.

    Attributes:
        name: What it was called.
        machine: The machine that it was checked for; None: no particular one.
        num_devices: Of the machine, or as many as the mesh takes at the least.
        findings: What is wrong with it, errors first. What follows is None or empty where it could not be built.
        mesh: The size of each mesh axis by its name.
        parameters: How many parameters each part of the model has, by its path.
        flops_per_token: Of training; None where the model does not tell.
        tokens_per_step: Positions of a batch, padding included; None where the batch has no tokens.
        max_step: The steps of the run; infinity where the data decides.
        needs: Bytes per device, activations not among them.
        checkpoint_bytes: Bytes of the state over all devices, which is what a checkpoint has.
    """

    name: str
    machine: Optional[Machine]
    num_devices: int
    findings: tuple[Finding, ...] = ()
    mesh: Mapping[str, int] = dataclasses.field(default_factory=dict)
    parameters: Mapping[str, int] = dataclasses.field(default_factory=dict)
    flops_per_token: Optional[FlopsPerToken] = None
    tokens_per_step: Optional[int] = None
    max_step: float = math.inf
    needs: Optional[MemoryNeeds] = None
    checkpoint_bytes: Optional[int] = None

    @property
    def num_parameters(self) -> int:
        """The number of the model's parameters."""
        return sum(self.parameters.values())

    def of(self, severity: Severity) -> list[Finding]:
        """The findings of a severity."""
        return [finding for finding in self.findings if finding.severity is severity]

    @property
    def is_ok(self) -> bool:
        """Whether there is no error."""
        return not self.of(Severity.ERROR)


def check_config(
    cfg: InstantiableConfig, *, name: str, mesh_selector: Optional[str] = None, trace_step: bool = True
) -> CheckReport:
    """Builds a trainer as shapes alone, traces its step, and looks for mistakes. Takes no device and opens no data.

    Args:
        cfg: A trainer config, after mesh rule and overrides; it is not changed.
        name: What to call it.
        mesh_selector: The machine; its devices need not be there. None, or a name that is not known here: as many
            devices as the mesh takes at the least.
        trace_step: Whether to trace the step: it takes half a second, and finds what layers refuse only when called.
    """
    cfg = _completed(cfg)
    findings: list[Finding] = []
    machine = _machine(mesh_selector, findings)
    devices = least_devices_for(cfg.mesh_shape) if machine is None else devices_of(machine)
    report = CheckReport(name, machine, len(devices), max_step=cfg.max_step)
    with silence():
        try:
            trainer = cfg.instantiate(parent=None, devices=devices)
            if trace_step:
                trainer.programs.trace_train_step()
        except Exception as e:
            if not is_for_users(e):
                raise
            findings.append(Finding(Severity.ERROR, "", error_text(e)))
        else:
            report = dataclasses.replace(report, **_facts(trainer))
            findings += _findings_of_trainer(trainer, cfg, machine)
    return with_findings(report, [*findings, *findings_of_config(cfg)])


def with_findings(report: CheckReport, findings: Sequence[Finding]) -> CheckReport:
    """Returns a report with more findings; errors come first."""
    order = list(Severity)
    found = sorted([*report.findings, *findings], key=lambda finding: order.index(finding.severity))
    return dataclasses.replace(report, findings=tuple(found))


def _completed(cfg: InstantiableConfig) -> Any:
    """A copy with what a start fills in."""
    cfg = cfg.clone()
    if cfg.dir is REQUIRED:
        cfg.dir = "runs/check"
    if cfg.mesh_axis_names is REQUIRED:
        cfg.mesh_axis_names = ("data", "model")
    if cfg.mesh_shape is REQUIRED or cfg.mesh_shape is None:
        cfg.mesh_shape = (-1, *(1 for _ in cfg.mesh_axis_names[1:]))
    return cfg


def _machine(mesh_selector: Optional[str], findings: list[Finding]) -> Optional[Machine]:
    if not mesh_selector:
        return None
    try:
        return machine_of(mesh_selector)
    except ValueError as e:
        message = f"{e}\n  Checked for as many devices as the mesh takes at the least."
        findings.append(Finding(Severity.NOTE, "mesh_selector", message.partition(": ")[2]))
        return None


def _facts(trainer: SpmdTrainer) -> dict[str, Any]:
    programs = trainer.programs
    parameters: dict[str, int] = {}
    for path, spec in flatten_items(programs.state_specs.model):
        part = "/".join(path.split("/")[:_PART_DEPTH])
        parameters[part] = parameters.get(part, 0) + math.prod(spec.shape)
    input_ids = dict(flatten_items(programs.batch_specs())).get("input_ids")
    flops_fn = getattr(trainer.model, "flops_per_token", None)
    with trainer.mesh() as mesh:
        sizes = {str(axis): int(size) for axis, size in mesh.shape.items()}
    return {
        "mesh": sizes,
        "parameters": parameters,
        "flops_per_token": None if input_ids is None or flops_fn is None else flops_fn(input_ids.shape[-1]),
        "tokens_per_step": None if input_ids is None else math.prod(input_ids.shape),
        "needs": programs.memory_needs(),
        "checkpoint_bytes": sum(
            array_bytes(tuple(leaf.shape), leaf.dtype) for leaf in jax.tree.leaves(programs.state_specs)
        ),
    }


def _findings_of_trainer(trainer: SpmdTrainer, cfg: Any, machine: Optional[Machine]) -> Iterator[Finding]:
    yield from _memory(trainer, cfg, machine)
    yield from _replicated(trainer)
    yield from _whole(trainer)
    inputs = {
        "input": trainer.input,
        **{f"evalers[{k!r}].input": v.input for k, v in trainer.evalers.items()},
    }
    for path, data in inputs.items():
        yield from _rows(trainer, data, path)
    yield from _vocabularies(trainer, inputs)


def _memory(trainer: SpmdTrainer, cfg: Any, machine: Optional[Machine]) -> Iterator[Finding]:
    if machine is None:
        return
    needed = trainer.programs.memory_needs().total
    if needed > machine.memory_bytes:
        is_refused = cfg.check_memory is not False
        yield Finding(
            Severity.ERROR if is_refused else Severity.WARNING,
            "mesh_shape",
            f"each device needs {format_bytes(needed)} without activations, and {machine.device_kind} has "
            f"{format_bytes(machine.memory_bytes)}",
        )


def _replicated(trainer: SpmdTrainer) -> Iterator[Finding]:
    """Parameters that lie on more devices than their layers ask for."""
    with trainer.mesh() as mesh:
        for path, spec in flatten_items(trainer.programs.state_specs.model):
            shard = array_bytes(spec.sharding.shard_shape(tuple(spec.shape)), spec.dtype)
            for dropped in spec.dropped_axes:
                times = math.prod(mesh.shape[axis] for axis in dropped.axes)
                if times == 1:
                    continue
                yield Finding(
                    Severity.WARNING,
                    f"model/{path}",
                    f"{dropped}: {format_bytes(shard)} per device, {times} times what was meant",
                )


def _whole(trainer: SpmdTrainer) -> Iterator[Finding]:
    """Large parameters that no layer asks to split along an axis that splits others."""
    for found in trainer.programs.whole_parameters().large:
        yield Finding(Severity.WARNING, f"model/{found.path}", f"{found.what()}. {found.advice()}")


def _rows(trainer: SpmdTrainer, data: Input, path: str) -> Iterator[Finding]:
    """Rows of a batch that do not divide over the devices; of the training data the trainer itself refuses them."""
    if path == "input":
        yield from _padding(trainer, data)
        return
    with trainer.mesh() as mesh:
        spec = data.partition_spec
        axes = spec[0] if len(spec) else ()
        num_shards = math.prod(
            mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ())
        )
        rows = {x.shape[0] for x in data.element_spec().values() if len(x.shape)}
    for num_rows in sorted(rows):
        if num_rows % num_shards:
            message = f"a batch of {num_rows} rows does not divide over the {num_shards} shards of {axes}"
            yield Finding(Severity.ERROR, path, message)


def _padding(trainer: SpmdTrainer, data: Input) -> Iterator[Finding]:
    """Rows that a training batch has only for it to divide over the devices, each at the cost of one with data."""
    dispatcher = getattr(data, "input_dispatcher", None)
    rows = getattr(getattr(dispatcher, "config", None), "global_logical_batch_size", None)
    specs = flatten_items(trainer.programs.batch_specs())
    num_physical = max((spec.shape[0] for _, spec in specs if len(spec.shape)), default=0)
    if isinstance(rows, int) and num_physical > rows:
        yield Finding(
            Severity.WARNING,
            "input.input_dispatcher.global_logical_batch_size",
            f"{rows:,} rows do not divide over the devices: {num_physical - rows:,} of padding make them "
            f"{num_physical:,} in every step",
        )


def _vocabularies(trainer: SpmdTrainer, inputs: Mapping[str, Input]) -> Iterator[Finding]:
    check_vocab_size = getattr(trainer.model, "check_vocab_size", None)
    if check_vocab_size is None:
        return
    for path, size in vocabulary_sizes({path: data.config for path, data in inputs.items()}):
        if isinstance(size, Exception):
            reason = str(size).partition("\n")[0]
            yield Finding(
                Severity.NOTE, path, f"the tokenizer is not here, so its size is not known. {reason}"
            )
            continue
        try:
            check_vocab_size(size, where=path)
        except ValueError as e:
            yield Finding(Severity.ERROR, path, str(e).removeprefix(f"{path}: "))
