"""Dense layers between the model dim and the heads."""

from typing import Any, Optional

from jaxtyping import Array, Float

from axlearn.common.base_layer import FactorizationSpec, ParameterSpec
from axlearn.common.config import REQUIRED, Required, config_class
from axlearn.common.layers import align_right, gather_weight
from axlearn.common.param_init import FanAxes
from axlearn.common.quantized_dot_general import DenseGeneralBaseLayer
from axlearn.common.utils import maybe_shard


class BaseMultiheadLinear(DenseGeneralBaseLayer):
    """A dense layer whose weight is `[model_dim, num_heads, per_head_dim]`."""

    @config_class
    class Config(DenseGeneralBaseLayer.Config):
        """Configures `BaseMultiheadLinear`."""

        # Size of the dim on the side of the model.
        model_dim: Required[int] = REQUIRED
        # Number of heads.
        num_heads: Required[int] = REQUIRED
        # Size of a head.
        per_head_dim: Required[int] = REQUIRED
        # Whether to add a bias.
        bias: bool = True
        # How the outputs lie on the mesh; one entry a dim. None: as the compiler likes.
        output_partition_spec: Optional[Any] = None

    @classmethod
    def default_config(cls) -> Config:
        """The default config: heads are split over the axis "model"."""
        return super().default_config().set(param_partition_spec=(None, "model", None))

    def _create_layer_parameter_specs(self) -> dict[str, ParameterSpec]:
        cfg: BaseMultiheadLinear.Config = self.config
        specs = {
            "weight": ParameterSpec(
                shape=(cfg.model_dim, cfg.num_heads, cfg.per_head_dim),
                mesh_axes=cfg.param_partition_spec,
                factorization=FactorizationSpec(axes=("row", None, "col")),
            )
        }
        if cfg.bias:
            specs["bias"] = self._bias_spec()
        return specs

    def _bias_spec(self) -> ParameterSpec:
        raise NotImplementedError(type(self))

    def _project(self, equation: str, inputs: Array) -> Array:
        """Multiplies inputs with the weight as the einsum says, and adds the bias."""
        cfg: BaseMultiheadLinear.Config = self.config
        params = self.parameters
        # What splits the model dim of the weight is for storage.
        weight = gather_weight(params["weight"], cfg.param_partition_spec, dims=[0])
        outputs = self._einsum(equation, inputs, weight)
        if cfg.bias:
            outputs = outputs + align_right(params["bias"], outputs)
        return maybe_shard(outputs, cfg.output_partition_spec)


class MultiheadInputLinear(BaseMultiheadLinear):
    """From the model dim to the heads: `einsum("btd,dnh->btnh") + bias[n, h]`."""

    def _bias_spec(self) -> ParameterSpec:
        cfg: MultiheadInputLinear.Config = self.config
        spec = cfg.param_partition_spec
        return ParameterSpec(
            shape=(cfg.num_heads, cfg.per_head_dim), mesh_axes=None if spec is None else spec[-2:]
        )

    def _compute_fan_axes(self, name: str, parameter_spec: ParameterSpec) -> Optional[FanAxes]:
        if name == "weight":
            return FanAxes(in_axis=0, out_axis=(1, 2))
        return None

    def forward(
        self, inputs: Float[Array, "batch seq model_dim"]
    ) -> Float[Array, "batch seq heads per_head_dim"]:
        """Projects to the heads."""
        return self._project("btd,dnh->btnh", inputs)


class MultiheadOutputLinear(BaseMultiheadLinear):
    """From the heads to the model dim: `einsum("btnh,dnh->btd") + bias[d]`."""

    def _bias_spec(self) -> ParameterSpec:
        cfg: MultiheadOutputLinear.Config = self.config
        spec = cfg.param_partition_spec
        return ParameterSpec(shape=(cfg.model_dim,), mesh_axes=None if spec is None else spec[:1])

    def _compute_fan_axes(self, name: str, parameter_spec: ParameterSpec) -> Optional[FanAxes]:
        if name == "weight":
            return FanAxes(in_axis=(1, 2), out_axis=0)
        return None

    def forward(
        self, inputs: Float[Array, "batch seq heads per_head_dim"]
    ) -> Float[Array, "batch seq model_dim"]:
        """Projects from the heads."""
        return self._project("btnh,dnh->btd", inputs)
