"""What is known of a parameter before it exists."""

import dataclasses
from collections.abc import Sequence
from typing import Optional

from axlearn.common.param_init import FanAxes, Initializer
from axlearn.common.utils import Nested, TensorSpec


@dataclasses.dataclass(frozen=True)
class FactorizationSpec:
    """How optimizers with factored statistics treat a parameter.

    Attributes:
        axes: For each dimension "row", "col", or None: not factored.
    """

    axes: Sequence[Optional[str]]


@dataclasses.dataclass(frozen=True)
class ParameterSpec(TensorSpec):
    """A parameter that need not exist yet.

    Attributes:
        initializer: Makes its first value; None: the layer's `param_init`.
        factorization: How optimizers may factor its statistics; None: they do not.
        fan_axes: Which dimensions are inputs and outputs; None: by the default for rank-2 weights, if it
            applies.
        weight_decay_scale: Multiplies the weight decay of this parameter; None: the optimizer decides.
    """

    initializer: Optional[Initializer] = None
    factorization: Optional[FactorizationSpec] = None
    fan_axes: Optional[FanAxes] = None
    weight_decay_scale: Optional[float] = None

    def fans(self) -> dict[str, float]:
        """The fan-in, fan-out and their mean ("fan_in", "fan_out", "fan_avg").

        Raises:
            ValueError: If the fan axes are not known.
        """
        if self.fan_axes is None:
            raise ValueError(f"The parameter of shape {tuple(self.shape)} has no fan_axes.")
        return self.fan_axes.fans(self.shape)


NestedParameterSpec = Nested[ParameterSpec]
