"""From a config's name to a run: looks the recipe up, changes it as the command line says, and trains.

`launch_trainer_main` is the command; this is what it does, for programs that start runs themselves.
"""

import dataclasses
import functools
import importlib
import json
import logging
import math
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Optional

import jax

from axlearn.common.config import (
    REQUIRED,
    InstantiableConfig,
    TrainerConfigFn,
    apply_overrides,
    config_to_json,
    error_message,
    make_trainer_config,
)
from axlearn.common.file_system import write_text_durably
from axlearn.common.redaction import redact
from axlearn.common.run_dir import CONFIG_FILE, default_run_dir, make_run_dir, read_run_config
from axlearn.common.run_record import append_start, applied_mesh_rule, log_overrides, override_record
from axlearn.common.utils import HybridMeshShape, infer_mesh_shape

if TYPE_CHECKING:
    from axlearn.common.trainer import MemoryThere, SpmdTrainer

# Recipes stand above the library, so their registry is looked up by name, as a user's own module is.
_REGISTRY_MODULE = "axlearn.experiments.registry"
# What `apply_overrides` is to refuse: by then the rule has been chosen and applied.
WITHOUT_EFFECT = {
    "mesh_rules": "The rules have been applied before --set. Set the field that the rule sets, or leave out "
    "--mesh_selector."
}
# How long the search for a recipe that fits may keep the processor. A refusal should take no longer than a start does.
_SEARCH_SECONDS = 2.0


@dataclasses.dataclass
class LaunchOptions:
    """What a command line says about a run.

    Attributes:
        config: The name of the trainer config; None for the one that stands in `trainer_dir`.
        module: The module that has it; None for the recipes that come with this package. For a config that
            stands in `trainer_dir`: the module whose classes it may name besides those of this package.
        trainer_dir: The run directory; None for `runs/<config>`.
        data_dir: Where data lies, given to the recipe; None for its default.
        prng_seed: The seed of a run that begins from scratch.
        mesh_selector: The machine, for the recipe's mesh rules; None for the recipe's own mesh.
        grad_acc_steps: Micro-batches in which each batch is worked through; None for what the recipe says.
        wandb_project: The project of Weights & Biases to write summaries to as well; None for what the recipe
            says.
        trace_at_steps: Steps at which to record profiles.
        n_steps_for_each_trace: Steps of each; None for the trainer's default.
        eval_trace_at_iters: Batches of evaluations at which to record profiles.
        log_every_n_steps: Steps between two log lines; None for what the recipe says.
        watchdog_timeout_seconds: Seconds without a step after which stacks are written; used where the recipe
            has none.
        crash_on_hang_timeout_seconds: Seconds without a step after which the process ends; likewise.
        vlog: The level of the trainer's own log; None for what the recipe says.
        overrides: "path=value" in the order in which they apply, after all of the above.
        allow_without: What the recipe's name promises and this run may lack, such as "fp8".
    """

    config: Optional[str]
    module: Optional[str] = None
    trainer_dir: Optional[str] = None
    data_dir: Optional[str] = None
    prng_seed: int = 0
    mesh_selector: Optional[str] = None
    grad_acc_steps: Optional[int] = None
    wandb_project: Optional[str] = None
    trace_at_steps: Sequence[int] = ()
    n_steps_for_each_trace: Optional[int] = None
    eval_trace_at_iters: Sequence[int] = ()
    log_every_n_steps: Optional[int] = None
    watchdog_timeout_seconds: Optional[float] = None
    crash_on_hang_timeout_seconds: Optional[float] = None
    vlog: Optional[int] = None
    overrides: Sequence[str] = ()
    allow_without: Sequence[str] = ()


@dataclasses.dataclass
class Launch:
    """A trainer config that is ready to be instantiated, and how it came about.

    Attributes:
        trainer_config: The config.
        overrides: What `--set` changed, as JSON objects.
        options: What it was made from.
        mesh_rule: The mesh rule that was applied, in words; None where there was no selector.
    """

    trainer_config: InstantiableConfig
    overrides: list[dict[str, Any]]
    options: LaunchOptions
    mesh_rule: Optional[str] = None


