"""The layer that multiplies in few bits, and the base of layers that may have one."""

import enum
from collections.abc import Callable, Mapping
from typing import Any, Optional

import jax
import jax.numpy as jnp

from axlearn.common.base_layer import BaseLayer, ParameterSpec
from axlearn.common.config import (
    REQUIRED,
    ConfigBase,
    InstantiableConfig,
    Required,
    config_class,
    error_message,
    maybe_instantiate,
)
from axlearn.common.module import Module, nowrap
from axlearn.common.param_init import ConstantInitializer
from axlearn.common.quantized_dot_general._contraction import Contraction
from axlearn.common.quantized_dot_general._fp8 import Fp8Meta, Fp8Metas, fp8_dot
from axlearn.common.quantized_dot_general._int8 import int8_dot

# The name of each operand's part in the names of parameters, and its first scale, which counts for one step. A kernel
# begins with weights of 0.1 and less, of which 1 would leave two bits; 2**-6 leaves all four below 7. The gradient of a
# mean over many tokens is smaller yet: 2**-16 spans 2e-10 to 0.9 in e5m2; 1 would begin at 2e-5 and lose the step.
_FIRST_SCALES = {"input": 1.0, "kernel": 2.0**-6, "output_grad": 2.0**-16}
# What AXLearn's fp8 recipes have.
_DEFAULT_HISTORY_LENGTH = 128


class DotGeneralQuantizationType(enum.Enum):
    """How the operands of a product are rounded."""

    # Eight bits with a scale for each row and column, measured in the same step; the gradient is not rounded.
    INT_8 = 0
    # Eight bits of float with a delayed scale for each operand, and for the gradient.
    FP_8 = 1


def get_all_fp8_param_names() -> list[str]:
    """The names of the parameters of a `QuantizedDotGeneral` in FP_8: scales, then histories."""
    return [f"{operand}_{field}" for field in Fp8Meta._fields for operand in Fp8Metas._fields]


def tanh_clipping(bound: float) -> Callable[[jax.Array], jax.Array]:
    """Makes a function that bounds smoothly, for `clipping_choice`.

    Args:
        bound: The largest absolute value, above 0.

    Returns:
        `bound * tanh(x / bound)`.
    """
    return lambda x: bound * jnp.tanh(x / bound)


