"""From a config's name to a run: looks the recipe up, changes it as the command line says, and trains.

`launch_trainer_main` is the command; this is what it does, for programs that start runs themselves.
"""

import dataclasses
import importlib
import json
import os
import re
from collections.abc import Callable, Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any, Optional

import jax

from axlearn.common.config import (
    REQUIRED,
    InstantiableConfig,
    apply_overrides,
    config_to_json,
)
from axlearn.common.file_system import write_text_durably
from axlearn.common.run_dir import default_run_dir, make_run_dir
from axlearn.common.utils import HybridMeshShape, infer_mesh_shape

if TYPE_CHECKING:
    from axlearn.common.trainer import SpmdTrainer

# Recipes stand above the library, so their registry is looked up by name, as a user's own module is.
_REGISTRY_MODULE = "axlearn.experiments.registry"

# Values of flags and environment that are kept out of files. The run directory is read by more people than
# the shell is. Not every "token": those of a vocabulary are no secret.
_SECRET_NAME = re.compile(
    r"(?i)((auth|access|api|bearer|hf|refresh|session)_?token|secret|passw(or)?d|credential|(api|access|private)_?key)"
)
_SECRET_VALUE = re.compile(
    r"(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|AKIA[0-9A-Z]{16}|ya29\.[\w-]{10,}"
    r"|eyJ[\w-]{10,}\.[\w-]{10,}|://[^/\s:@]+:[^/\s@]+@)"
)
_REDACTED = "<redacted>"


@dataclasses.dataclass
class LaunchOptions:
    """What a command line says about a run.

    Attributes:
        config: The name of the trainer config.
        module: The module that has it; None for the recipes that come with this package.
        trainer_dir: The run directory; None for `runs/<config>`.
        data_dir: Where data lies, given to the recipe; None for its default.
        prng_seed: The seed of a run that begins from scratch.
        mesh_selector: The machine, for the recipe's mesh rules; None for the recipe's own mesh.
        trace_at_steps: Steps at which to record profiles.
        n_steps_for_each_trace: Steps of each; None for the trainer's default.
        eval_trace_at_iters: Batches of evaluations at which to record profiles.
        log_every_n_steps: Steps between two log lines; None for what the recipe says.
        watchdog_timeout_seconds: Seconds without a step after which stacks are written; used where the recipe
            has none.
        crash_on_hang_timeout_seconds: Seconds without a step after which the process ends; likewise.
        vlog: The level of the trainer's own log; None for what the recipe says.
        overrides: "path=value" in the order in which they apply, after all of the above.
    """

    config: str
    module: Optional[str] = None
    trainer_dir: Optional[str] = None
    data_dir: Optional[str] = None
    prng_seed: int = 0
    mesh_selector: Optional[str] = None
    trace_at_steps: Sequence[int] = ()
    n_steps_for_each_trace: Optional[int] = None
    eval_trace_at_iters: Sequence[int] = ()
    log_every_n_steps: Optional[int] = None
    watchdog_timeout_seconds: Optional[float] = None
    crash_on_hang_timeout_seconds: Optional[float] = None
    vlog: Optional[int] = None
    overrides: Sequence[str] = ()


@dataclasses.dataclass
class Launch:
    """A trainer config that is ready to be instantiated, and how it came about.

    Attributes:
        trainer_config: The config.
        overrides: What `--set` changed, as JSON objects.
        options: What it was made from.
    """

    trainer_config: InstantiableConfig
    overrides: list[dict[str, Any]]
    options: LaunchOptions


def get_trainer_config(options: LaunchOptions) -> Launch:
    """Looks a config up and changes it as `options` say; touches no file.

    Raises:
        KeyError: If there is no such config.
        ImportError: If the recipe cannot be imported.
        ValueError: If something in `options` does not fit it.
    """
    registry = importlib.import_module(_REGISTRY_MODULE)
    from_recipe = registry.find_trainer_config(options.config, module=options.module)
    cfg = from_recipe(data_dir=options.data_dir)
    if cfg.dir is REQUIRED or options.trainer_dir is not None:
        cfg.dir = options.trainer_dir or default_run_dir(options.config)
    _apply_mesh_selector(cfg, options.mesh_selector)
    _apply_options(cfg, options)
    overrides = apply_overrides(cfg, list(options.overrides))
    _settle_mesh(cfg)
    return Launch(
        trainer_config=cfg,
        overrides=[
            {"path": o.path, "old": _text(o.old), "new": _text(o.new), "text": o.text} for o in overrides
        ],
        options=options,
    )