def get_trainer_config(options: LaunchOptions) -> Launch:
    """Looks a config up and changes it as `options` say; touches no file.

    Raises:
        KeyError: If there is no such config.
        ImportError: If the recipe cannot be imported.
        ValueError: If something in `options` does not fit it, or there is neither a name nor a run.
    """
    recipe = None if options.config is None else _find_recipe(options.config, options)
    cfg = _config_of_run(options) if recipe is None else _config_of_recipe(recipe, options)
    mesh_rule = _chosen_rule(cfg, options.mesh_selector)
    _apply_mesh_selector(cfg, None if _has_rule_already(mesh_rule, options) else options.mesh_selector)
    _apply_options(cfg, options)
    _apply_grad_acc_steps(cfg, options.grad_acc_steps)
    _apply_wandb_project(cfg, options.wandb_project)
    overrides = apply_overrides(
        cfg,
        list(options.overrides),
        import_prefixes=import_prefixes(options.module),
        without_effect=WITHOUT_EFFECT,
    )
    log_overrides(overrides)
    if recipe is not None:
        _check_promises(recipe, cfg, options)
    _settle_mesh(cfg, options)
    return Launch(
        trainer_config=cfg,
        overrides=[override_record(override) for override in overrides],
        options=options,
        mesh_rule=mesh_rule,
    )


def import_prefixes(module: Optional[str]) -> tuple[str, ...]:
    """Returns the packages whose classes a command line may name: this one, and that of the recipe's module."""
    return ("axlearn.",) if module is None else ("axlearn.", module.split(".")[0] + ".")


def _find_recipe(name: str, options: LaunchOptions) -> TrainerConfigFn:
    registry = importlib.import_module(_REGISTRY_MODULE)
    recipe: TrainerConfigFn = registry.find_trainer_config(name, module=options.module)
    return recipe


def _config_of_recipe(recipe: TrainerConfigFn, options: LaunchOptions) -> InstantiableConfig:
    cfg: InstantiableConfig = make_trainer_config(recipe, data_dir=options.data_dir)
    if cfg.dir is REQUIRED or options.trainer_dir is not None:
        cfg.dir = options.trainer_dir or default_run_dir(options.config or "")
    return cfg


def _check_promises(recipe: TrainerConfigFn, cfg: InstantiableConfig, options: LaunchOptions) -> None:
    """Refuses a run that is not what the recipe's name says of it."""
    importlib.import_module("axlearn.common.promises").check_promises(
        recipe,
        cfg,
        allow_without=options.allow_without,
        mesh_selector=options.mesh_selector,
        data_dir=options.data_dir,
    )


def _config_of_run(options: LaunchOptions) -> InstantiableConfig:
    """Reads the config that a run, or a command that prepared one, wrote into the run directory."""
    path = os.path.join(options.trainer_dir or "", CONFIG_FILE)
    if options.trainer_dir is None or not os.path.isfile(path):
        raise ValueError(
            error_message(
                where="--config",
                what=f"is missing, and there is no {path}",
                expected="the name of a config, such as --config=fuji-tiny, or the directory of a run to continue",
            )
        )
    if options.data_dir is not None:
        raise ValueError(
            error_message(
                where="--data_dir",
                what="is for a recipe, and without --config none is asked",
                advice=f"Change the fields of {path} that say where the data lie with --set, or name the recipe.",
            )
        )
    cfg: InstantiableConfig = read_run_config(
        options.trainer_dir, import_prefixes=import_prefixes(options.module)
    )
    return cfg


