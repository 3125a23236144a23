"""Scaling of queries and keys."""

import math
from collections.abc import Callable
from typing import Optional, Union

import jax
from jaxtyping import Array, Float

from axlearn.common.base_layer import BaseLayer, ParameterSpec
from axlearn.common.config import (
    REQUIRED,
    InstantiableConfig,
    Required,
    config_class,
    config_for_function,
    maybe_instantiate,
)
from axlearn.common.layers import align_right
from axlearn.common.param_init import ConstantInitializer

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


class PerDimScale(BaseLayer):
    """Multiplies each dim of the heads by a positive factor that is learned, and is 1 at first.

    The factor is `softplus(param) / softplus(0)`.
    """

    @config_class
    class Config(BaseLayer.Config):
        """Configures `PerDimScale`."""

        # Size of a head.
        dim: Required[int] = REQUIRED

    def _create_layer_parameter_specs(self) -> dict[str, ParameterSpec]:
        cfg: PerDimScale.Config = self.config
        zeros = ConstantInitializer.default_config().set(value=0.0).instantiate()
        return {
            "param": ParameterSpec(shape=(cfg.dim,), mesh_axes=cfg.param_partition_spec, initializer=zeros)
        }

    def forward(
        self, x: Float[Array, "batch seq heads per_head_dim"]
    ) -> Float[Array, "batch seq heads per_head_dim"]:
        """Scales queries."""
        # softplus(0) is ln 2.
        factor = jax.nn.softplus(self.parameters["param"]) / math.log(2)
        return x * align_right(factor, x)


class ScaleQuery(BaseScaleQK):
    """Scales queries, by default by `per_head_dim ** -0.5`.

    Reference: Vaswani et al., Attention Is All You Need, https://arxiv.org/abs/1706.03762, section 3.2.1.
    """

    @config_class
    class Config(BaseScaleQK.Config):
        """Configures `ScaleQuery`."""

        # A learned factor for each dim, besides `scale_factor`: `PerDimScale.default_config()`. None: none.
        per_dim_scale: Optional[BaseLayer.Config] = None

    def __init__(self, cfg: Config, *, parent: Optional[BaseLayer]):
        super().__init__(cfg, parent=parent)
        if cfg.per_dim_scale is not None:
            self._add_child("per_dim_scale", cfg.per_dim_scale.clone(dim=cfg.per_head_dim))

    def forward(
        self, proj: Float[Array, "batch seq heads per_head_dim"]
    ) -> Float[Array, "batch seq heads per_head_dim"]:
        """Scales queries."""
        proj = super().forward(proj)
        return self.per_dim_scale(proj) if "per_dim_scale" in self.children else proj

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
