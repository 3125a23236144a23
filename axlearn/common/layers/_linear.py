"""The dense layer."""

from typing import Any, Optional

import jax.numpy as jnp
from jaxtyping import Array, Float

from axlearn.common.base_layer import FactorizationSpec, ParameterSpec
from axlearn.common.config import REQUIRED, Required, config_class
from axlearn.common.layers._gather import dims_split_by_batch_axes, gather_weight
from axlearn.common.quantized_dot_general import DenseGeneralBaseLayer
from axlearn.common.utils import maybe_shard


class Linear(DenseGeneralBaseLayer):
    """`y = x W + b` over the last dim."""

    @config_class
    class Config(DenseGeneralBaseLayer.Config):
        """Configures `Linear`."""

        # Size of the last dim of the inputs.
        input_dim: Required[int] = REQUIRED
        # Size of the last dim of the outputs.
        output_dim: Required[int] = REQUIRED
        # Whether to add a bias.
        bias: bool = True
        # How the outputs lie on the mesh; one entry a dim. None: as the compiler likes.
        output_partition_spec: Optional[Any] = None

    def _create_layer_parameter_specs(self) -> dict[str, ParameterSpec]:
        cfg: Linear.Config = self.config
        specs = {
            "weight": ParameterSpec(
                shape=(cfg.input_dim, cfg.output_dim),
                mesh_axes=cfg.param_partition_spec,
                factorization=FactorizationSpec(axes=("row", "col")),
            )
        }
        if cfg.bias:
            bias_axes: Any = None if cfg.param_partition_spec is None else (cfg.param_partition_spec[-1],)
            specs["bias"] = ParameterSpec(shape=(cfg.output_dim,), mesh_axes=bias_axes)
        return specs

    def forward(self, x: Float[Array, "*batch input_dim"]) -> Float[Array, "*batch output_dim"]:
        """Applies the layer.

        Args:
            x: Inputs.

        Returns:
            Outputs, in the common dtype of inputs and parameters.
        """
        cfg: Linear.Config = self.config
        params = self.parameters
        spec, output_spec = cfg.param_partition_spec, cfg.output_partition_spec
        weight = gather_weight(params["weight"], spec, dims=dims_split_by_batch_axes(spec, output_spec))
        output = self._einsum("...i,io->...o", x, weight)
        if cfg.bias:
            output = output + align_right(params["bias"], output)
        return maybe_shard(output, output_spec)


def align_right(param: Array, x: Array) -> Array:
    """Gives a parameter leading dims of size 1 until its rank is that of `x`."""
    return jnp.expand_dims(param, range(x.ndim - param.ndim))