def _apply_grad_acc_steps(cfg: InstantiableConfig, grad_acc_steps: Optional[int]) -> None:
    if grad_acc_steps is None:
        return
    modifiers = importlib.import_module("axlearn.common.trainer_config_modifier")
    modifiers.GradientAccumulationModifier.default_config().set(grad_acc_steps=grad_acc_steps).instantiate()(
        cfg
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


def _chosen_rule(cfg: InstantiableConfig, mesh_selector: Optional[str]) -> Optional[str]:
    if not mesh_selector:
        return None
    return str(_trainer_library().find_mesh_rule(cfg, mesh_selector=mesh_selector))


def _has_rule_already(mesh_rule: Optional[str], options: LaunchOptions) -> bool:
    """Whether the config of a run that is continued has a rule's changes already, and what was set on top of them.

    Raises:
        ValueError: If it has those of another rule, which nothing takes back.
    """
    if mesh_rule is None or options.config is not None:
        return False
    applied = applied_mesh_rule(options.trainer_dir or "")
    if applied is None:
        return False
    if applied != mesh_rule:
        raise ValueError(
            error_message(
                where="--mesh_selector",
                what=f"{options.mesh_selector!r} chooses {mesh_rule}, and the config of this run has been changed by "
                f"{applied}",
                expected="the same rule, or no --mesh_selector",
                advice="Change what is different here with --set, or name the recipe with --config: it is asked again, "
                "and the rule applies to what it says.",
            )
        )
    logging.info("The config of this run has the changes of %s already.", mesh_rule)
    return True


def _settle_mesh(cfg: InstantiableConfig, options: LaunchOptions) -> None:
    """Puts the size of an inferred axis into the config, so that the run's files say on what it ran.

    Raises:
        ValueError: If the mesh that a run has in its files is for another number of devices.
    """
    if isinstance(cfg.mesh_shape, HybridMeshShape):
        return
    num_devices, shape = jax.device_count(), tuple(cfg.mesh_shape)
    if options.config is None and -1 not in shape and math.prod(shape) != num_devices:
        raise ValueError(
            error_message(
                where="mesh_shape",
                what=f"{shape}, on which this run ran before, is for {_devices(math.prod(shape))}, "
                f"and here {'is' if num_devices == 1 else 'are'} {num_devices}",
                advice=f"Continue it with --set 'mesh_shape={_opened(shape, tuple(cfg.mesh_axis_names))}', or another "
                "shape for these devices.",
            )
        )
    cfg.mesh_shape = tuple(infer_mesh_shape(shape, num_devices=num_devices))


def _devices(count: int) -> str:
    return "1 device" if count == 1 else f"{count} devices"


def _opened(shape: tuple[int, ...], names: tuple[str, ...]) -> tuple[int, ...]:
    """Returns a mesh shape with the axis to be inferred that has most devices, or else is for data."""
    axis = max(range(len(shape)), key=lambda i: (shape[i], names[i : i + 1] == ("data",), -i))
    return (*shape[:axis], -1, *shape[axis + 1 :])


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


def _apply_wandb_project(cfg: InstantiableConfig, wandb_project: Optional[str]) -> None:
    if wandb_project is not None:
        writers = importlib.import_module("axlearn.common.summary_writer")
        writers.WandBModifier.default_config().set(project=wandb_project).instantiate()(cfg)


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

    try:
        return trainer.run(jax.random.PRNGKey(launch.options.prng_seed), on_ready=describe)
    except _trainer_library().DoesNotFitError as e:
        e.add_note(largest_recipe_text(e.there))
        raise


def _dry_run_library() -> Any:
    """Returns `axlearn.common.dry_run`, which only refusals and dry runs need."""
    return importlib.import_module("axlearn.common.dry_run")


def dry_run(trainer: "SpmdTrainer", *, compile_step: bool) -> tuple[str, bool]:
    """Finds out what a run would take; runs, reads and writes nothing.

    Args:
        trainer: The trainer, from `build_trainer`.
        compile_step: Whether to compile the step, for the memory that its compiler states.

    Returns:
        What was found, as text, and whether the run fits; True also where nobody can tell.
    """
    library = _dry_run_library()
    with trainer.mesh() as mesh:
        there = _trainer_library().memory_there(list(mesh.devices.flat))
    report = library.dry_run(trainer, there=there, compile_step=compile_step)
    text: str = library.dry_run_text(report)
    if report.fits is not False:
        return text, True
    return f"{text}\n{largest_recipe_text(there)}", False


def largest_recipe_text(there: "MemoryThere") -> str:
    """Returns a sentence that names the largest listed recipe whose dry run fits.

    Args:
        there: The memory there.
    """

    def prepared(from_recipe: Callable[..., InstantiableConfig]) -> InstantiableConfig:
        cfg = from_recipe(data_dir=None)
        if cfg.dir is REQUIRED:
            cfg.dir = default_run_dir("dry_run")
        _apply_mesh_selector(cfg, None)
        return cfg

    listed = importlib.import_module(_REGISTRY_MODULE).listed_trainer_configs()
    candidates = {name: functools.partial(prepared, from_recipe) for name, from_recipe in listed}
    text: str = _dry_run_library().largest_recipe_text(
        candidates, there=there, timeout_seconds=_SEARCH_SECONDS
    )
    return text


def write_run_files(launch: Launch, *, flags: dict[str, Any], write_assets: Callable[[str], None]) -> None:
    """Writes the config (as text and as JSON), flags, overrides and tokenizer into the run directory."""
    if jax.process_index() != 0:
        return
    cfg = launch.trainer_config
    make_run_dir(cfg.dir)
    files = {
        "trainer_config": cfg.debug_string(),
        CONFIG_FILE: config_to_json(cfg) + "\n",
        "launch_trainer_flags": json.dumps(redacted(flags), indent=2, sort_keys=True) + "\n",
    }
    for name, text in files.items():
        write_text_durably(os.path.join(cfg.dir, name), text)
    append_start(
        cfg.dir,
        config=launch.options.config,
        mesh_rule=launch.mesh_rule,
        num_devices=jax.device_count(),
        overrides=launch.overrides,
    )
    write_assets(os.path.join(cfg.dir, "tokenizer"))


def redacted(flags: dict[str, Any]) -> dict[str, Any]:
    """Returns flags with those values replaced that look like secrets, by their name or by their form."""
    return {name: redact(name, value) for name, value in flags.items()}
