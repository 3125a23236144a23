"""The compiled step of a trainer in a folder: saved where there is time, loaded where a run starts."""

import os
from typing import Any, Union

import jax
from absl import logging
from jax.sharding import Mesh

from axlearn.common.config import InstantiableConfig, error_message
from axlearn.common.saved_program import SavedProgramError, is_saved, load_program, save_program
from axlearn.common.trainer._programs import Programs

# The fields of a trainer's config on which the program depends, for a message; the program itself is what decides.
_FIELDS = ("batch_axis_names", "train_dtype", "model", "learner", "input")


def save_train_step(compiled: jax.stages.Compiled, *, trainer: Any, folder: Union[str, os.PathLike]) -> None:
    """Keeps a compiled step in a folder from which runs can load it (`executable_dir`).

    Args:
        compiled: The step of `trainer`, compiled for its devices.
        trainer: An `SpmdTrainer`.
        folder: Where to keep it; see `axlearn.common.saved_program` on who may write there.

    Raises:
        SavedProgramError: If others can write to the folder.
    """
    with trainer.mesh() as mesh:
        save_program(
            compiled,
            lowered=trainer.programs.trace_train_step().lower(),
            devices=list(mesh.devices.flat),
            config_text=_config_text(trainer.config, mesh=mesh),
            folder=folder,
        )


def is_step_saved(trainer: Any, *, folder: Union[str, os.PathLike]) -> bool:
    """Returns whether a folder holds the step of a trainer, so that a run could load it.

    Args:
        trainer: An `SpmdTrainer`.
        folder: Where the step may lie.
    """
    with trainer.mesh() as mesh:
        return is_saved(
            trainer.programs.trace_train_step().lower(),
            devices=list(mesh.devices.flat),
            config_text=_config_text(trainer.config, mesh=mesh),
            folder=folder,
        )


def load_train_step(cfg: InstantiableConfig, *, programs: Programs, mesh: Mesh) -> jax.stages.Compiled:
    """Returns the step that `cfg.executable_dir` holds, or where that is allowed and there is none, compiles it.

    Args:
        cfg: The config of an `SpmdTrainer`.
        programs: Its programs.
        mesh: Its mesh.

    Raises:
        SavedProgramError: If the step cannot be used, and `cfg.executable_fallback` is not True.
    """
    lowered = programs.trace_train_step().lower()
    try:
        compiled = load_program(
            lowered,
            devices=list(mesh.devices.flat),
            config_text=_config_text(cfg, mesh=mesh),
            folder=cfg.executable_dir,
        )
    except SavedProgramError as e:
        if cfg.executable_fallback is not True:
            raise
        logging.warning("The step is compiled, as executable_fallback says: %s", e)
        return lowered.compile()
    logging.info("The step was loaded from %s, and not compiled.", cfg.executable_dir)
    return compiled


def problems_of_executable(cfg: Any) -> list[str]:
    """Returns what cannot be meant in a trainer's fields on saved steps."""
    problems = []
    if cfg.executable_dir is None and cfg.executable_fallback is not None:
        problems.append(
            error_message(
                where=f"{cfg.name}.executable_fallback",
                what="there is nothing to fall back from: executable_dir is None",
                expected="a folder as executable_dir, or None here",
            )
        )
    if cfg.executable_dir is not None and cfg.cache_compiled_train_step is False:
        problems.append(
            error_message(
                where=f"{cfg.name}.executable_dir",
                what="a saved step is for one shape of a batch, and cache_compiled_train_step is False",
                expected="only one of the two",
            )
        )
    return problems


def _config_text(cfg: InstantiableConfig, *, mesh: Mesh) -> str:
    """The lines of a trainer's config that say what its step computes, and the mesh on which it does."""
    lines = [line for line in cfg.debug_string().splitlines() if line.startswith(_FIELDS)]
    return "\n".join([f"mesh: {dict(mesh.shape)}", *lines])
