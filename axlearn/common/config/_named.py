"""Trainer configs by name, as recipes publish them."""

import importlib
from typing import Any, Optional, Protocol

from axlearn.common.config._configurable import InstantiableConfig
from axlearn.common.config._errors import error_message
from axlearn.common.config._names import listing, nearest_names


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
        return trainer_config_fn(data_dir=data_dir).set(**kwargs)

    return fn


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
