"""Layers that drop at random while training, and are the identity otherwise."""

from typing import Optional

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from axlearn.common.base_layer import BaseLayer
from axlearn.common.config import config_class, error_message


class Dropout(BaseLayer):
    """Sets elements to zero with probability `rate` while training and scales the others by `1 / (1 - rate)`.

    Reference: Srivastava et al., Dropout, https://jmlr.org/papers/v15/srivastava14a.html, section 4.
    """

    @config_class
    class Config(BaseLayer.Config):
        """Configures `Dropout`."""

        # Probability of dropping an element, in [0, 1). None: 0.
        rate: Optional[float] = None

    def __init__(self, cfg: Config, *, parent: Optional[BaseLayer]):
        super().__init__(cfg, parent=parent)
        _check_rate(self)

    def forward(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Drops elements."""
        rate = self.config.rate
        if not self.is_training or not rate:
            return x
        keep = jax.random.bernoulli(_key_of(self), 1 - rate, x.shape)
        return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


class StochasticDepth(BaseLayer):
    """Like `Dropout`, of whole examples at once.

    Put on the branch of a residual block, it skips the block for some of the examples.

    Reference: Huang et al., Deep Networks with Stochastic Depth, https://arxiv.org/abs/1603.09382, section 3.
    """

    @config_class
    class Config(BaseLayer.Config):
        """Configures `StochasticDepth`."""

        # Probability of dropping, in [0, 1). None: 0.
        rate: Optional[float] = None
        # "row": decide for each example (entry of the first dim) alone; "batch": once for all.
        mode: str = "row"

    def __init__(self, cfg: Config, *, parent: Optional[BaseLayer]):
        super().__init__(cfg, parent=parent)
        _check_rate(self)
        if cfg.mode not in ("row", "batch"):
            raise ValueError(
                error_message(where=self.path(), what=f"mode={cfg.mode!r}", expected="'row' or 'batch'")
            )

    def forward(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Drops examples; the first dim of `x` counts them."""
        cfg: StochasticDepth.Config = self.config
        if not self.is_training or not cfg.rate:
            return x
        num_decisions = x.shape[0] if cfg.mode == "row" else 1
        keep = jax.random.bernoulli(_key_of(self), 1 - cfg.rate, (num_decisions,) + (1,) * (x.ndim - 1))
        return jnp.where(keep, x / (1 - cfg.rate), 0).astype(x.dtype)


def _key_of(layer: BaseLayer) -> jax.Array:
    key = layer.prng_key
    if key is None:
        raise ValueError(
            error_message(
                where=layer.path(),
                what=f"rate={layer.config.rate} in training without a PRNG key",
                expected="a key in the context, such as functional(layer, prng_key, ...)",
            )
        )
    return key


def _check_rate(layer: BaseLayer) -> None:
    rate = layer.config.rate
    if rate is not None and not 0 <= rate < 1:
        raise ValueError(
            error_message(
                where=layer.path(),
                what=f"rate={rate}",
                expected="a probability in [0, 1), or None for no dropping",
            )
        )
