"""Where a residual block puts its normalisation."""

from collections.abc import Callable
from typing import Any, Union

from jaxtyping import Array

from axlearn.common.base_layer import BaseLayer
from axlearn.common.config import config_class, error_message
from axlearn.common.layers import Dropout, LayerNorm, StochasticDepth

# The children that hold the norms, by structure.
_NORM_NAMES: dict[str, tuple[str, ...]] = {
    "prenorm": ("norm",),
    "postnorm": ("norm",),
    "hybridnorm": ("prenorm", "postnorm"),
    "nonorm": (),
}


class BaseResidualLayer(BaseLayer):
    """A layer f around which there are norms and a residual connection.

    - prenorm: `x + f(norm(x))`
    - postnorm: `norm(x + f(x))`
    - hybridnorm: `x + postnorm(f(prenorm(x)))`
    - nonorm: `f(x)`, for callers that have their own norm and residual connection.

    Reference: Xiong et al., On Layer Normalization in the Transformer Architecture,
        https://arxiv.org/abs/2002.04745, figure 1 (postnorm, prenorm).
    """

    @config_class
    class Config(BaseLayer.Config):
        """Configures `BaseResidualLayer`."""

        # The norm; one child each for where `structure` has one.
        norm: BaseLayer.Config = LayerNorm.default_config()
        # Dropout of what f returns.
        dropout: BaseLayer.Config = Dropout.default_config()
        # Skips f for some examples.
        stochastic_depth: BaseLayer.Config = StochasticDepth.default_config()
        # "prenorm", "postnorm", "hybridnorm" or "nonorm"; see the class.
        structure: str = "prenorm"

    def _add_norms(self, dim: int) -> None:
        """Adds the norms as children, before all other children: the order is that of initialisation."""
        cfg: BaseResidualLayer.Config = self.config
        if cfg.structure not in _NORM_NAMES:
            raise ValueError(
                error_message(
                    where=self.path(),
                    what=f"structure={cfg.structure!r}",
                    expected=f"one of {', '.join(_NORM_NAMES)}",
                )
            )
        for name in _NORM_NAMES[cfg.structure]:
            self._add_child(name, cfg.norm.clone(input_dim=dim))

    def _apply_structure(
        self, x: Array, fn: Callable[[Array], tuple[Array, Any]], *, residual_weight: Union[int, float] = 1.0
    ) -> tuple[Array, Any]:
        """Puts norms and the residual connection around a function.

        Args:
            x: The inputs of the block `[batch, seq, dim]`.
            fn: From (normalised) inputs to outputs, dropout included, and something else that is passed
                through.
            residual_weight: Factor of the outputs of `fn` in the sum.

        Returns:
            The outputs of the block, and what else `fn` returned.
        """
        structure = self.config.structure
        inputs = x
        if structure == "prenorm":
            inputs = self.norm(x)
        elif structure == "hybridnorm":
            inputs = self.prenorm(x)
        outputs, aux = fn(inputs)
        if structure == "hybridnorm":
            outputs = self.postnorm(outputs)
        outputs = self.stochastic_depth(outputs)
        if structure == "nonorm":
            return outputs, aux
        total = x + (outputs if residual_weight == 1 else outputs * residual_weight)
        return (self.norm(total) if structure == "postnorm" else total), aux
