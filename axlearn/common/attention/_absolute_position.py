"""Embeddings of absolute positions, to be added to those of tokens."""

import math
from collections.abc import Sequence
from typing import Any, Optional

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from axlearn.common.attention._position import angles_of, geometric_frequencies
from axlearn.common.base_layer import BaseLayer, ParameterSpec
from axlearn.common.config import REQUIRED, Required, config_class
from axlearn.common.param_init import FanAxes
from axlearn.common.utils import maybe_shard


class LearnedPositionalEmbedding(BaseLayer):
    """A learned vector for each position.

    Reference: Gehring et al., Convolutional Sequence to Sequence Learning, https://arxiv.org/abs/1705.03122,
        section 3.1.
    """

    @config_class
    class Config(BaseLayer.Config):
        """Configures `LearnedPositionalEmbedding`."""

        # Size of a vector.
        dim: Required[int] = REQUIRED
        # Number of positions, such as [2048]; several numbers for the rows and columns of a picture, whose
        # positions are counted row by row.
        shape: Required[Sequence[int]] = REQUIRED
        # How the vectors of `forward` lie on the mesh; one entry a dim. None: as the compiler likes.
        output_partition_spec: Optional[Any] = None

    @property
    def num_positions(self) -> int:
        """How many positions there are."""
        return math.prod(self.config.shape)

    def _create_layer_parameter_specs(self) -> dict[str, ParameterSpec]:
        cfg: LearnedPositionalEmbedding.Config = self.config
        num_dims = len(cfg.shape)
        return {
            "weight": ParameterSpec(
                shape=(*cfg.shape, cfg.dim),
                mesh_axes=cfg.param_partition_spec,
                fan_axes=FanAxes(in_axis=tuple(range(num_dims)), out_axis=num_dims),
            )
        }

    def forward(self, positions: Int[Array, "*batch"]) -> Float[Array, "*batch dim"]:
        """Looks vectors up.

        Args:
            positions: Positions in [0, num_positions).

        Returns:
            The vectors. Any other position gives NaN: never silently another position's vector.
        """
        cfg: LearnedPositionalEmbedding.Config = self.config
        table = self.parameters["weight"].reshape(-1, cfg.dim)
        vectors = table.at[positions].get(mode="fill", wrap_negative_indices=False)
        return maybe_shard(vectors, cfg.output_partition_spec)


class SinusoidalPositionalEmbedding(BaseLayer):
    """Sines and cosines of the position, with wavelengths from 2 pi to 2 pi theta.

    Dim 2i is `sin(position / theta^(2i/dim))`, dim 2i + 1 the cosine of the same: sines and cosines
    alternate. There is no longest sequence.

    Reference: Vaswani et al., Attention Is All You Need, https://arxiv.org/abs/1706.03762, section 3.5.
    """

    @config_class
    class Config(BaseLayer.Config):
        """Configures `SinusoidalPositionalEmbedding`."""

        # Size of a vector; even.
        dim: Required[int] = REQUIRED
        # Base of the wavelengths.
        theta: float = 10000.0

    def forward(self, positions: Int[Array, "*batch"]) -> Float[Array, "*batch dim"]:
        """Computes the vectors.

        Args:
            positions: Positions, counted from 0.

        Returns:
            The vectors, float32.

        Raises:
            ValueError: If `dim` is odd.
        """
        cfg: SinusoidalPositionalEmbedding.Config = self.config
        frequencies = geometric_frequencies(dim=cfg.dim, theta=cfg.theta, where=self.path())
        angles = angles_of(positions, frequencies)
        return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(*positions.shape, cfg.dim)
