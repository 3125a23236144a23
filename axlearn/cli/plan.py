"""Show what a recipe takes of TPUs that are not there: memory, traffic, time, and whether it fits.

Each plan compiles the step of training for the machine, in a process of its own, and is kept: a second call makes only
what is missing. Takes the extra `tpu-aot` (libtpu).
"""

import argparse
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any, Optional

from axlearn.cli._plan_worker import THIS_MACHINE
from axlearn.common.aot_compilation import Plan, plan_picture, plan_text
from axlearn.common.config import error_message

_GIB = 2**30
_POLL_SECONDS = 0.5


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="axlearn plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="+", metavar="NAME", help="a recipe, such as fuji-7B-v2-flash")
    parser.add_argument(
        "--mesh_selector",
        action="append",
        required=True,
        metavar="MACHINE",
        help="a machine such as tpu-v5p-512 or tpu-v5litepod-256-4, or `here`: this one; may be repeated",
    )
    parser.add_argument("--module", help="the module with the recipe; left out: the listed ones")
    parser.add_argument("--data_dir", default="FAKE", help="as for the trainer (default: FAKE)")
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="PATH=VALUE", help="change a field"
    )
    parser.add_argument("--output", default="plans", help="folder that keeps the plans (default: plans)")
    parser.add_argument(
        "--timeout_minutes", type=float, default=60, help="give a plan up after so long (default: 60)"
    )
    parser.add_argument(
        "--memory_gib", type=float, default=16, help="give a plan up that takes more here (default: 16)"
    )
    parser.add_argument(
        "--save_executable",
        metavar="DIR",
        help="keep each compiled step in DIR/NAME.MACHINE, from where runs load it (executable_dir)",
    )
    parser.add_argument(
        "--picture",
        metavar="FILE",
        help="draw the plan as SVG into this file; of several plans, each into FILE with its name added",
    )
    parser.add_argument("--json", action="store_true", help="print the plans as JSON")
    return parser


def main(argv: Sequence[str]) -> int:
    """Makes and prints plans; returns 0 if all fit, 1 if one does not or could not be made."""
    options = _parser().parse_args(argv)
    if options.picture is not None:
        _check_picture(options.picture)
    results = []
    for name, selector in itertools.product(options.names, options.mesh_selector):
        request = {
            "name": name,
            "mesh_selector": selector,
            "module": options.module,
            "data_dir": options.data_dir,
            "overrides": options.overrides,
        }
        if options.save_executable is not None:
            request["executable_dir"] = os.path.abspath(
                os.path.join(options.save_executable, stem_of(request))
            )
        result = make(
            request,
            folder=pathlib.Path(options.output),
            timeout_seconds=60 * options.timeout_minutes,
            memory_bytes=int(options.memory_gib * _GIB),
        )
        results.append({"name": name, "mesh_selector": selector, **result})
        if options.picture is not None and "plan" in result:
            is_only = len(options.names) * len(options.mesh_selector) == 1
            _draw(results[-1], path=_picture_path(options.picture, "" if is_only else stem_of(request)))
        if not options.json:
            print(_result_text(results[-1]), flush=True)
    if options.json:
        print(json.dumps(results, indent=2))
    elif len(results) > 1:
        print(summary_table(results))
    return 0 if all("plan" in x and Plan.from_json(x["plan"]).fits for x in results) else 1


def _check_picture(path: str) -> None:
    """Refuses a picture that could not be written, before hours of compiling."""
    folder = pathlib.Path(path).absolute().parent
    if not path.endswith(".svg") or not folder.is_dir():
        problem = f"there is no folder {folder}" if path.endswith(".svg") else "pictures are SVG"
        raise ValueError(
            error_message(where="--picture", what=f"{path!r}: {problem}", expected="a file such as plan.svg")
        )


def _picture_path(path: str, stem: str) -> pathlib.Path:
    return pathlib.Path(path) if not stem else pathlib.Path(f"{path.removesuffix('.svg')}.{stem}.svg")


def _draw(result: dict[str, Any], *, path: pathlib.Path) -> None:
    plan = Plan.from_json(result["plan"])
    path.write_text(
        plan_picture(plan, title=f"{result['name']} on {result['mesh_selector']}"), encoding="utf-8"
    )


def _result_text(result: dict[str, Any]) -> str:
    heading = f"{result['name']} on {result['mesh_selector']}"
    body = plan_text(Plan.from_json(result["plan"])) if "plan" in result else f"No plan: {result['error']}"
    return f"{heading}\n{'=' * len(heading)}\n{body}\n"