class QuantizedDotGeneral(BaseLayer):
    """The product of activations and a kernel, in few bits.

    In FP_8 it has a scale and a history for the activations ("input"), the kernel and the gradient ("output_grad"),
    float32, named by `get_all_fp8_param_names`. Their gradients are their new values: the learner's optimizer must be
    an `OverrideInplaceUpdateTransformation` that says so, as `FP8ConfigModifier` makes it. Evaluation and decoding
    multiply with the scales that training left.
    """

    @config_class
    class Config(BaseLayer.Config):
        """Configures `QuantizedDotGeneral`."""

        # How operands are rounded.
        quantization_type: Required[DotGeneralQuantizationType] = REQUIRED
        # The config of a function that bounds the activations first, such as `tanh_clipping`, so that outliers do
        # not coarsen the others. None: they are taken as they are.
        clipping_choice: Optional[InstantiableConfig] = None
        # FP_8: over how many steps the largest values are remembered, at least 1. None: 128. INT_8: only None.
        fp8_amax_history_length: Optional[int] = None

    def __init__(self, cfg: Config, *, parent: Optional[Module]):
        super().__init__(cfg, parent=parent)
        self._clip: Optional[Callable[[jax.Array], jax.Array]] = maybe_instantiate(cfg.clipping_choice)
        length = cfg.fp8_amax_history_length
        if length is not None and length < 1:
            raise ValueError(
                error_message(
                    where=f"{self.path()}.fp8_amax_history_length",
                    what=f"{length} steps to remember",
                    expected="at least 1, or None for 128",
                    nearest=1,
                )
            )
        if length is not None and cfg.quantization_type != DotGeneralQuantizationType.FP_8:
            raise ValueError(
                error_message(
                    where=f"{self.path()}.fp8_amax_history_length",
                    what=f"{length} steps to remember in {cfg.quantization_type.name}, which remembers none",
                    expected="None",
                )
            )

    def _create_layer_parameter_specs(self) -> dict[str, ParameterSpec]:
        cfg: QuantizedDotGeneral.Config = self.config
        if cfg.quantization_type != DotGeneralQuantizationType.FP_8:
            return {}
        length = cfg.fp8_amax_history_length or _DEFAULT_HISTORY_LENGTH
        return {
            **{f"{operand}_scale": _spec(1, first=scale) for operand, scale in _FIRST_SCALES.items()},
            **{f"{operand}_amax_history": _spec(length, first=0.0) for operand in _FIRST_SCALES},
        }

    def forward(self, subscripts: str, *, activation: jax.Array, kernel: jax.Array) -> jax.Array:
        """Multiplies.

        Args:
            subscripts: An einsum that `Contraction.from_einsum` can read, such as "btd,dnh->btnh".
            activation: The activations.
            kernel: The kernel.

        Returns:
            The product, in the common dtype of the operands.
        """
        return self.multiply(subscripts, activation=activation, kernel=kernel, params=self.parameters)

    @nowrap
    def multiply(
        self, subscripts: str, *, activation: jax.Array, kernel: jax.Array, params: Mapping[str, Any]
    ) -> jax.Array:
        """The same with given parameters, which may be stacked: parts of one kernel, with one scale for all."""
        contraction = Contraction.from_einsum(subscripts, activation_rank=activation.ndim)
        if self._clip is not None:
            activation = self._clip(activation)
        if self.config.quantization_type == DotGeneralQuantizationType.INT_8:
            return int8_dot(activation, kernel, contraction=contraction)
        metas = Fp8Metas(
            *(
                Fp8Meta(*(params[f"{operand}_{field}"] for field in Fp8Meta._fields))
                for operand in Fp8Metas._fields
            )
        )
        return fp8_dot(activation, kernel, metas, contraction=contraction)


class DenseGeneralBaseLayer(BaseLayer):
    """A layer that multiplies its inputs with a kernel, in few bits if it is told to."""

    @config_class
    class Config(BaseLayer.Config):
        """Configures `DenseGeneralBaseLayer`."""

        # How the product is rounded. None: not beyond the types of its operands.
        quantized_dot_general: Optional[QuantizedDotGeneral.Config] = None

    def __init__(self, cfg: Config, *, parent: Optional[Module]):
        super().__init__(cfg, parent=parent)
        if cfg.quantized_dot_general is not None:
            self._add_child("quantized_dot_general", cfg.quantized_dot_general)

    def _einsum(self, subscripts: str, activation: jax.Array, kernel: jax.Array) -> jax.Array:
        """`jnp.einsum(subscripts, activation, kernel)`, rounded as the config says."""
        if self.config.quantized_dot_general is None:
            return jnp.einsum(subscripts, activation, kernel)
        return self.quantized_dot_general(subscripts, activation=activation, kernel=kernel)


def uses_fp8(cfg: Any) -> bool:
    """Whether a config has a product in FP_8 anywhere.

    Args:
        cfg: A model's or a layer's config.
    """
    found = []

    def enter_fn(_: str, value: Any, default_items: Any) -> Any:
        if isinstance(value, QuantizedDotGeneral.Config):
            found.append(value.quantization_type == DotGeneralQuantizationType.FP_8)
        return default_items

    if isinstance(cfg, ConfigBase):
        cfg.visit(visit_fn=lambda key, value: None, enter_fn=enter_fn)
    return any(found)


def _spec(length: int, *, first: float) -> ParameterSpec:
    initializer = ConstantInitializer.default_config().set(value=first).instantiate()
    return ParameterSpec(shape=(length,), dtype=jnp.float32, initializer=initializer)
