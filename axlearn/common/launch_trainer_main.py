"""Trains a model: `python -m axlearn.common.launch_trainer_main --config=NAME`.

The recipe is found by its name; the run goes to runs/NAME unless --trainer_dir says otherwise, and continues
there when it is started again. Without --config the config that stands in --trainer_dir is started or continued.
--dry_run shows what a run would take. Exit statuses: 0 done; 1 an error in the run; 2 the command line or the config
was refused and nothing was touched; 143 (130) stopped by SIGTERM (SIGINT) after a save. AXLEARN_TRACEBACK=1 in
the environment shows where an error was raised.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Optional

from absl import flags

import axlearn
from axlearn.common.distributed import (
    HEARTBEAT_TIMEOUT_SECONDS,
    INITIALIZATION_TIMEOUT_SECONDS,
    PeersMissingError,
    Place,
    find_place,
)
from axlearn.common.run_dir import check_run_dir, default_run_dir
from axlearn.common.user_errors import error_text, is_for_users

FLAGS = flags.FLAGS
# `launch.BACKENDS`, which would load jax.
_BACKENDS = ("cpu", "gpu", "tpu")


class _DryRunParser(flags.ArgumentParser):
    """Parses --dry_run, --dry_run=compile and --nodry_run into "shapes", "compile" and None."""

    def parse(self, argument: Any) -> Optional[str]:
        modes = {"true": "shapes", "compile": "compile", "false": None}
        if argument not in modes:
            raise ValueError("Expected --dry_run or --dry_run=compile")
        return modes[argument]

    def flag_type(self) -> str:
        return "'compile' or nothing"


_CONFIG = flags.DEFINE_string(
    "config",
    None,
    "The name of the trainer config, such as fuji-tiny. By default the config that stands in --trainer_dir.",
)
_MODULE = flags.DEFINE_string(
    "module",
    None,
    "The module whose named_trainer_configs() has it, such as my_project.recipes or text.gpt.fuji_tiny. By "
    "default all recipes that come with this package are looked through.",
)
flags.DEFINE_alias("config_module", "module")
_TRAINER_DIR = flags.DEFINE_string("trainer_dir", None, "The run directory; by default runs/<config>.")
_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "Where data sets and tokenizers lie; FAKE for made-up data. By default $DATA_DIR."
)
_JAX_BACKEND = flags.DEFINE_enum(
    "jax_backend", None, _BACKENDS, "Insist on this backend. By default what the machine has is detected."
)
_SEED = flags.DEFINE_integer("trainer_prng_seed", 0, "The seed of a run that begins from scratch.")
_MESH_SELECTOR = flags.DEFINE_string(
    "mesh_selector",
    None,
    "The machine, such as tpu-v5p-128, by which the recipe's mesh rules choose the mesh.",
)
_GRAD_ACC_STEPS = flags.DEFINE_integer(
    "grad_acc_steps",
    None,
    "Work through each batch in so many micro-batches, one after another: the same numbers in less memory.",
    lower_bound=1,
)
_WANDB_PROJECT = flags.DEFINE_string(
    "wandb_project",
    None,
    "Write summaries to this project of Weights & Biases as well; see docs/evaluation.md.",
)
_DRY_RUN = flags.DEFINE_flag(
    flags.Flag(
        _DryRunParser(),
        None,
        "dry_run",
        None,
        "Build everything and run nothing: print the parameters, where they lie, FLOPs, and whether the run fits "
        "into the memory there; the status is 2 if it does not. --dry_run=compile: compile the step as well, for "
        "the compiler's own figures.",
        boolean=True,
    )
)
_SET = flags.DEFINE_multi_string(
    "set",
    [],
    "path=value: change a field of the config, by the path that it has in the run's trainer_config file. "
    "Repeatable. Such as --set max_step=100.",
)
_ALLOW_WITHOUT = flags.DEFINE_list(
    "allow_without",
    [],
    "What the recipe's name promises and this run may lack all the same, such as fp8.",
)
_TRACE_AT_STEPS = flags.DEFINE_list(
    "trace_at_steps", [], "Steps at which to begin a profile, such as 10,100."
)
_N_STEPS_FOR_EACH_TRACE = flags.DEFINE_integer("n_steps_for_each_trace", None, "Steps of each profile.")
_EVAL_TRACE_AT_ITERS = flags.DEFINE_list(
    "eval_trace_at_iters", [], "Batches of each evaluation to record profiles of, counted from 0."
)
_LOG_EVERY_N_STEPS = flags.DEFINE_integer(
    "trainer_log_every_n_steps",
    None,
    "Steps between two lines of the log; by default what the recipe says, or 100.",
)
_WATCHDOG_TIMEOUT = flags.DEFINE_integer(
    "trainer_watchdog_timeout_seconds", 3600, "Seconds without a new step after which all stacks are printed."
)
_CRASH_TIMEOUT = flags.DEFINE_integer(
    "trainer_crash_on_hang_timeout_seconds",
    7200,
    "Seconds without a new step after which the process kills itself.",
)
_COORDINATOR = flags.DEFINE_string(
    "distributed_coordinator",
    None,
    "HOST:PORT on which process 0 of several listens. By default $DISTRIBUTED_COORDINATOR, or what SLURM or the TPU "
    "says; see docs/hosts.md.",
)
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes",
    None,
    "How many processes train together. By default $NUM_PROCESSES, likewise.",
    lower_bound=1,
)
_PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "Which of them this is, from 0 on. By default $PROCESS_ID, likewise.", lower_bound=0
)
_INITIALIZATION_TIMEOUT = flags.DEFINE_integer(
    "initialization_timeout",
    INITIALIZATION_TIMEOUT_SECONDS,
    "Seconds to wait for the other processes.",
    lower_bound=1,
)
_HEARTBEAT_TIMEOUT = flags.DEFINE_integer(
    "heartbeat_timeout",
    HEARTBEAT_TIMEOUT_SECONDS,
    "Seconds without a sign of life of a process after which it is taken for dead and the others end.",
    lower_bound=5,
)
_VLOG = flags.DEFINE_integer(
    "vlog", None, "The level of detail of the log; with any, errors show their traceback."
)


def main(argv: Sequence[str]) -> int:
    """Runs the command.

    Args:
        argv: The command line, the program's name first.

    Returns:
        The exit status.
    """
    if any(arg in ("-h", "-help", "--help") for arg in argv[1:]):
        print(f"{__doc__}\nFlags:\n{FLAGS.module_help(flags_module())}")
        return 0
    try:
        _parse(argv)
        check_links()
        place = _place()
        if _DRY_RUN.value is None:
            check_run_dir(_TRAINER_DIR.value or default_run_dir(str(_CONFIG.value)))
    except (flags.Error, OSError, ValueError) as e:
        return _refuse(e)
    with _interrupts_end_the_process():
        return _launch(_load_library(), place=place)


def _place() -> Place:
    """Returns which process of a run this one is.

    Raises:
        ValueError: If flags and environment do not say it.
    """
    return find_place(
        os.environ,
        coordinator=_COORDINATOR.value,
        num_processes=_NUM_PROCESSES.value,
        process_id=_PROCESS_ID.value,
        jax_backend=_JAX_BACKEND.value,
    )


@contextlib.contextmanager
def _interrupts_end_the_process() -> Iterator[None]:
    """A context in which Ctrl-C ends the process at once and silently.

    Until the trainer listens to signals nothing is written that could be left half done. A KeyboardInterrupt in
    the middle of an import, on the other hand, prints pages, or gets lost in a library that catches everything.
    """
    is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not is_default or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def flags_module() -> str:
    """Returns the name under which the flags of this command are registered."""
    return str(FLAGS.find_module_defining_flag("trainer_prng_seed"))


def _parse(argv: Sequence[str]) -> None:
    try:
        rest = FLAGS(list(argv))[1:]
    except ValueError as e:
        # What absl raises for a value behind --noFLAG.
        raise flags.Error(str(e)) from e
    if rest:
        raise flags.Error(f"{rest[0]!r} is not a flag. Expected --config=NAME and more flags; see --help.")
    if not _CONFIG.value and not _TRAINER_DIR.value:
        raise flags.Error(
            "--config is missing. Expected the name of a config, such as --config=fuji-tiny, or --trainer_dir=RUN "
            "to continue a run."
        )
    for flag in (_TRACE_AT_STEPS, _EVAL_TRACE_AT_ITERS):
        wrong = [item for item in flag.value if not item.isdecimal()]
        if wrong:
            raise flags.Error(
                f"--{flag.name}: {wrong[0]!r} is not a number. Expected numbers such as 10,100."
            )


def check_links() -> None:
    """Refuses a checkout in which the folders that are links came out as text files.

    Raises:
        NotADirectoryError: If `axlearn/experiments` or `axlearn/launch` is not a folder.
    """
    root = os.path.dirname(os.path.abspath(axlearn.__file__))
    for name in ("experiments", "launch"):
        if not os.path.isdir(os.path.join(root, name)):
            raise NotADirectoryError(
                f"{os.path.join(root, name)} is not a folder: this checkout lost its links, as a zip "
                f"download does. Use `git clone`, or make it a link to ../{name}."
            )


def _load_library() -> tuple[Any, Any]:
    """Returns (launch, launch_trainer). They load jax, which takes longer than all that is done before."""
    from axlearn.common import launch, launch_trainer

    return launch, launch_trainer


def _launch(library: tuple[Any, Any], *, place: Place) -> int:
    launch, launch_trainer = library
    launch.set_up_logging()
    is_dry_run = _DRY_RUN.value is not None
    try:
        launch.setup(
            jax_backend=_JAX_BACKEND.value,
            data_dir=_DATA_DIR.value,
            leave_no_trace=is_dry_run,
            place=place,
            initialization_timeout=_INITIALIZATION_TIMEOUT.value,
            heartbeat_timeout=_HEARTBEAT_TIMEOUT.value,
        )
        launched = launch_trainer.get_trainer_config(_options(launch_trainer))
        if not is_dry_run:
            check_run_dir(launched.trainer_config.dir)
        trainer = launch_trainer.build_trainer(launched)
        if is_dry_run:
            text, fits = launch_trainer.dry_run(trainer, compile_step=_DRY_RUN.value == "compile")
            if launch.is_first_process():
                _print(text)
            return 0 if fits else 2
    except Exception as e:
        return _end(launch, e, status=_refuse(e))
    began: list[bool] = []
    try:
        launch_trainer.run_trainer(
            trainer, launch=launched, flags=flag_values(), on_ready=lambda: began.append(True)
        )
    except SystemExit as e:
        print(e, file=sys.stderr)
        return e.code if isinstance(e.code, int) else 1
    except Exception as e:
        # Data that are not there, a checkpoint of another model: found out before the run wrote anything.
        if isinstance(e, (ValueError, OSError)) and not began:
            return _end(launch, e, status=_refuse(e))
        if not place.is_alone and type(e).__name__ == "JaxRuntimeError":
            e.add_note("Another process may have ended, which stops all: look at its output first.")
        _print_error(e)
        return _end(launch, e, status=1)
    return 0


def _end(launch: Any, e: BaseException, *, status: int) -> int:
    """Returns the status; where there are other processes, they and this one end with it here."""
    launch.end_with_peers(status=status, text=error_text(e))
    return status


def _print(text: str) -> None:
    """Prints a text, which whoever reads it may have had enough of before its end, as `head` has."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # The interpreter flushes once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _options(launch_trainer: Any) -> Any:
    return launch_trainer.LaunchOptions(
        config=_CONFIG.value or None,
        module=_MODULE.value,
        trainer_dir=_TRAINER_DIR.value,
        data_dir=_DATA_DIR.value,
        prng_seed=_SEED.value,
        mesh_selector=_MESH_SELECTOR.value,
        grad_acc_steps=_GRAD_ACC_STEPS.value,
        wandb_project=_WANDB_PROJECT.value,
        trace_at_steps=[int(step) for step in _TRACE_AT_STEPS.value],
        n_steps_for_each_trace=_N_STEPS_FOR_EACH_TRACE.value,
        eval_trace_at_iters=[int(i) for i in _EVAL_TRACE_AT_ITERS.value],
        log_every_n_steps=_LOG_EVERY_N_STEPS.value,
        watchdog_timeout_seconds=_WATCHDOG_TIMEOUT.value,
        crash_on_hang_timeout_seconds=_CRASH_TIMEOUT.value,
        vlog=_VLOG.value,
        overrides=_SET.value,
        allow_without=_ALLOW_WITHOUT.value,
    )


def flag_values() -> dict[str, Any]:
    """Returns the flags of this command and their values, without those of the libraries that it uses."""
    return {flag.name: flag.value for flag in FLAGS.flags_by_module_dict()[flags_module()]}


def _refuse(e: BaseException) -> int:
    _print_error(e)
    if isinstance(e, PeersMissingError):
        # Nothing is wrong with the command line; the same one may do next time.
        return 1
    # What a user did not cause is no refusal of what the user asked for.
    return 2 if isinstance(e, flags.Error) or is_for_users(e) else 1


def _print_error(e: BaseException) -> None:
    if isinstance(e, flags.Error):
        print(f"launch_trainer_main: {e}", file=sys.stderr)
    else:
        print(error_text(e, with_traceback=_VLOG.value is not None), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
