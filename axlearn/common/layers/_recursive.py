"""Functions that set one thing everywhere in a config tree."""

from collections.abc import Callable
from typing import Any, Union

from axlearn.common.config import ConfigBase
from axlearn.common.layers._dropout import Dropout
from axlearn.common.layers._norm import BaseNormalizationLayer


def for_each_config(cfg: ConfigBase, fn: Callable[[ConfigBase], Any]) -> None:
    """Calls `fn` on `cfg` and on every config below it, also inside dicts and lists; parents first."""

    def enter_fn(_: str, value: Any, default_items: Any) -> Any:
        if isinstance(value, ConfigBase):
            fn(value)
        return default_items

    cfg.visit(visit_fn=lambda key, value: None, enter_fn=enter_fn)


def set_dropout_rate_recursively(
    cfg: ConfigBase, dropout_rate: Union[int, float, None], set_only_if_none: bool = False
) -> None:
    """Sets the rate of every `Dropout` in the tree.

    Args:
        cfg: The tree, changed in place.
        dropout_rate: The rate in [0, 1); None: no dropping.
        set_only_if_none: Whether to leave rates alone that are not None.
    """

    def set_rate(value: ConfigBase) -> None:
        if isinstance(value, Dropout.Config) and not (set_only_if_none and value.rate is not None):
            value.rate = dropout_rate

    for_each_config(cfg, set_rate)


def set_layer_norm_eps_recursively(cfg: ConfigBase, eps: Union[int, float]) -> None:
    """Sets `eps` of every normalisation layer in the tree, in place."""

    def set_eps(value: ConfigBase) -> None:
        if isinstance(value, BaseNormalizationLayer.Config) and "eps" in value:
            value.set(eps=eps)

    for_each_config(cfg, set_eps)


def set_bias_recursively(cfg: ConfigBase, bias: bool = False) -> None:
    """Sets every boolean field `bias` in the tree, in place."""

    def set_bias(value: ConfigBase) -> None:
        if "bias" in value and isinstance(value.bias, bool):  # type: ignore[attr-defined]
            value.set(bias=bias)

    for_each_config(cfg, set_bias)


def set_norm_recursively(cfg: ConfigBase, norm_cfg: BaseNormalizationLayer.Config) -> None:
    """Replaces every normalisation layer that is a field of a config in the tree, or in a dictionary that is one.

    Args:
        cfg: The tree, changed in place.
        norm_cfg: The config to put there; each place gets its own copy. An `input_dim` that a place already
            has is kept.
    """

    def replace(child: Any) -> Any:
        if not isinstance(child, BaseNormalizationLayer.Config):
            return child
        return norm_cfg.clone(input_dim=child.input_dim)

    def set_norm(value: ConfigBase) -> None:
        for name, child in value.items():
            if isinstance(child, BaseNormalizationLayer.Config):
                value.set(**{name: replace(child)})
            elif isinstance(child, dict):
                value.set(**{name: {key: replace(item) for key, item in child.items()}})

    for_each_config(cfg, set_norm)
