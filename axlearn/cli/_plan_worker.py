"""One plan in a process of its own: `python -m axlearn.cli._plan_worker REQUEST RESULT`, both paths of JSON files.

Compilers of machines that are not there may take gigabytes and hours, and may end the process: whoever asks watches
over it, and a plan that was made before is not made again.
"""

import hashlib
import importlib.metadata
import json
import os
import pathlib
import re
import sys
from typing import Any

import jax

from axlearn.common.aot_compilation import compile_trainer_step, make_plan, topology_devices
from axlearn.common.config import REQUIRED, InstantiableConfig, apply_overrides, make_trainer_config
from axlearn.common.data_dir import set_data_dir
from axlearn.common.file_system import write_text_durably
from axlearn.common.machines import machine_of
from axlearn.common.trainer import select_mesh_config
from axlearn.common.user_errors import error_text, is_for_users
from axlearn.experiments.registry import find_trainer_config

# "Ran out of memory in memory space hbm. Used 94.56G of 15.75G hbm." and similar, in what the compiler says.
_OUT_OF_MEMORY = re.compile(
    r"(?:Used|required for HLO temporaries \()\s*([0-9.]+[KMGT]).*?([0-9.]+[KMGT])", re.DOTALL
)


def trainer_config_of(request: dict[str, Any]) -> InstantiableConfig:
    """Returns the config that a request asks to plan for: recipe, mesh rule, overrides."""
    with set_data_dir(request["data_dir"]):
        recipe = find_trainer_config(request["name"], module=request["module"])
        cfg: InstantiableConfig = make_trainer_config(recipe, data_dir=request["data_dir"])
    if cfg.dir is REQUIRED:
        cfg.dir = "plan"
    if cfg.mesh_rules:
        # A recipe without rules has one mesh for all machines.
        select_mesh_config(cfg, mesh_selector=request["mesh_selector"])
    apply_overrides(cfg, request["overrides"])
    return cfg


def key_of(cfg: InstantiableConfig, request: dict[str, Any]) -> str:
    """Returns what decides a plan, as a hash: the config, the machine, and the versions of what compiles."""
    versions = [jax.__version__]
    try:
        versions.append(importlib.metadata.version("libtpu"))
    except importlib.metadata.PackageNotFoundError:
        versions.append("no libtpu")
    text = "\n".join([cfg.debug_string(), request["mesh_selector"], *versions])
    return hashlib.sha256(text.encode()).hexdigest()


def _failure(e: Exception) -> str:
    """What went wrong, in a sentence if it is memory, else in the compiler's or our own words."""
    text = str(e)
    if "RESOURCE_EXHAUSTED" in text or "Ran out of memory" in text:
        sizes = _OUT_OF_MEMORY.search(text)
        detail = f": {sizes[1]} of {sizes[2]}" if sizes else ""
        return f"does not fit, says the compiler{detail}"
    return error_text(e) if is_for_users(e) else f"{type(e).__name__}: {text.splitlines()[0] if text else ''}"


def run(request: dict[str, Any], result_path: pathlib.Path) -> dict[str, Any]:
    """Makes the plan of a request, or takes the one that is there.

    Args:
        request: `name`, `mesh_selector`, `module`, `data_dir`, `overrides`.
        result_path: Where the result is kept.

    Returns:
        A dictionary with `key`, and either `plan` or `error`.
    """
    cfg = trainer_config_of(request)
    key = key_of(cfg, request)
    if result_path.is_file():
        kept: dict[str, Any] = json.loads(result_path.read_text(encoding="utf-8"))
        if kept.get("key") == key:
            return kept
    try:
        machine = machine_of(request["mesh_selector"])
        step = compile_trainer_step(cfg, devices=topology_devices(machine))
        result = {"key": key, "request": request, "plan": make_plan(step, machine=machine).to_json()}
    except Exception as e:
        result = {"key": key, "request": request, "error": _failure(e)}
    write_text_durably(os.fspath(result_path), json.dumps(result, indent=2) + "\n")
    return result


def main(argv: list[str]) -> int:
    """Reads a request, writes its result; returns the exit status: 2 where the request makes no sense."""
    request_path, result_path = map(pathlib.Path, argv)
    jax.config.update("jax_threefry_partitionable", True)
    # A cached program for a topology can be written and not be read (jax 0.10.2).
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        run(json.loads(request_path.read_text(encoding="utf-8")), result_path)
    except Exception as e:
        if not is_for_users(e):
            raise
        print(error_text(e), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
