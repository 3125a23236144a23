"""Rotary position embeddings, and the frequencies of sinusoidal ones."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from axlearn.common.base_layer import BaseLayer
from axlearn.common.config import REQUIRED, Required, config_class, error_message


def geometric_frequencies(*, dim: int, theta: float, where: str) -> np.ndarray:
    """`theta ** (-2 i / dim)` for i < dim / 2.

    Args:
        dim: An even size.
        theta: The base.
        where: The path of the layer, for the message where `dim` is odd.

    Returns:
        float64 [dim / 2]: a relative error of a frequency grows with the position.
    """
    if dim % 2:
        raise ValueError(
            error_message(
                where=where, what=f"dim={dim}", expected="an even size, for a sine and a cosine a frequency"
            )
        )
    return np.power(float(theta), -np.arange(0, dim, 2) / dim)


def angles_of(positions: Array, frequencies: np.ndarray) -> Array:
    """The products of positions `[...]` and frequencies `[n]`: float32 `[..., n]`."""
    frequencies = frequencies.reshape((1,) * positions.ndim + (-1,))
    return positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)


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
        angles = angles_of(positions, self._frequencies())
        sinusoids = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
        amplitude = self._amplitude()
        return sinusoids if amplitude == 1 else sinusoids * amplitude

    def _frequencies(self) -> np.ndarray:
        """The angle in radians between one position and the next: float64 [dim / 2]."""
        cfg: RoFormerSinusoidalPositionalEmbedding.Config = self.config
        return geometric_frequencies(dim=cfg.dim, theta=cfg.theta, where=self.path())

    def _amplitude(self) -> float:
        """What sines and cosines are multiplied by."""
        return 1.0


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
    rotary_key: bool = True,
    rotary_value: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rotates queries, and unless told otherwise keys, of a self-attention by their positions.

    Args:
        query: Queries.
        key: Keys, at the positions of the queries.
        value: Values, at the positions of the queries.
        sinusoidal_pos: See `rotate_pairs`.
        rotary_key: Whether to rotate the keys too.
        rotary_value: Whether to rotate the values too.

    Returns:
        Queries, keys and values.
    """
    return (
        rotate_pairs(query, sinusoidal_pos),
        rotate_pairs(key, sinusoidal_pos) if rotary_key else key,
        rotate_pairs(value, sinusoidal_pos) if rotary_value else value,
    )
