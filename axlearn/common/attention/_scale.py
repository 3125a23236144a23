"""Scaling of queries and keys."""

from collections.abc import Callable
from typing import Optional, Union

from jaxtyping import Array, Float

from axlearn.common.base_layer import BaseLayer
from axlearn.common.config import (
    REQUIRED,
    InstantiableConfig,
    Required,
    config_class,
    config_for_function,
    maybe_instantiate,
)

# From the per-head dim to a factor.
ScaleFn = Callable[[int], Union[int, float]]


def constant_scale_fn(value: Union[int, float]) -> ScaleFn:
    """A factor that does not depend on the per-head dim."""
    return lambda dim: value


def pow_scale_fn(exp: Union[int, float]) -> ScaleFn:
    """The per-head dim to the power of `exp`."""
    return lambda dim: dim**exp


class BaseScaleQK(BaseLayer):
    """Normalises (where configured), then multiplies by a factor that depends on the per-head dim."""

    @config_class
    class Config(BaseLayer.Config):
        """Configures `BaseScaleQK`."""

        # Size of a head.
        per_head_dim: Required[int] = REQUIRED
        # A normalisation over the per-head dim, applied before the factor. None: none.
        norm: Optional[BaseLayer.Config] = None
        # Makes a function from the per-head dim to the factor. None: the default of the subclass.
        scale_factor: Optional[InstantiableConfig] = None

    def __init__(self, cfg: Config, *, parent: Optional[BaseLayer]):
        super().__init__(cfg, parent=parent)
        if cfg.norm is not None:
            self._add_child("norm", cfg.norm.clone(input_dim=cfg.per_head_dim))
        scale_fn = maybe_instantiate(
            self.default_scale_factor() if cfg.scale_factor is None else cfg.scale_factor
        )
        self._factor = float(scale_fn(cfg.per_head_dim))

    @classmethod
    def default_scale_factor(cls) -> InstantiableConfig:
        """What stands for `scale_factor=None`."""
        raise NotImplementedError(cls)

    def forward(
        self, proj: Float[Array, "batch seq heads per_head_dim"]
    ) -> Float[Array, "batch seq heads per_head_dim"]:
        """Scales queries or keys."""
        if self.config.norm is not None:
            proj = self.norm(proj)
        return proj if self._factor == 1 else proj * self._factor


class ScaleQuery(BaseScaleQK):
    """Scales queries, by default by `per_head_dim ** -0.5`.

    Reference: Vaswani et al., Attention Is All You Need, https://arxiv.org/abs/1706.03762, section 3.2.1.
    """

    @classmethod
    def default_scale_factor(cls) -> InstantiableConfig:
        """See `BaseScaleQK.default_scale_factor`."""
        return config_for_function(pow_scale_fn).set(exp=-0.5)


class ScaleKey(BaseScaleQK):
    """Scales keys, by default by 1."""

    @classmethod
    def default_scale_factor(cls) -> InstantiableConfig:
        """See `BaseScaleQK.default_scale_factor`."""
        return config_for_function(constant_scale_fn).set(value=1)
