"""What a trainer is refused for before anything runs."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Union

from axlearn.common.base_layer import BaseLayer, ParameterSpec
from axlearn.common.config import REQUIRED, RequiredFieldMissingError, error_message
from axlearn.common.learner import BaseLearner
from axlearn.common.module import Module
from axlearn.common.quantized_dot_general import get_all_fp8_param_names, uses_fp8
from axlearn.common.trainer._saved_step import problems_of_executable
from axlearn.common.utils import Nested, flatten_items

# Fields of the public config whose machinery this version lacks; setting one is refused, not ignored.
_NOT_BUILT = ("init_state_builder", "xsc_check_policy", "device_monitor")


def check_trainer_config(cfg: Any) -> None:
    """Refuses what would otherwise be ignored, and what would only be noticed much later.

    Args:
        cfg: A `SpmdTrainer.Config`.

    Raises:
        ValueError: With all that is wrong.
    """
    problems = [
        *(_not_built(cfg, field) for field in _NOT_BUILT if getattr(cfg, field) is not None),
        *_problems(cfg),
    ]
    if problems:
        raise ValueError("\n".join(problems))


def batch_axis_names(names: Union[str, Sequence[str]]) -> tuple[str, ...]:
    """Returns the mesh axes over which the rows of a batch are split, as a tuple."""
    return (names,) if isinstance(names, str) else tuple(names)


def _not_built(cfg: Any, field: str) -> str:
    return error_message(
        where=f"{cfg.name}.{field}", what="this is not available in this version", expected="None"
    )


def _problems(cfg: Any) -> list[str]:
    problems = []
    if not cfg.prune_empty_state_updates:
        problems.append(
            error_message(where=f"{cfg.name}.prune_empty_state_updates", what="False", expected="True")
        )
    if getattr(cfg.model, "dtype", REQUIRED) in (None, REQUIRED):
        problems.append(
            error_message(
                where=f"{cfg.name}.model.dtype",
                what="the type of the parameters is not set",
                expected="a dtype such as jnp.float32",
            )
        )
    # Written so that NaN is refused as well.
    if not cfg.max_step >= 0:
        problems.append(
            error_message(
                where=f"{cfg.name}.max_step",
                what=f"{cfg.max_step} is not a number of steps",
                expected="at least 0, or infinity for all of the data",
            )
        )
    if cfg.log_every_n_steps is not None and cfg.log_every_n_steps < 1:
        problems.append(
            error_message(
                where=f"{cfg.name}.log_every_n_steps",
                what=f"{cfg.log_every_n_steps} is not a number of steps",
                expected="at least 1, or None for 100",
            )
        )
    for field, values in (
        ("start_trace_steps", cfg.start_trace_steps),
        (
            "n_steps_for_each_trace",
            [] if cfg.n_steps_for_each_trace is None else [cfg.n_steps_for_each_trace],
        ),
    ):
        if any(value < 1 for value in values):
            problems.append(
                error_message(
                    where=f"{cfg.name}.{field}", what=f"{min(values)} is no step", expected="at least 1"
                )
            )
    for axis in batch_axis_names(cfg.batch_axis_names):
        if axis not in cfg.mesh_axis_names:
            problems.append(
                error_message(
                    where=f"{cfg.name}.batch_axis_names",
                    what=f"{axis!r} is no axis of the mesh",
                    expected=f"some of {tuple(cfg.mesh_axis_names)}",
                )
            )
    return [*problems, *problems_of_executable(cfg)]


@contextlib.contextmanager
def collecting_missing(missing: list[RequiredFieldMissingError]) -> Iterator[None]:
    """Adds to `missing` what a config below lacks, in place of raising it."""
    try:
        yield
    except RequiredFieldMissingError as e:
        missing.append(e)


def check_vocabularies(model: BaseLayer, *, inputs: Iterable[Module]) -> None:
    """Lets a model that knows its vocabulary refuse inputs with a larger one.

    Args:
        model: The model; it may have `check_vocab_size(vocab_size, where=...)`.
        inputs: The inputs; each may have `vocab_size`, None where it does not know.

    Raises:
        ValueError: What the model says of the first input that does not fit.
    """
    check_vocab_size = getattr(model, "check_vocab_size", None)
    if check_vocab_size is None:
        return
    for data in inputs:
        vocab_size = getattr(data, "vocab_size", None)
        if vocab_size is not None:
            check_vocab_size(vocab_size, where=data.path())


def check_new_values(model: BaseLayer, *, learner: BaseLearner, model_specs: Nested[ParameterSpec]) -> None:
    """Refuses a learner that would take the new values of float8 scales for gradients.

    Args:
        model: The model.
        learner: The learner.
        model_specs: The parameters of the model.

    Raises:
        ValueError: If it would.
    """
    if not uses_fp8(model.config):
        return
    is_safe = dict(flatten_items(learner.gradient_is_new_value(model_specs)))
    is_optimized = dict(flatten_items(learner.should_update_with_optimizers(model_specs)))
    names = get_all_fp8_param_names()
    for path, _ in flatten_items(model_specs):
        if path.rsplit("/", 1)[-1] in names and is_optimized[path] and not is_safe[path]:
            raise ValueError(
                error_message(
                    where=f"{learner.path()}.optimizer",
                    what=f"the optimizer would change {path!r} by its gradient, which is its new value",
                    expected="an OverrideInplaceUpdateTransformation with a rule for the parameters of float8 products",
                    advice="Turn float8 on with FP8ConfigModifier, which sees to both",
                )
            )
