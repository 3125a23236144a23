"""The embedding of text: tokens, and where configured their positions and types."""

from typing import Any, Optional

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from axlearn.common.attention import LearnedPositionalEmbedding
from axlearn.common.base_layer import BaseLayer
from axlearn.common.config import REQUIRED, Required, config_class, error_message
from axlearn.common.layers import Dropout, Embedding
from axlearn.common.module import nowrap


class TransformerTextEmbeddings(BaseLayer):
    """Adds up the embeddings of a token, of its position and of its type, then drops out."""

    @config_class
    class Config(BaseLayer.Config):
        """Configures `TransformerTextEmbeddings`."""

        # Size of the vectors.
        dim: Required[int] = REQUIRED
        # Number of token ids.
        vocab_size: Required[int] = REQUIRED
        # The embedding of token ids.
        token_emb: BaseLayer.Config = Embedding.default_config()
        # The embedding of positions: a `LearnedPositionalEmbedding` (or an `Embedding`) with as many vectors as
        # the longest sequence has tokens, or a `SinusoidalPositionalEmbedding`. None: positions are not
        # embedded.
        pos_emb: Optional[BaseLayer.Config] = None
        # The embedding of token types: an `Embedding` whose `num_embeddings` is their number. None: there are
        # no types.
        type_emb: Optional[BaseLayer.Config] = None
        # Dropout of the sum.
        dropout: BaseLayer.Config = Dropout.default_config()

    def __init__(self, cfg: Config, *, parent: Optional[BaseLayer]):
        super().__init__(cfg, parent=parent)
        self._add_child("token_emb", cfg.token_emb.clone(dim=cfg.dim, num_embeddings=cfg.vocab_size))
        if cfg.pos_emb is not None:
            self._add_child("pos_emb", cfg.pos_emb.clone(dim=cfg.dim))
        if cfg.type_emb is not None:
            self._add_child("type_emb", cfg.type_emb.clone(dim=cfg.dim))
        self._add_child("dropout", cfg.dropout)

    @property
    def num_positions(self) -> Optional[int]:
        """How many positions there are, counted from 0; None: any number."""
        pos_emb = self.children.get("pos_emb")
        if isinstance(pos_emb, Embedding):
            return pos_emb.config.num_embeddings
        return pos_emb.num_positions if isinstance(pos_emb, LearnedPositionalEmbedding) else None

    @nowrap
    def check_seq_len(self, seq_len: int) -> None:
        """Raises ValueError for sequences with more tokens than there are positions."""
        num_positions = self.num_positions
        if num_positions is not None and seq_len > num_positions:
            raise ValueError(
                error_message(
                    where=self.path(),
                    what=f"a sequence of {seq_len} tokens",
                    expected=f"at most {num_positions}, the number of positions of pos_emb",
                    advice="give pos_emb more positions, or shorten the sequences",
                )
            )

    def forward(
        self,
        input_ids: Int[Array, "batch seq"],
        *,
        positions: Optional[Int[Array, "#batch seq"]] = None,
        token_type_ids: Optional[Int[Array, "batch seq"]] = None,
    ) -> Float[Array, "batch seq dim"]:
        """Embeds a batch of token ids.

        Args:
            input_ids: Token ids in [0, vocab_size).
            positions: Positions in the text, for `pos_emb`; one that a table of them does not have gives NaN.
                None: 0, 1, 2, ...
            token_type_ids: Types, for `type_emb`.

        Returns:
            The embeddings.

        Raises:
            ValueError: If `type_emb` is configured and `token_type_ids` is None, or the other way round. If
                `positions` is None and there are fewer positions than tokens.
        """
        cfg: TransformerTextEmbeddings.Config = self.config
        if (token_type_ids is None) != (cfg.type_emb is None):
            raise ValueError(
                error_message(
                    where=self.path(),
                    what=f"token_type_ids {'missing' if token_type_ids is None else 'given'}",
                    expected="token_type_ids where type_emb is configured, and only there",
                )
            )
        x = self.token_emb(input_ids)
        if cfg.pos_emb is not None:
            if positions is None:
                self.check_seq_len(input_ids.shape[1])
                positions = jnp.arange(input_ids.shape[1])[None]
            x = x + self.pos_emb(positions).astype(x.dtype)
        if cfg.type_emb is not None:
            x = x + self.type_emb(token_type_ids)
        return self.dropout(x)

    def attend(
        self,
        x: Float[Array, "*batch dim"],
        *,
        logits_partition_spec: Optional[Any] = None,
        table: Optional[Float[Array, "vocab dim"]] = None,
    ) -> Float[Array, "*batch vocab"]:
        """Scores vectors against all token ids by the token embeddings; see `Embedding.attend`."""
        return self.token_emb.attend(x, logits_partition_spec=logits_partition_spec, table=table)

    def output_table(self, *, logits_partition_spec: Optional[Any] = None) -> Float[Array, "vocab dim"]:
        """The token embeddings as they lie for `attend`; see `Embedding.output_table`."""
        return self.token_emb.output_table(logits_partition_spec=logits_partition_spec)
