"""What the name of a recipe says of a run, and the rule of a machine may not keep.

A recipe "...-fp8" changes its mesh rules, and some of them only: on other machines it is the same as without. No config
says what was promised, so that goes with the function that the name stands for.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Optional, TypeVar

from axlearn.common.config import ConfigBase, InstantiableConfig, error_message, make_trainer_config
from axlearn.common.layers import for_each_config
from axlearn.common.quantized_dot_general import uses_fp8
from axlearn.common.trainer import find_mesh_rule
from axlearn.common.trainer_config_modifier import FP8ConfigModifier

FnT = TypeVar("FnT", bound=Callable[..., Any])

_ATTRIBUTE = "promises"


@dataclasses.dataclass(frozen=True)
class Promise:
    """Something that a recipe's name says of every run.

    Attributes:
        name: What it is called in `--allow_without`, such as "fp8".
        what: What the run has, for messages: "matrix products in float8".
        remedy: What else one can do where no rule keeps it, likewise.
        is_kept: From a trainer config, of which nothing may be changed, to whether it is so.
        is_kept_by_rule: From what stands in `mesh_rules` behind a pattern to whether it would make it so, judged
            without applying it: for messages.
    """

    name: str
    what: str
    remedy: str
    is_kept: Callable[[InstantiableConfig], bool]
    is_kept_by_rule: Callable[[Any], bool]


@dataclasses.dataclass(frozen=True)
class BrokenPromise:
    """A promise that a config does not keep.

    Attributes:
        name: See `Promise`.
        message: What is wrong, and which of the recipe's mesh rules keep it.
    """

    name: str
    message: str


def _turns_fp8_on(rule: Any) -> bool:
    """Whether a mesh rule is or holds an `FP8ConfigModifier`."""
    found = []
    if isinstance(rule, ConfigBase):
        for_each_config(rule, lambda cfg: found.append(isinstance(cfg, FP8ConfigModifier.Config)))
    return any(found)


# "...-fp8": dense layers multiply in float8.
FP8_PROMISE = Promise(
    name="fp8",
    what="matrix products in float8",
    remedy="apply FP8ConfigModifier in a recipe of your own",
    is_kept=lambda trainer_config: uses_fp8(trainer_config.model),
    is_kept_by_rule=_turns_fp8_on,
)


def with_promises(fn: FnT, promises: Sequence[Promise]) -> FnT:
    """Attaches promises to the function that a recipe's name stands for.

    Args:
        fn: A function that makes a trainer config, of this name alone.
        promises: What the name says.

    Returns:
        `fn`.
    """
    setattr(fn, _ATTRIBUTE, tuple(promises))
    return fn


def promises_of(fn: Callable[..., Any]) -> tuple[Promise, ...]:
    """The promises that were attached to a function; often none."""
    found: tuple[Promise, ...] = getattr(fn, _ATTRIBUTE, ())
    return found


def broken_promises(
    fn: Callable[..., InstantiableConfig],
    cfg: InstantiableConfig,
    *,
    mesh_selector: Optional[str] = None,
    data_dir: Optional[str] = None,
) -> list[BrokenPromise]:
    """Finds what a recipe promises and a config made by it does not keep.

    Args:
        fn: The function that the recipe's name stands for.
        cfg: The config as it is about to be run, with mesh rule and overrides.
        mesh_selector: What chose the mesh rule, for the message; None: none was chosen.
        data_dir: For `fn`, which is called again if something is broken.

    Returns:
        What is broken; nothing where `fn` has no promises.
    """
    return [
        BrokenPromise(promise.name, _message(promise, fn, mesh_selector=mesh_selector, data_dir=data_dir))
        for promise in promises_of(fn)
        if not promise.is_kept(cfg)
    ]


def check_promises(
    fn: Callable[..., InstantiableConfig],
    cfg: InstantiableConfig,
    *,
    allow_without: Sequence[str] = (),
    mesh_selector: Optional[str] = None,
    data_dir: Optional[str] = None,
) -> None:
    """Refuses a config that breaks a promise of its recipe.

    Args:
        fn: See `broken_promises`.
        cfg: See `broken_promises`.
        allow_without: The names of promises that need not be kept.
        mesh_selector: See `broken_promises`.
        data_dir: See `broken_promises`.

    Raises:
        ValueError: If it does, or `allow_without` names what the recipe does not promise.
    """
    names = [promise.name for promise in promises_of(fn)]
    for name in allow_without:
        if name not in names:
            raise ValueError(
                error_message(
                    where="--allow_without",
                    what=f"the recipe's name does not promise {name!r}",
                    expected=f"one of: {', '.join(names)}" if names else "nothing, as it promises nothing",
                )
            )
    broken = broken_promises(fn, cfg, mesh_selector=mesh_selector, data_dir=data_dir)
    refused = [found.message for found in broken if found.name not in allow_without]
    if refused:
        raise ValueError("\n".join(refused))


def _message(
    promise: Promise,
    fn: Callable[..., InstantiableConfig],
    *,
    mesh_selector: Optional[str],
    data_dir: Optional[str],
) -> str:
    cfg = make_trainer_config(fn, data_dir=data_dir)
    patterns = [pattern for pattern, rule in cfg.mesh_rules or () if promise.is_kept_by_rule(rule)]
    chosen = f"with the mesh selector {mesh_selector!r}" if mesh_selector else "without a mesh selector"
    if mesh_selector and promise.is_kept_by_rule(find_mesh_rule(cfg, mesh_selector=mesh_selector).rule):
        chosen += " its mesh rule has it, but behind --set"
        expected = f"no --set that takes it away from what the rule for {mesh_selector!r} makes"
    elif patterns:
        expected = f"a mesh selector for one of the rules that have it: {', '.join(map(repr, patterns))}"
    else:
        expected = "a recipe with a mesh rule that has it; none of this one's does"
    return error_message(
        where="--mesh_selector",
        what=f"the recipe's name promises {promise.name}, and {chosen} the run has no {promise.what}",
        expected=expected,
        advice=f"Run it as it is with --allow_without={promise.name}, or {promise.remedy}",
    )
