"""The compiled step of a trainer on machines that are not there."""

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from axlearn.common.config import InstantiableConfig, error_message
from axlearn.common.machines import Machine

# What keeps libtpu from asking the cloud which machine this is, and from locking itself for one process alone.
_LIBTPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
}


class TracedStep(NamedTuple):
    """A step for a machine, before the compiler sees it.

    Attributes:
        trainer: The trainer whose step it is; its devices are those of the machine, on which nothing can run.
        mesh: Their mesh.
        traced: The program.
        seconds: What tracing took.
    """

    trainer: Any
    mesh: jax.sharding.Mesh
    traced: jax.stages.Traced
    seconds: float


class CompiledStep(NamedTuple):
    """A step compiled for a machine.

    Attributes:
        trainer: As in `TracedStep`.
        mesh: Likewise.
        compiled: The program.
        traced: The program before the compiler saw it.
        seconds: What tracing, lowering and compiling took.
    """

    trainer: Any
    mesh: jax.sharding.Mesh
    compiled: jax.stages.Compiled
    traced: jax.stages.Traced
    seconds: float


def topology_devices(machine: Machine) -> np.ndarray:
    """Returns descriptions of a machine's devices, to compile for.

    Args:
        machine: A machine with TPUs.

    Returns:
        The devices in one dimension; those of one slice next to each other.

    Raises:
        ValueError: If it has no TPUs.
        ModuleNotFoundError: If libtpu is not installed.
    """
    if machine.topology is None:
        raise ValueError(
            error_message(
                where="mesh_selector",
                what=f"{machine.name!r} has no TPUs",
                expected="a TPU such as tpu-v5p-512: only for those can be compiled without having one",
            )
        )
    topologies = _load_topologies()
    options: dict[str, Any] = {"num_slices": machine.num_slices}
    if machine.topology.startswith("v4:"):
        # As jobs use a v4: both of its cores as one device.
        options["chip_config_name"] = "megacore"
    with _environment(_LIBTPU_ENVIRONMENT):
        description = topologies.get_topology_desc(machine.topology, platform="tpu", **options)
    return np.array(sorted(description.devices, key=lambda device: (_slice_of(device), device.id)))


def _load_topologies() -> Any:
    try:
        import libtpu  # noqa: F401
    except ModuleNotFoundError as e:
        raise ModuleNotFoundError(
            error_message(
                what="compiling for TPUs takes libtpu, which is not installed",
                advice="Install the extra: pip install 'axlearn-spmd[tpu-aot]'",
            ),
            name="libtpu",
        ) from e
    from jax.experimental import topologies

    return topologies


def _slice_of(device: Any) -> int:
    return getattr(device, "slice_index", 0) or 0


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    missing = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:
            del os.environ[name]


def trace_trainer_step(trainer_config: InstantiableConfig, *, devices: np.ndarray) -> TracedStep:
    """Builds a trainer on devices, which need not be there, and traces its step; compiles nothing.

    Args:
        trainer_config: The trainer's config, for the machine; it is not changed.
        devices: The devices.

    Returns:
        The step.
    """
    trainer = trainer_config.clone().instantiate(parent=None, devices=devices)
    start = time.perf_counter()
    with trainer.mesh() as mesh:
        traced = trainer.programs.trace_train_step()
    return TracedStep(trainer, mesh, traced, time.perf_counter() - start)


def compile_traced_step(step: TracedStep, *, compiler_options: dict[str, Any] | None = None) -> CompiledStep:
    """Compiles a step for the devices for which it was traced.

    Args:
        step: The step.
        compiler_options: For the compiler; None: its defaults.

    Returns:
        The compiled step.
    """
    start = time.perf_counter()
    with step.trainer.mesh() as mesh:
        compiled = step.traced.lower().compile(compiler_options)
    seconds = step.seconds + time.perf_counter() - start
    return CompiledStep(step.trainer, mesh, compiled, step.traced, seconds)


def compile_trainer_step(
    trainer_config: InstantiableConfig, *, devices: np.ndarray, compiler_options: dict[str, Any] | None = None
) -> CompiledStep:
    """Builds a trainer on devices, which need not be there, and compiles its step.

    Args:
        trainer_config: The trainer's config, for the machine; it is not changed.
        devices: The devices.
        compiler_options: For the compiler; None: its defaults.

    Returns:
        The step.
    """
    return compile_traced_step(
        trace_trainer_step(trainer_config, devices=devices), compiler_options=compiler_options
    )