def make(
    request: dict[str, Any], *, folder: pathlib.Path, timeout_seconds: float, memory_bytes: int
) -> dict[str, Any]:
    """Makes one plan in a process of its own, or takes the one that is kept.

    Args:
        request: What `_plan_worker.run` takes.
        folder: Where plans are kept.
        timeout_seconds: How long it may take.
        memory_bytes: How much memory its process may take.

    Returns:
        A dictionary with `plan` (see `Plan.to_json`) or `error`, the reason why there is none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem_of(request)}.json"
    with tempfile.TemporaryDirectory() as scratch:
        request_path = pathlib.Path(scratch, "request.json")
        request_path.write_text(json.dumps(request), encoding="utf-8")
        with open(os.path.join(scratch, "log"), "w+", encoding="utf-8") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "axlearn.cli._plan_worker", os.fspath(request_path), os.fspath(path)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(request),
            )
            reason = _watch(process, timeout_seconds=timeout_seconds, memory_bytes=memory_bytes)
            log.seek(0)
            tail = log.read()[-2000:].strip()
    if reason is not None:
        return {"error": reason}
    if process.returncode == 0 and path.is_file():
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return {key: result[key] for key in ("plan", "error") if key in result}
    return {"error": tail or f"the process ended with status {process.returncode}"}


def _environment(request: dict[str, Any]) -> dict[str, str]:
    variables = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    if request["mesh_selector"] != THIS_MACHINE:
        # The devices are those that the plan is for, not those of this machine.
        variables["JAX_PLATFORMS"] = "cpu"
    return variables


def stem_of(request: dict[str, Any]) -> str:
    """Returns the name under which what belongs to a request is kept."""
    changed = "".join(f".{override}" for override in request["overrides"])
    return f"{request['name']}.{request['mesh_selector']}{changed}".replace("/", "_")


def _watch(process: subprocess.Popen[bytes], *, timeout_seconds: float, memory_bytes: int) -> Optional[str]:
    """Waits for a process; ends it where it takes too long or too much, and then returns which."""
    deadline = time.monotonic() + timeout_seconds
    try:
        while process.poll() is None:
            if time.monotonic() > deadline:
                return f"given up after {timeout_seconds / 60:g} minutes (--timeout_minutes)"
            taken = _resident_bytes(process.pid)
            if taken > memory_bytes:
                return f"given up at {taken / _GIB:.3g} GiB of this machine's memory (--memory_gib)"
            time.sleep(_POLL_SECONDS)
        return None
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _resident_bytes(pid: int) -> int:
    """The memory that a process has; 0 where the system does not say."""
    try:
        status = pathlib.Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    for line in status.splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


def summary_table(results: Sequence[dict[str, Any]]) -> str:
    """Returns plans as a table in markdown, a row each.

    Args:
        results: Dictionaries with `name`, `mesh_selector`, and `plan` or `error`.
    """
    head = [
        "recipe",
        "machine",
        "devices",
        "mesh",
        "peak GiB of",
        "TFLOP a device",
        "x model",
        "sent GB a device",
        "step s",
        "MFU",
    ]
    rows = [head, ["---"] * len(head), *map(_row, results)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _row(result: dict[str, Any]) -> list[str]:
    cells = [result["name"], result["mesh_selector"]]
    if "plan" not in result:
        return [*cells, result["error"].splitlines()[0], *([""] * 7)]
    plan = Plan.from_json(result["plan"])
    step = plan.step_seconds()
    peak = f"{plan.peak_bytes / _GIB:.1f}" if plan.peak_bytes else "?"
    return [
        *cells,
        str(plan.num_devices),
        " ".join(f"{axis}={size}" for axis, size in plan.mesh_shape.items() if size > 1),
        f"{peak} of {plan.memory_bytes / _GIB:g}" + ("" if plan.fits else " (too much)"),
        f"{plan.flops / plan.num_devices / 1e12:.4g}",
        f"{plan.flops / plan.model_flops:.2f}",
        "not known" if plan.failure else f"{sum(row.sent_bytes for row in plan.traffic) / 1e9:.3g}",
        "not known"
        if step is None
        else f"{step.predicted:.3g} ({step.best:.3g} to {step.worst:.3g}){' + host' if plan.host_bytes else ''}",
        "not known" if step is None else f"{plan.mfu(step.predicted) or 0:.0%}",
    ]
