"""Normalisation over the last dim."""

from typing import Any, Optional

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from axlearn.common.base_layer import BaseLayer, ParameterSpec
from axlearn.common.config import REQUIRED, Required, config_class
from axlearn.common.layers._linear import align_right
from axlearn.common.utils import maybe_shard


class BaseNormalizationLayer(BaseLayer):
    """A layer that keeps shape and dtype and rescales its inputs."""

    @config_class
    class Config(BaseLayer.Config):
        """Configures `BaseNormalizationLayer`."""

        # Size of the last dim of the inputs.
        input_dim: Required[int] = REQUIRED
        # How inputs and outputs lie on the mesh; one entry a dim. None: as the compiler likes.
        input_partition_spec: Optional[Any] = None
        output_partition_spec: Optional[Any] = None


class LayerNorm(BaseNormalizationLayer):
    """Removes the mean, divides by the standard deviation, scales and shifts.

    Reference: Ba et al., Layer Normalization, https://arxiv.org/abs/1607.06450, equation 4.
    """

    @config_class
    class Config(BaseNormalizationLayer.Config):
        """Configures `LayerNorm`."""

        # Added to the variance before the root is taken.
        eps: float = 1e-8
        # Dtype of the arithmetic. None: that of the inputs.
        forward_dtype: Optional[Any] = jnp.float32

    def _create_layer_parameter_specs(self) -> dict[str, ParameterSpec]:
        cfg: LayerNorm.Config = self.config
        shape, mesh_axes = (cfg.input_dim,), cfg.param_partition_spec
        return {
            "scale": ParameterSpec(shape=shape, mesh_axes=mesh_axes),
            "bias": ParameterSpec(shape=shape, mesh_axes=mesh_axes),
        }

    def forward(self, x: Float[Array, "*batch input_dim"]) -> Float[Array, "*batch input_dim"]:
        """Normalises over the last dim; the result has the dtype of `x`."""
        cfg: LayerNorm.Config = self.config
        x = maybe_shard(x, cfg.input_partition_spec)
        y = x if cfg.forward_dtype is None else x.astype(cfg.forward_dtype)
        centred = y - jnp.mean(y, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        y = centred * jax.lax.rsqrt(variance + cfg.eps)
        y = y * align_right(self.parameters["scale"], y) + align_right(self.parameters["bias"], y)
        return maybe_shard(y.astype(x.dtype), cfg.output_partition_spec)


class RMSNorm(BaseNormalizationLayer):
    """Divides by the root of the mean square and scales.

    `x * rsqrt(mean(x^2) + eps) * scale`.

    Reference: Zhang and Sennrich, Root Mean Square Layer Normalization, https://arxiv.org/abs/1910.07467,
    equation 4.
    """

    @config_class
    class Config(BaseNormalizationLayer.Config):
        """Configures `RMSNorm`."""

        # Added to the mean square before the root is taken.
        eps: float = 1e-8
        # Dtype of the arithmetic. None: that of the inputs.
        forward_dtype: Optional[Any] = jnp.float32

    def _create_layer_parameter_specs(self) -> dict[str, ParameterSpec]:
        cfg: RMSNorm.Config = self.config
        return {"scale": ParameterSpec(shape=(cfg.input_dim,), mesh_axes=cfg.param_partition_spec)}

    def forward(self, x: Float[Array, "*batch input_dim"]) -> Float[Array, "*batch input_dim"]:
        """Normalises over the last dim; the result has the dtype of `x`."""
        cfg: RMSNorm.Config = self.config
        x = maybe_shard(x, cfg.input_partition_spec)
        y = x if cfg.forward_dtype is None else x.astype(cfg.forward_dtype)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + cfg.eps)
        y = y * align_right(self.parameters["scale"], y)
        return maybe_shard(y.astype(x.dtype), cfg.output_partition_spec)
