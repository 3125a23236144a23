"""Where a residual block puts its normalisation."""

import enum
from collections.abc import Callable
from typing import Any, Optional, Union

from jaxtyping import Array

from axlearn.common.base_layer import BaseLayer
from axlearn.common.config import config_class, error_message
from axlearn.common.layers import Dropout, LayerNorm, StochasticDepth


class NormPosition(enum.Enum):
    """Where structure "v2" may have a norm; the values are the names of the children."""

    # Of what goes into the block's function.
    IN_NORM = "in_norm"
    # Of what comes out of it, before it is added.
    RES_NORM = "res_norm"
    # Of the sum.
    OUT_NORM = "out_norm"


# By structure, the children that normalise what goes into f, what comes out of it, and the sum.
_NORM_NAMES: dict[str, tuple[Optional[str], Optional[str], Optional[str]]] = {
    "prenorm": ("norm", None, None),
    "postnorm": (None, None, "norm"),
    "hybridnorm": ("prenorm", "postnorm", None),
    "nonorm": (None, None, None),
    "v2": (NormPosition.IN_NORM.value, NormPosition.RES_NORM.value, NormPosition.OUT_NORM.value),
}


class BaseResidualLayer(BaseLayer):
    """A layer f around which there are norms and a residual connection.

    - prenorm: `x + f(norm(x))`
    - postnorm: `norm(x + f(x))`
    - hybridnorm: `x + postnorm(f(prenorm(x)))`
    - nonorm: `f(x)`, for callers that have their own norm and residual connection.
    - v2: `out_norm(x + res_norm(f(in_norm(x))))`, where each of the three norms may be left out.

    Reference: Xiong et al., On Layer Normalization in the Transformer Architecture,
        https://arxiv.org/abs/2002.04745, figure 1 (postnorm, prenorm).
    """

    @config_class
    class Config(BaseLayer.Config):
        """Configures `BaseResidualLayer`."""

        # The norm; one child each for where `structure` has one. With structure "v2" also a dictionary with
        # the norms of some positions: the others have none.
        norm: Union[BaseLayer.Config, dict[NormPosition, BaseLayer.Config]] = LayerNorm.default_config()
        # Dropout of what f returns.
        dropout: BaseLayer.Config = Dropout.default_config()
        # Skips f for some examples.
        stochastic_depth: BaseLayer.Config = StochasticDepth.default_config()
        # "prenorm", "postnorm", "hybridnorm", "nonorm" or "v2"; see the class.
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
        norms = cfg.norm
        if isinstance(norms, dict) and cfg.structure != "v2":
            raise ValueError(
                error_message(
                    where=self.path(),
                    what=f"structure={cfg.structure!r} with a dictionary of norms",
                    expected="one config, for every norm of the structure",
                    advice='use structure="v2" for a norm of its own at each position',
                )
            )
        for name in filter(None, _NORM_NAMES[cfg.structure]):
            norm = norms.get(NormPosition(name)) if isinstance(norms, dict) else norms
            if norm is not None:
                self._add_child(name, norm.clone(input_dim=dim))

    def _apply_structure(
        self,
        x: Array,
        fn: Callable[[Array], tuple[Array, Any]],
        *,
        residual_weight: Union[int, float, Array] = 1.0,
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
        in_norm, res_norm, out_norm = _NORM_NAMES[structure]
        outputs, aux = fn(self._maybe_norm(in_norm, x))
        outputs = self.stochastic_depth(self._maybe_norm(res_norm, outputs))
        if structure == "nonorm":
            return outputs, aux
        if not (isinstance(residual_weight, int | float) and residual_weight == 1):
            outputs = outputs * residual_weight
        return self._maybe_norm(out_norm, x + outputs), aux

    def _maybe_norm(self, name: Optional[str], x: Array) -> Array:
        """Normalises by the child of this name, where there is one."""
        norm: Any = None if name is None else self.children.get(name)
        return x if norm is None else norm(x)
