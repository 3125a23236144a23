"""Trainer configs by name, as recipes publish them."""

import importlib
import inspect
from collections.abc import Callable
from typing import Any, Optional, Protocol

from axlearn.common.config._base import ConfigBase
from axlearn.common.config._configurable import InstantiableConfig
from axlearn.common.config._errors import error_message
from axlearn.common.config._names import listing, nearest_names, public_name


class TrainerConfigFn(Protocol):
    """Returns a trainer config."""

    def __call__(self, data_dir: Optional[str] = None) -> InstantiableConfig[Any]:
        """Returns a new config.

        Args:
            data_dir: Where the data lies. None: where the recipe says.
        """
        ...


def with_overrides(trainer_config_fn: TrainerConfigFn, **kwargs: Any) -> TrainerConfigFn:
    """Returns a function that makes the same config with some fields set.

    Args:
        trainer_config_fn: Makes the config.
        **kwargs: Values of its top-level fields.
    """

    def fn(data_dir: Optional[str] = None) -> InstantiableConfig[Any]:
        cfg: InstantiableConfig[Any] = make_trainer_config(trainer_config_fn, data_dir=data_dir)
        return cfg.set(**kwargs)

    return fn


def make_trainer_config(trainer_config_fn: TrainerConfigFn, *, data_dir: Optional[str] = None) -> Any:
    """Calls a recipe.

    Args:
        trainer_config_fn: The recipe. One without a parameter `data_dir` is not given any.
        data_dir: Where data lies, for the recipe; None for its default.

    Returns:
        The config.

    Raises:
        ValueError: If this is no function, or what it returns is no config.
        Exception: What the recipe raises.
    """
    what = getattr(trainer_config_fn, "__name__", type(trainer_config_fn).__name__)
    if not callable(trainer_config_fn):
        raise ValueError(
            error_message(
                where="named_trainer_configs()",
                what=f"{_described(trainer_config_fn)} stands for a recipe",
                expected="a function that returns it, so that it is made when it is asked for",
            )
        )
    cfg = trainer_config_fn(data_dir=data_dir) if _takes_data_dir(trainer_config_fn) else trainer_config_fn()
    if not isinstance(cfg, ConfigBase):
        raise ValueError(
            error_message(
                where=what,
                what=f"the recipe returned {_described(cfg)}",
                expected="a trainer config",
                advice="Is its 'return cfg' missing?" if cfg is None else None,
            )
        )
    return cfg


def _described(value: Any) -> str:
    if value is None:
        return "None"
    return "a config" if isinstance(value, ConfigBase) else f"a value of {public_name(type(value))}"


def _takes_data_dir(fn: Callable[..., Any]) -> bool:
    parameters = inspect.signature(fn).parameters.values()
    return any(each.name == "data_dir" or each.kind is each.VAR_KEYWORD for each in parameters)


def get_named_trainer_config(config_name: str, *, config_module: str) -> TrainerConfigFn:
    """Returns the function that makes a named config of a recipe.

    Args:
        config_name: The name, such as `fuji-test-v1`.
        config_module: The recipe's module. Its `named_trainer_configs()` returns a dict from names to
            functions, or a function from a name to a function.

    Returns:
        A function that makes the config.

    Raises:
        ImportError: If the module, or what it needs, cannot be imported; nothing hides the reason.
        AttributeError: If the module has no `named_trainer_configs`.
        KeyError: If it has no config of this name.
    """
    module = importlib.import_module(config_module)
    if not hasattr(module, "named_trainer_configs"):
        raise AttributeError(
            error_message(
                where=config_module,
                what="the module has no named_trainer_configs()",
                expected="a function that returns trainer configs by name",
            )
        )
    configs = module.named_trainer_configs()
    if callable(configs):
        result: TrainerConfigFn = configs(config_name)
        return result
    if config_name not in configs:
        raise UnknownConfigNameError(
            error_message(
                where=config_module,
                what=f"Unrecognized config '{config_name}'",
                nearest=nearest_names(config_name, configs),
                advice=f"Configs: {listing(sorted(configs))}",
            )
        )
    named: TrainerConfigFn = configs[config_name]
    return named


class UnknownConfigNameError(KeyError):
    """A recipe has no config of this name. Unlike other KeyErrors it prints its message as it was written."""

    def __str__(self) -> str:
        return str(self.args[0])
