"""Rotary position embeddings."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from axlearn.common.base_layer import BaseLayer
from axlearn.common.config import REQUIRED, Required, config_class, error_message


class RoFormerSinusoidalPositionalEmbedding(BaseLayer):
    """The sines and cosines by which pairs of dims are rotated.

    Pair i of `dim / 2` turns by `theta ** (-2 i / dim)` radians from one position to the next.

    Reference: Su et al., RoFormer, https://arxiv.org/abs/2104.09864, section 3.2.2.
    """

    @config_class
    class Config(BaseLayer.Config):
        """Configures `RoFormerSinusoidalPositionalEmbedding`."""

        # Size of the heads to be rotated; even.
        dim: Required[int] = REQUIRED
        # Base of the wavelengths, the longest of which is about 2 pi theta positions.
        theta: float = 10000.0

    def forward(self, positions: Int[Array, "*batch seq"]) -> Float[Array, "*batch seq dim"]:
        """Computes sines and cosines.

        Args:
            positions: Positions, counted from 0.

        Returns:
            float32; the first half of the last dim holds the sines, the second the cosines.

        Raises:
            ValueError: If `dim` is odd.
        """
        cfg: RoFormerSinusoidalPositionalEmbedding.Config = self.config
        if cfg.dim % 2:
            raise ValueError(
                error_message(
                    where=self.path(), what=f"dim={cfg.dim}", expected="an even size, for rotation in pairs"
                )
            )
        # Made in float64: a relative error of the frequency grows with the position.
        frequencies = np.power(float(cfg.theta), -np.arange(0, cfg.dim, 2) / cfg.dim)
        frequencies = frequencies.reshape((1,) * positions.ndim + (-1,))
        angles = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def rotate_pairs(
    x: Float[Array, "batch seq heads per_head_dim"], sinusoidal_pos: Float[Array, "#batch seq per_head_dim"]
) -> Float[Array, "batch seq heads per_head_dim"]:
    """Rotates the pairs of ADJACENT dims (0, 1), (2, 3), ... of every head.

    Args:
        x: Queries, keys or values.
        sinusoidal_pos: Sines and cosines of each position, see
            `RoFormerSinusoidalPositionalEmbedding.forward`.

    Returns:
        `y[2i] = x[2i] cos - x[2i+1] sin`, `y[2i+1] = x[2i+1] cos + x[2i] sin`, computed in float32, in the
        dtype of `x`.
    """
    sin, cos = jnp.split(sinusoidal_pos[:, :, None, :], 2, axis=-1)  # [batch, seq, 1, per_head_dim / 2]
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    rotated = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)


def apply_rotary_position_embeddings(
    *,
    query: Float[Array, "batch target heads per_head_dim"],
    key: Float[Array, "batch source kv_heads per_head_dim"],
    value: Float[Array, "batch source kv_heads per_head_dim"],
    sinusoidal_pos: Float[Array, "#batch target per_head_dim"],
    rotary_value: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rotates queries and keys of a self-attention by their positions.

    Args:
        query: Queries.
        key: Keys, at the positions of the queries.
        value: Values, at the positions of the queries.
        sinusoidal_pos: See `rotate_pairs`.
        rotary_value: Whether to rotate the values too.

    Returns:
        Queries, keys and values.
    """
    return (
        rotate_pairs(query, sinusoidal_pos),
        rotate_pairs(key, sinusoidal_pos),
        rotate_pairs(value, sinusoidal_pos) if rotary_value else value,
    )