def _trainer_library() -> Any:
    """Returns `axlearn.common.trainer`.

    Every recipe loads it; whoever only imports this module does not, which keeps that within its budget of
    one and a half times `import jax`.
    """
    return importlib.import_module("axlearn.common.trainer")


def _apply_mesh_selector(cfg: InstantiableConfig, mesh_selector: Optional[str]) -> None:
    _trainer_library().select_mesh_config(cfg, mesh_selector=mesh_selector)
    if cfg.mesh_axis_names is REQUIRED:
        cfg.mesh_axis_names = ("data", "model")
    if cfg.mesh_shape is REQUIRED or cfg.mesh_shape is None:
        cfg.mesh_shape = (-1, *(1 for _ in cfg.mesh_axis_names[1:]))


def _settle_mesh(cfg: InstantiableConfig) -> None:
    """Puts the size of an inferred axis into the config, so that the run's files say on what it ran."""
    if not isinstance(cfg.mesh_shape, HybridMeshShape):
        cfg.mesh_shape = tuple(infer_mesh_shape(cfg.mesh_shape, num_devices=jax.device_count()))


def _apply_options(cfg: InstantiableConfig, options: LaunchOptions) -> None:
    cfg.start_trace_steps = [int(step) for step in options.trace_at_steps] or cfg.start_trace_steps
    if options.n_steps_for_each_trace is not None:
        cfg.n_steps_for_each_trace = options.n_steps_for_each_trace
    if options.log_every_n_steps is not None:
        cfg.log_every_n_steps = options.log_every_n_steps
    if options.vlog is not None:
        cfg.vlog = options.vlog
    for field in ("watchdog_timeout_seconds", "crash_on_hang_timeout_seconds"):
        if getattr(cfg, field) is None:
            setattr(cfg, field, getattr(options, field))
    if options.eval_trace_at_iters:
        for evaler in cfg.evalers.values():
            evaler.trace_at_iters = [int(i) for i in options.eval_trace_at_iters]


def build_trainer(launch: Launch) -> "SpmdTrainer":
    """Builds the trainer of a launch; touches no file."""
    return launch.trainer_config.clone().instantiate(parent=None)


def run_trainer(
    trainer: "SpmdTrainer", *, launch: Launch, flags: dict[str, Any], on_ready: Callable[[], None]
) -> Optional[dict[str, Any]]:
    """Trains, and writes what describes the run into its directory once it is sure that the run can go on.

    Args:
        trainer: The trainer, from `build_trainer`.
        launch: What it was built from.
        flags: The command line, by the names of its flags.
        on_ready: Called when the run is sure to go on, before anything is written.

    Returns:
        What `SpmdTrainer.run` returns.
    """

    def describe() -> None:
        on_ready()
        write_run_files(launch, flags=flags, write_assets=trainer.input.write_assets)

    return trainer.run(jax.random.PRNGKey(launch.options.prng_seed), on_ready=describe)


def write_run_files(launch: Launch, *, flags: dict[str, Any], write_assets: Callable[[str], None]) -> None:
    """Writes the config (as text and as JSON), flags, overrides and tokenizer into the run directory."""
    if jax.process_index() != 0:
        return
    cfg = launch.trainer_config
    make_run_dir(cfg.dir)
    files = {
        "trainer_config": cfg.debug_string(),
        "trainer_config.json": config_to_json(cfg) + "\n",
        "launch_trainer_flags": json.dumps(redacted(flags), indent=2, sort_keys=True) + "\n",
        "overrides.json": json.dumps(redacted_overrides(launch.overrides), indent=2) + "\n",
    }
    for name, text in files.items():
        write_text_durably(os.path.join(cfg.dir, name), text)
    write_assets(os.path.join(cfg.dir, "tokenizer"))


def redacted(flags: dict[str, Any]) -> dict[str, Any]:
    """Returns flags with those values replaced that look like secrets, by their name or by their form."""
    return {name: _redact(name, value) for name, value in flags.items()}


def redacted_overrides(overrides: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns overrides with values replaced that look like secrets."""
    return [
        {key: value if key == "path" else _redact(override["path"], value) for key, value in override.items()}
        for override in overrides
    ]


def _redact(name: str, value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, (list, tuple)):
        return [_redact(name, item) for item in value]
    text = str(value)
    if "=" in text:
        name = f"{name} {text.partition('=')[0]}"
    return _REDACTED if _SECRET_NAME.search(name) or _SECRET_VALUE.search(text) else value


def _text(value: Any) -> Any:
    is_json = (
        value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and isfinite(value))
    )
    return value if is_json else repr(value)
