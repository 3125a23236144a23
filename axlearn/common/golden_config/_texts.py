"""What a trainer config comes to, as text: the config itself, its parameters, their weight decay."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from axlearn.common.base_layer import BaseLayer, ParameterSpec
from axlearn.common.config import InstantiableConfig, TrainerConfigFn, make_trainer_config
from axlearn.common.data_dir import set_data_dir
from axlearn.common.module import functional
from axlearn.common.optimizer_base import make_opt_params
from axlearn.common.optimizers import collect_per_param_settings
from axlearn.common.update_transformation import Updates
from axlearn.common.utils import NestedTensor

# Stands for the data directory in golden files, so that they are the same on every machine.
_DATA_DIR = "$DATA_DIR"
# What optimizers call the settings that are about decay; they have others, such as scales of updates.
_REGULARIZERS = ("weight_decay_scale", "l2_regularizer_scale")


def with_golden_data_dir(trainer_config_fn: TrainerConfigFn) -> InstantiableConfig:
    """Returns a recipe's config as golden files have it: for a data directory called "$DATA_DIR"."""
    with set_data_dir(_DATA_DIR):
        cfg: InstantiableConfig = make_trainer_config(trainer_config_fn)
        return cfg


def config_text(cfg: InstantiableConfig) -> str:
    """Returns a config as the `NAME.txt` golden files have it: a line per leaf."""
    return cfg.debug_string()


def init_text(cfg: InstantiableConfig) -> str:
    """Returns how parameters get their first values, as the `NAME_init.txt` golden files have it.

    Args:
        cfg: A trainer config; only its `model` is looked at, and no array is made.

    Returns:
        A line per parameter, in the order of the module tree. Of layers that are scanned there is one.
    """
    return "\n".join(_init_lines(_model(cfg), prefix=""))


def regularizer_text(cfg: InstantiableConfig) -> str:
    """Returns which parameters decay how much, as the `NAME_regularizer.txt` golden files have it.

    Args:
        cfg: A trainer config; its `model` and `learner` are looked at, and no array is made.

    Returns:
        For each decay of the learner a header, and a sorted line per parameter.
    """
    learner = cfg.learner.clone(name="learner").instantiate(parent=None)  # type: ignore[attr-defined]
    specs = _model(cfg).create_parameter_specs_recursively()

    def update(params: NestedTensor) -> Any:
        opt_params = make_opt_params(params, model_param_specs=specs)
        return functional(
            learner,
            prng_key=None,
            state=learner.init(opt_params),
            inputs=[Updates(opt_params=opt_params, delta_updates=params)],
            method="update",
            is_training=True,
        )

    with collect_per_param_settings() as records:
        jax.eval_shape(update, jax.tree.map(_shape, specs))
    return "\n".join(str(record) for record in records if record.description in _REGULARIZERS)


# By the kind of a golden file.
TEXTS: Mapping[str, Callable[[InstantiableConfig], str]] = {
    "config": config_text,
    "init": init_text,
    "regularizer": regularizer_text,
}


def _model(cfg: InstantiableConfig) -> BaseLayer:
    model: BaseLayer = cfg.model.clone(name="model").instantiate(parent=None)  # type: ignore[attr-defined]
    return model


def _init_lines(layer: BaseLayer, *, prefix: str) -> list[str]:
    lines = []
    specs: Any = layer.create_parameter_specs_recursively()
    for name, spec in specs.items():
        if isinstance(spec, ParameterSpec):
            initializer = spec.initializer or layer.param_init()
            text = initializer.debug_string(name=name, shape=spec.shape, axes=spec.fan_axes)
            lines.append(f"{prefix}{name}: {text}")
    for name, child in layer.children.items():
        if isinstance(child, BaseLayer):
            lines += _init_lines(child, prefix=f"{prefix}{name}/")
    return lines


def _shape(spec: ParameterSpec) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(spec.shape, spec.dtype)
