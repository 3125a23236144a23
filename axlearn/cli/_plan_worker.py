"""One plan in a process of its own: `python -m axlearn.cli._plan_worker REQUEST RESULT`, both paths of JSON files.

Compilers of machines that are not there may take gigabytes and hours, and may end the process: whoever asks watches
over it, and a plan that was made before is not made again.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
import re
import sys
import time
from typing import Any, Optional

import jax
import numpy as np

from axlearn.common.aot_compilation import (
    Plan,
    advise,
    compile_traced_step,
    compiled_facts,
    make_failed_plan,
    make_plan,
    read_facts,
    topology_devices,
    trace_trainer_step,
    write_facts,
)
from axlearn.common.config import REQUIRED, InstantiableConfig, apply_overrides, make_trainer_config
from axlearn.common.data_dir import set_data_dir
from axlearn.common.file_system import write_text_durably
from axlearn.common.machines import Machine, machine_of
from axlearn.common.trainer import MemoryNeeds, memory_there, save_train_step, select_mesh_config
from axlearn.common.user_errors import error_text, is_for_users
from axlearn.experiments.registry import find_trainer_config

# "Ran out of memory in memory space hbm. Used 94.56G of 15.75G hbm." is of everything; "the total memory required for
# HLO temporaries (16.54G) exceeds available HBM (15.75G)" is without the state.
_OUT_OF_MEMORY = re.compile(
    r"(?P<of>Used|required for HLO temporaries) \(?(?P<asked>[0-9.]+[KMGT]).*?(?P<there>[0-9.]+[KMGT])",
    re.DOTALL,
)
# The selector that stands for the devices of this machine.
THIS_MACHINE = "here"
# Of what a plan says: one that is kept by another version is made again, of the program that is kept beside it.
_VERSION = 3


def trainer_config_of(request: dict[str, Any]) -> InstantiableConfig:
    """Returns the config that a request asks to plan for: recipe, mesh rule, overrides."""
    with set_data_dir(request["data_dir"]):
        recipe = find_trainer_config(request["name"], module=request["module"])
        cfg: InstantiableConfig = make_trainer_config(recipe, data_dir=request["data_dir"])
    if cfg.dir is REQUIRED:
        cfg.dir = "plan"
    if cfg.mesh_rules and request["mesh_selector"] != THIS_MACHINE:
        # A recipe without rules has one mesh for all machines.
        select_mesh_config(cfg, mesh_selector=request["mesh_selector"])
    apply_overrides(cfg, request["overrides"])
    return cfg


def key_of(cfg: InstantiableConfig, request: dict[str, Any]) -> str:
    """Returns what decides a compiled program, as a hash: config, machine, versions and flags of what compiles."""
    versions = [jax.__version__]
    try:
        versions.append(importlib.metadata.version("libtpu"))
    except importlib.metadata.PackageNotFoundError:
        versions.append("no libtpu")
    flags = [os.environ.get(name, "") for name in ("LIBTPU_INIT_ARGS", "XLA_FLAGS")]
    text = "\n".join([cfg.debug_string(), request["mesh_selector"], *versions, *flags])
    return hashlib.sha256(text.encode()).hexdigest()


def run(request: dict[str, Any], result_path: pathlib.Path) -> dict[str, Any]:
    """Makes the plan of a request, or takes the one that is there.

    Args:
        request: `name`, `mesh_selector`, `module`, `data_dir`, `overrides`, and `executable_dir`: where to save the
            compiled step, if anywhere.
        result_path: Where the result is kept; what was read off the compiled program lies beside it, so that a plan
            of another version of this module is made without compiling.

    Returns:
        A dictionary with `key`, `version`, and either `plan` or `error`.
    """
    cfg = trainer_config_of(request)
    key = key_of(cfg, request)
    saved_folder = request.get("executable_dir")
    if result_path.is_file():
        kept: dict[str, Any] = json.loads(result_path.read_text(encoding="utf-8"))
        is_saved = saved_folder is None or kept.get("executable_dir") == saved_folder
        if kept.get("key") == key and kept.get("version") == _VERSION and is_saved:
            return kept
    head = {"key": key, "version": _VERSION, "executable_dir": saved_folder}
    try:
        machine, devices = _machine_and_devices(request["mesh_selector"])
        plan = _plan(
            cfg,
            machine=machine,
            devices=devices,
            facts_path=result_path.with_suffix(".hlo.gz"),
            key=key,
            saved_folder=saved_folder,
        )
        result = {**head, "plan": plan.to_json()}
    except Exception as e:
        result = {**head, "error": error_text(e) if is_for_users(e) else _one_line(e)}
    write_text_durably(os.fspath(result_path), json.dumps(result, indent=2) + "\n")
    return result


def _machine_and_devices(selector: str) -> tuple[Machine, np.ndarray]:
    """The machine of a selector, and its devices, which are there only if it is this one."""
    if selector != THIS_MACHINE:
        machine = machine_of(selector)
        return machine, topology_devices(machine)
    devices = jax.devices()
    there = memory_there(devices)
    machine = Machine(
        name=THIS_MACHINE,
        accelerator=devices[0].platform,
        device_kind=devices[0].device_kind,
        num_slices=1,
        devices_per_slice=len(devices),
        # What nobody tells is taken to be enough.
        memory_bytes=sys.maxsize if there is None else there.num_bytes,
    )
    return machine, np.array(devices)


def _plan(
    cfg: InstantiableConfig,
    *,
    machine: Machine,
    devices: np.ndarray,
    facts_path: pathlib.Path,
    key: str,
    saved_folder: Optional[str],
) -> Plan:
    step = trace_trainer_step(cfg, devices=devices)
    # A program that is to be saved is compiled; else what was kept of it will do.
    facts = read_facts(facts_path, key=key) if saved_folder is None else None
    start = time.monotonic()
    if facts is None:
        try:
            compiled = compile_traced_step(step)
        except jax.errors.JaxRuntimeError as e:
            plan = make_failed_plan(
                step,
                machine=machine,
                failure=_failure(e),
                temporary_bytes=_temporaries(e, held=step.trainer.programs.memory_needs()),
                compile_seconds=time.monotonic() - start,
            )
            return dataclasses.replace(plan, advice=advise(plan, trainer_config=cfg, devices=devices))
        facts = compiled_facts(compiled.compiled, seconds=compiled.seconds)
        write_facts(facts, path=facts_path, key=key)
        if saved_folder is not None:
            save_train_step(compiled.compiled, trainer=step.trainer, folder=saved_folder)
    plan = make_plan(step, machine=machine, facts=facts)
    return dataclasses.replace(plan, advice=advise(plan, trainer_config=cfg, devices=devices))


def _one_line(e: Exception) -> str:
    text = str(e)
    return f"{type(e).__name__}: {text.splitlines()[0] if text else ''}"


def _failure(e: Exception) -> str:
    """Why a compiler gave up, in a sentence if it is memory, else in its own words."""
    text = str(e)
    if "RESOURCE_EXHAUSTED" not in text and "Ran out of memory" not in text:
        return _one_line(e)
    sizes = _OUT_OF_MEMORY.search(text)
    if sizes is None:
        return "it does not fit, says the compiler"
    what = "in all" if sizes["of"] == "Used" else "for temporaries alone"
    return f"it does not fit, says the compiler ({sizes['asked']} {what}, of {sizes['there']})"


def _temporaries(e: Exception, *, held: MemoryNeeds) -> int:
    """The bytes beside state and batch that a compiler asked for when it gave up; 0 where it does not say."""
    sizes = _OUT_OF_MEMORY.search(str(e))
    if sizes is None:
        return 0
    asked = int(float(sizes["asked"][:-1]) * 1024 ** ("KMGT".index(sizes["asked"][-1]) + 1))
    return asked if sizes["of"] != "Used" else max(asked - sum(held.state.values()) - held.batch, 0)


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
