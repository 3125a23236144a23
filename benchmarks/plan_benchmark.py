"""What the recipes take of the machines that their mesh rules name: a table of plans, beside what others have measured.

    python benchmarks/plan_benchmark.py                 # the table, of the plans in benchmarks/plans: seconds
    python benchmarks/plan_benchmark.py --recompile     # makes the plans anew: an hour or two, libtpu, no TPU

The first writes `plan_benchmark.md`; `make plans` does it. `--recompile` keeps what it has compiled in `--work_dir`,
goes on from there when it is started again, and takes the plans over into `benchmarks/plans`.
"""

import argparse
import importlib.metadata
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

from axlearn.cli import plan as plan_command
from axlearn.common.aot_compilation import Plan
from axlearn.common.aot_compilation._plan import ACTIVATIONS, BETWEEN_SLICES, WITHIN_SLICE

_GIB = 2**30
_FOLDER = pathlib.Path(__file__).parent
_PLANS = _FOLDER / "plans"
_TABLE = _FOLDER / "plan_benchmark.md"
_PAPER = "arXiv 2507.05411, table of iteration times"
_COMMENT = "AXLearn, comment on the mesh rule"


class Row(NamedTuple):
    """A plan of the table.

    Attributes:
        name: The recipe.
        mesh_selector: The machine.
        overrides: What is changed of the recipe.
        measured: Seconds of a step that others have measured; None: nobody told.
        source: Who did.
    """

    name: str
    mesh_selector: str
    overrides: tuple[str, ...] = ()
    measured: Optional[float] = None
    source: str = ""

    def request(self) -> dict[str, Any]:
        """The plan as `axlearn plan` is asked for it."""
        return {
            "name": self.name,
            "mesh_selector": self.mesh_selector,
            "module": None,
            "data_dir": "FAKE",
            "overrides": list(self.overrides),
        }

    @property
    def path(self) -> pathlib.Path:
        """Where its plan is kept beside the table."""
        changed = ".changed" if self.overrides else ""
        return _PLANS / f"{self.name}.{self.mesh_selector}{changed}.json"


_SPLIT_EMBEDDING = "model.decoder.emb.token_emb.param_partition_spec=('fsdp', 'model')"
_SPLIT_HEAD = "model.decoder.lm_head.param_partition_spec=('fsdp', 'model')"
ROWS = (
    Row("fuji-7B-v2-flash", "tpu-v4-1024"),
    Row("fuji-7B-v2-flash", "tpu-v5litepod-256"),
    Row("fuji-7B-v2-flash", "tpu-v5litepod-256-4", measured=2.21, source=_COMMENT),
    Row("fuji-7B-v2-flash", "tpu-v6e-256-4"),
    Row("fuji-7B-v2-flash", "tpu-v5p-512", measured=2.5, source=_PAPER),
    Row("fuji-70B-v2-flash", "tpu-v5litepod-256-4", measured=14.37, source=_COMMENT),
    Row(
        "fuji-70B-v2-flash",
        "tpu-v5litepod-256-4",
        (_SPLIT_EMBEDDING, _SPLIT_HEAD),
        measured=14.37,
        source=_COMMENT,
    ),
    Row("fuji-70B-v2-flash", "tpu-v5p-1024", measured=11.6, source=_PAPER),
    Row("fuji-70B-v2-flash", "tpu-v6e-256-4"),
    Row("fuji-405B-v3-flash", "tpu-v5p-2048"),
)


def recompile(rows: Sequence[Row], *, work_dir: pathlib.Path, timeout_minutes: float) -> None:
    """Makes the plans that are not in `work_dir` yet, and takes all over."""
    for row in rows:
        print(f"{row.name} on {row.mesh_selector} {' '.join(row.overrides)}", file=sys.stderr, flush=True)
        result = plan_command.make(
            row.request(), folder=work_dir, timeout_seconds=60 * timeout_minutes, memory_bytes=16 * _GIB
        )
        made_with = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
        made = {"request": row.request(), "made_with": made_with, **result}
        row.path.parent.mkdir(exist_ok=True)
        row.path.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


class Made(NamedTuple):
    """A row with its plan, or with the reason why there is none."""

    row: Row
    plan: Optional[Plan]
    error: str


def read(rows: Sequence[Row]) -> list[Made]:
    """Returns the rows with what `benchmarks/plans` holds of them."""
    made = []
    for row in rows:
        if not row.path.is_file():
            made.append(Made(row, None, "not made yet (`--recompile`)"))
        else:
            kept = json.loads(row.path.read_text(encoding="utf-8"))
            plan = Plan.from_json(kept["plan"]) if "plan" in kept else None
            made.append(Made(row, plan, kept.get("error", "")))
    return made


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _title(row: Row) -> list[str]:
    return [row.name.removesuffix("-flash") + (" *" if row.overrides else ""), row.mesh_selector]


