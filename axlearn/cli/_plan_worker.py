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
    TracedStep,
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
from axlearn.common.saved_program import prepare_folder
from axlearn.common.trainer import (
    MemoryNeeds,
    is_step_saved,
    memory_there,
    save_train_step,
    select_mesh_config,
)
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
_VERSION = 4
# How a failure begins that is the program's own, and would be the same again.
_TOO_LARGE = "it does not fit"


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
    """Returns a hash of what is known of a program before it is traced: config, machine, versions and flags."""
    versions = [jax.__version__]
    try:
        versions.append(importlib.metadata.version("libtpu"))
    except importlib.metadata.PackageNotFoundError:
        versions.append("no libtpu")
    flags = [os.environ.get(name, "") for name in ("LIBTPU_INIT_ARGS", "XLA_FLAGS")]
    text = "\n".join([cfg.debug_string(), request["mesh_selector"], *versions, *flags])
    return hashlib.sha256(text.encode()).hexdigest()


def program_key(step: TracedStep, *, config_key: str) -> str:
    """Returns what decides a compiled program and a plan of it, as a hash: the traced program, and where it runs.

    Args:
        step: The step.
        config_key: From `key_of`.
    """
    devices = [(device.platform, device.device_kind) for device in step.mesh.devices.flat]
    with step.trainer.mesh():
        program = step.traced.lower().as_text()
    return hashlib.sha256("\n".join([config_key, repr(devices), program]).encode()).hexdigest()


def run(request: dict[str, Any], result_path: pathlib.Path) -> dict[str, Any]:
    """Makes the plan of a request, or takes the one that is there, if its program is the one of today's code.

    Args:
        request: `name`, `mesh_selector`, `module`, `data_dir`, `overrides`, and `executable_dir`: where to save the
            compiled step, if anywhere.
        result_path: Where the result is kept; what was read off the compiled program lies beside it, so that a plan
            of another version of this module is made without compiling. Errors are not kept: they are tried again.

    Returns:
        A dictionary with either `key`, `version` and `plan`, or `error`.
    """
    cfg = trainer_config_of(request)
    try:
        result = _result(cfg, request, result_path)
    except Exception as e:
        result = {"error": error_text(e) if is_for_users(e) else _one_line(e)}
    write_text_durably(os.fspath(result_path), json.dumps(result, indent=2) + "\n")
    return result


def _result(cfg: InstantiableConfig, request: dict[str, Any], result_path: pathlib.Path) -> dict[str, Any]:
    machine, devices = _machine_and_devices(request["mesh_selector"])
    saved_folder = request.get("executable_dir")
    if saved_folder is not None:
        # Before the hours that compiling may take.
        prepare_folder(saved_folder)
    step = trace_trainer_step(cfg, devices=devices)
    key = program_key(step, config_key=key_of(cfg, request))
    is_saved = saved_folder is None or is_step_saved(step.trainer, folder=saved_folder)
    kept = _kept_result(result_path, key=key)
    # A program that the compiler refuses as too large will never be saved.
    if kept is not None and (is_saved or kept["plan"]["failure"] is not None):
        return kept
    plan = _plan(
        step,
        machine=machine,
        facts_path=result_path.with_suffix(".hlo.gz"),
        key=key,
        save_to=None if is_saved else saved_folder,
    )
    advice = advise(plan, trainer_config=cfg, devices=devices)
    return {"key": key, "version": _VERSION, "plan": dataclasses.replace(plan, advice=advice).to_json()}


def _kept_result(path: pathlib.Path, *, key: str) -> Optional[dict[str, Any]]:
    """The plan that is kept under a key, unless it failed for another reason than the program itself."""
    if not path.is_file():
        return None
    try:
        kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    if kept.get("key") != key or kept.get("version") != _VERSION or "plan" not in kept:
        return None
    failure = kept["plan"]["failure"]
    return kept if failure is None or failure.startswith(_TOO_LARGE) else None


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
    step: TracedStep, *, machine: Machine, facts_path: pathlib.Path, key: str, save_to: Optional[str]
) -> Plan:
    # A program that is to be saved is compiled; else what was kept of it will do.
    facts = read_facts(facts_path, key=key) if save_to is None else None
    start = time.monotonic()
    if facts is None:
        try:
            compiled = compile_traced_step(step)
        except jax.errors.JaxRuntimeError as e:
            return make_failed_plan(
                step,
                machine=machine,
                failure=_failure(e),
                temporary_bytes=_temporaries(e, held=step.trainer.programs.memory_needs()),
                compile_seconds=time.monotonic() - start,
            )
        facts = compiled_facts(compiled.compiled, seconds=compiled.seconds)
        write_facts(facts, path=facts_path, key=key)
        if save_to is not None:
            save_train_step(compiled.compiled, trainer=step.trainer, folder=save_to)
    return make_plan(step, machine=machine, facts=facts)


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
        return f"{_TOO_LARGE}, says the compiler"
    what = "in all" if sizes["of"] == "Used" else "for temporaries alone"
    return f"{_TOO_LARGE}, says the compiler ({sizes['asked']} {what}, of {sizes['there']})"


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
