"""The embedding table."""

from typing import Any, Optional

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from axlearn.common.base_layer import BaseLayer, FactorizationSpec, ParameterSpec
from axlearn.common.config import REQUIRED, Required, config_class
from axlearn.common.layers._gather import gather_weight, place_output_table
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
        # How the ids of `forward` lie on the mesh; one entry a dim. None: as the compiler likes.
        input_partition_spec: Optional[Any] = None
        # How the vectors of `forward` lie on the mesh; one entry a dim. None: as the compiler likes.
        output_partition_spec: Optional[Any] = None
        # How the table lies while it is used, as `param_partition_spec` says how it is stored: (ids, dim). None: as
        # the compiler likes.
        embedding_partition_spec: Optional[Any] = None

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
        weight = maybe_shard(self.parameters["weight"], cfg.embedding_partition_spec)
        input_ids = maybe_shard(input_ids, cfg.input_partition_spec)
        vectors = weight.at[input_ids].get(mode="fill", wrap_negative_indices=False)
        return maybe_shard(vectors, cfg.output_partition_spec)

    def attend(
        self,
        x: Float[Array, "*batch dim"],
        *,
        logits_partition_spec: Optional[Any] = None,
        table: Optional[Float[Array, "num_embeddings dim"]] = None,
    ) -> Float[Array, "*batch num_embeddings"]:
        """Scores vectors against all ids: the output layer that shares its weights with the embedding.

        Args:
            x: Vectors.
            logits_partition_spec: How the scores are to lie on the mesh, one entry a dim; the vectors and the table,
                which are small beside them, are placed so that no score moves. None: as the compiler likes.
            table: What `output_table` gave, by a caller that scores more than once; None: it is placed here.

        Returns:
            The product of `x` with the transposed table.

        Reference: Press and Wolf, https://arxiv.org/abs/1608.05859, section 3.
        """
        if table is None:
            table = self.output_table(logits_partition_spec=logits_partition_spec)
        if logits_partition_spec is not None and self.config.embedding_partition_spec is None:
            # A partition spec need not name the last dims.
            spec = (*logits_partition_spec, *(None,) * (x.ndim - len(logits_partition_spec)))
            x = maybe_shard(x, (*spec[:-1], None))
        return jnp.einsum("...d,vd->...v", x, table)

    def output_table(
        self, *, logits_partition_spec: Optional[Any] = None
    ) -> Float[Array, "num_embeddings dim"]:
        """Returns the table as it lies for `attend`; in a loop over `attend` it is to move once, before the loop.

        Args:
            logits_partition_spec: As for `attend`, of scores [batch, seq, num_embeddings].
        """
        cfg: Embedding.Config = self.config
        weight = self.parameters["weight"]
        if cfg.embedding_partition_spec is not None:
            return maybe_shard(weight, cfg.embedding_partition_spec)
        if logits_partition_spec is not None:
            return place_output_table(
                weight, cfg.param_partition_spec, logits_partition_spec=logits_partition_spec
            )
        return gather_weight(weight, cfg.param_partition_spec, dims=[0])
