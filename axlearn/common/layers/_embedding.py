"""The embedding table."""

from typing import Any, Optional

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from axlearn.common.base_layer import BaseLayer, FactorizationSpec, ParameterSpec
from axlearn.common.config import REQUIRED, Required, config_class
from axlearn.common.layers._gather import gather_weight
from axlearn.common.utils import maybe_shard


class Embedding(BaseLayer):
    """A vector for each id."""

    @config_class
    class Config(BaseLayer.Config):
        """Configures `Embedding`."""

        # Number of ids.
        num_embeddings: Required[int] = REQUIRED
        # Size of a vector.
        dim: Required[int] = REQUIRED
        # How the vectors of `forward` lie on the mesh; one entry a dim. None: as the compiler likes.
        output_partition_spec: Optional[Any] = None

    @classmethod
    def default_config(cls) -> Config:
        """The default config: the vectors are split over the axis "model"."""
        return super().default_config().set(param_partition_spec=(None, "model"))

    def _create_layer_parameter_specs(self) -> dict[str, ParameterSpec]:
        cfg: Embedding.Config = self.config
        return {
            # A list, because the golden descriptions of initialisers print it as one.
            "weight": ParameterSpec(
                shape=[cfg.num_embeddings, cfg.dim],
                mesh_axes=cfg.param_partition_spec,
                factorization=FactorizationSpec(axes=("row", "col")),
            )
        }

    def forward(self, input_ids: Int[Array, "*batch"]) -> Float[Array, "*batch dim"]:
        """Looks vectors up.

        Args:
            input_ids: Ids in [0, num_embeddings).

        Returns:
            The vectors. Any other id, also a negative one, gives NaN: never silently another id's vector.
        """
        cfg: Embedding.Config = self.config
        weight = self.parameters["weight"]
        vectors = weight.at[input_ids].get(mode="fill", wrap_negative_indices=False)
        return maybe_shard(vectors, cfg.output_partition_spec)

    def attend(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch num_embeddings"]:
        """Scores vectors against all ids: the output layer that shares its weights with the embedding.

        Args:
            x: Vectors.

        Returns:
            The product of `x` with the transposed table.

        Reference: Press and Wolf, https://arxiv.org/abs/1608.05859, section 3.
        """
        weight = gather_weight(self.parameters["weight"], self.config.param_partition_spec, dims=[0])
        return jnp.einsum("...d,vd->...v", x, weight)