def memory_table(made: Sequence[Made]) -> str:
    """What a device holds."""
    lines = []
    for row, plan, error in made:
        if plan is None:
            lines.append([*_title(row), error.splitlines()[0], *[""] * 7])
            continue
        mesh = " ".join(f"{axis}={size}" for axis, size in plan.mesh_shape.items() if size > 1)
        sizes = [plan.parts.get(name, 0) for name in ("parameters", "optimizer", ACTIVATIONS)]
        lines.append(
            [
                *_title(row),
                f"{plan.num_devices}{f' in {plan.num_slices}' if plan.num_slices > 1 else ''}",
                mesh,
                *(f"{size / _GIB:.2f}" if size else "not known" for size in sizes),
                f"{plan.host_bytes / _GIB:.1f}" if plan.host_bytes else "",
                f"{plan.peak_bytes / _GIB:.1f} of {plan.memory_bytes / _GIB:g}",
                "fits" if plan.fits else "**does not fit**",
            ]
        )
    head = ["recipe", "machine", "devices", "mesh", "parameters", "optimizer", "activations", "on the host"]
    return _markdown([*head, "peak", "verdict"], lines)


def time_table(made: Sequence[Made]) -> str:
    """What a step does and how long that takes."""
    lines = []
    for row, plan, _ in made:
        step = None if plan is None else plan.step_seconds()
        if plan is None or step is None:
            compute = "" if plan is None else f"{plan.compute_seconds or 0:.2f}"
            lines.append([*_title(row), "", "", compute, *[""] * 8])
            continue
        links = [plan.link_seconds(link) or 0 for link in (WITHIN_SLICE, BETWEEN_SLICES)]
        measured = "" if row.measured is None else f"{row.measured:g}"
        ratio = "" if row.measured is None else f"{step.predicted / row.measured:.2f}"
        lines.append(
            [
                *_title(row),
                f"{plan.flops / plan.num_devices / 1e12:.0f} ({plan.flops / plan.model_flops:.2f})",
                f"{(plan.product_bytes + plan.other_bytes) / 1e9:.0f}",
                f"{plan.compute_seconds:.2f}",
                f"{plan.memory_seconds:.2f}",
                *(f"{seconds:.2f}" if seconds else "" for seconds in links),
                f"**{step.predicted:.2f}**{' + host' if plan.host_bytes else ''}",
                f"{step.best:.2f} to {step.worst:.2f}",
                f"{plan.mfu(step.predicted) or 0:.0%}",
                measured,
                ratio,
            ]
        )
    head = [
        "recipe",
        "machine",
        "TFLOP (x model)",
        "GB memory",
        "compute s",
        "memory s",
        "within s",
        "between s",
    ]
    return _markdown([*head, "predicted s", "bounds s", "MFU", "measured s", "predicted / measured"], lines)


def traffic_table(made: Sequence[Made]) -> str:
    """What each device sends, by kind, axes and class of link."""
    lines = []
    for row, plan, _ in made:
        for traffic in () if plan is None else plan.traffic:
            if traffic.sent_bytes < 1e8:
                continue
            lines.append(
                [
                    *_title(row),
                    traffic.kind,
                    " ".join(traffic.axes),
                    traffic.link,
                    f"{traffic.count}",
                    f"{traffic.sent_bytes / 1e9:.1f}",
                    "not known" if traffic.seconds is None else f"{traffic.seconds:.2f}",
                    "overlaps" if traffic.overlaps else "waits",
                ]
            )
    head = ["recipe", "machine", "kind", "axes", "over", "times", "GB sent", "s", "the program"]
    return _markdown(head, lines)


def advice_text(made: Sequence[Made]) -> str:
    """What to change in the rows that do not fit."""
    parts = []
    for row, plan, error in made:
        if plan is not None and plan.fits:
            continue
        reason = error if plan is None else plan.failure or "more than a device has"
        advice = () if plan is None else plan.advice
        lines = "\n".join(f"- `{line}`" if line.startswith("--set") else f"- {line}" for line in advice)
        parts.append(f"**{row.name} on {row.mesh_selector}**: {reason}.\n\n{lines}".rstrip())
    return "\n\n".join(parts) or "All fit."


def main(argv: Sequence[str]) -> int:
    """Writes the table."""
    parser = argparse.ArgumentParser(
        prog="plan_benchmark.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recompile", action="store_true", help="make the plans anew")
    parser.add_argument("--work_dir", default="plans", help="keeps what was compiled (default: plans)")
    parser.add_argument("--timeout_minutes", type=float, default=60, help="for each plan (default: 60)")
    options = parser.parse_args(argv)
    if options.recompile:
        recompile(ROWS, work_dir=pathlib.Path(options.work_dir), timeout_minutes=options.timeout_minutes)
    made = read(ROWS)
    text = (_FOLDER / "plan_benchmark.in.md").read_text(encoding="utf-8")
    for name, value in {
        "MEMORY": memory_table(made),
        "TIMES": time_table(made),
        "TRAFFIC": traffic_table(made),
        "ADVICE": advice_text(made),
    }.items():
        text = text.replace(f"<!-- {name} -->", value)
    _TABLE.write_text(text, encoding="utf-8")
    print(f"{_TABLE}: {sum(row.path.is_file() for row in ROWS)} of {len(ROWS)} plans")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
