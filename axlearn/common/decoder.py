"""The decoder: embedding, transformer stack, output norm and head, for whole sequences and token by token."""

from collections.abc import Mapping
from typing import Any, Optional

import jax.numpy as jnp
import numpy as np

from axlearn.common.attention import (
    CausalAttentionLogitBiasLayer,
    set_num_seq_chunks,
    set_position_biases,
)
from axlearn.common.base_layer import BaseLayer, ParameterSpec
from axlearn.common.config import (
    REQUIRED,
    ConfigOr,
    InstantiableConfig,
    Required,
    config_class,
    maybe_instantiate,
)
from axlearn.common.decoding import (
    SampleOutputs,
    StopDecodingCondition,
    StopOnSubsequence,
    sample_decode,
)
from axlearn.common.embedding import TransformerTextEmbeddings
from axlearn.common.layers import (
    Dropout,
    LayerNorm,
    dims_split_by_batch_axes,
    gather_weight,
    place_output_table,
    set_dropout_rate_recursively,
)
from axlearn.common.logit_modifiers import LogitsToLogitsFn
from axlearn.common.module import Module, child_context, functional
from axlearn.common.sequence_order import check_num_chunks, head_tail_indices
from axlearn.common.utils import NestedTensor, Tensor, maybe_shard


class LmHead(BaseLayer):
    """An output head with a weight of its own, whose rows are scored against the hidden states."""

    @config_class
    class Config(BaseLayer.Config):
        """Configures LmHead."""

        # Number of ids.
        vocab_size: Required[int] = REQUIRED
        # Dimension of the hidden states.
        embedding_dim: Required[int] = REQUIRED
        # How logits [batch, seq, vocab_size] lie on the mesh. None: as the decoder sets it, from its
        # logits_partition_spec.
        output_partition_spec: Optional[tuple] = None

    @classmethod
    def default_config(cls) -> Config:
        """Shards the vocabulary over nothing and the hidden dimension over "model"."""
        cfg = super().default_config()
        cfg.param_partition_spec = (None, "model")
        return cfg

    def _create_layer_parameter_specs(self) -> dict[str, ParameterSpec]:
        cfg = self.config
        return {
            "weight": ParameterSpec(
                shape=(cfg.vocab_size, cfg.embedding_dim), mesh_axes=cfg.param_partition_spec
            )
        }

    def forward(self, x: Tensor, *, table: Optional[Tensor] = None) -> Tensor:
        """Maps hidden states [batch, seq, dim] to logits [batch, seq, vocab_size].

        Args:
            x: Hidden states.
            table: What `output_table` gave, by a caller that scores more than once; None: the weight as it is stored.
        """
        spec, output_spec = self.config.param_partition_spec, self.config.output_partition_spec
        if table is None:
            dims = dims_split_by_batch_axes(spec, output_spec)
            table = gather_weight(self.parameters["weight"], spec, dims=dims)
        return maybe_shard(jnp.einsum("bsd,vd->bsv", x, table), output_spec)

    def output_table(self) -> Tensor:
        """Returns the weight [vocab_size, dim] placed for logits that lie as `output_partition_spec` says."""
        cfg = self.config
        weight, spec = self.parameters["weight"], cfg.param_partition_spec
        if cfg.output_partition_spec is None:
            return weight
        return place_output_table(weight, spec, logits_partition_spec=cfg.output_partition_spec)


class DecodingLayer(BaseLayer):
    """How a decoder samples: the decoder hands over how it extends its states, this layer runs the loop.

    It has no parameters. A subclass may sample by another method.
    """

    def sample_decode(
        self,
        *,
        decoder: "Decoder",
        decoder_state: NestedTensor,
        prompt_ids: Tensor,
        prompt_lens: Tensor,
        prng_key: Tensor,
        max_len: int,
        num_decodes: int = 1,
        logits_modifier: Optional[ConfigOr[LogitsToLogitsFn]] = None,
        stop_decoding_condition: Optional[ConfigOr[StopDecodingCondition]] = None,
    ) -> SampleOutputs:
        """Samples continuations of prompts; see `axlearn.common.decoding.sample_decode`.

        Args:
            decoder: The decoder to sample from.
            decoder_state: Its parameters.
            prompt_ids: [batch, prompt_len] int32.
            prompt_lens: [batch] int32 in [1, prompt_len].
            prng_key: Decides the samples.
            max_len: Ids in a sequence at most, the prompt included.
            num_decodes: Continuations of each prompt.
            logits_modifier: Shapes the distribution; None: the model's own.
            stop_decoding_condition: Ends a row; None: the decoder's `eos_token_id` does.

        Returns:
            The sequences.
        """
        pure = _PureDecoder(decoder, decoder_state)
        if stop_decoding_condition is None:
            stop_decoding_condition = StopOnSubsequence([[decoder.config.eos_token_id]])
        return sample_decode(
            prompt_ids=prompt_ids,
            prompt_lens=prompt_lens,
            cache=pure.init_states(batch_size=prompt_ids.shape[0] * num_decodes, max_len=max_len),
            extend_fn=pure.extend,
            prng_key=prng_key,
            max_len=max_len,
            num_decodes=num_decodes,
            logits_modifier=maybe_instantiate(logits_modifier),
            stop_decoding_condition=maybe_instantiate(stop_decoding_condition),
            pad_token_id=decoder.config.pad_token_id,
        )


class _PureDecoder:
    """A decoder with its parameters, as functions that a loop may trace: they leave no outputs behind."""

    def __init__(self, decoder: "Decoder", state: NestedTensor):
        self._decoder = decoder
        self._state = state

    def _call(self, method: str, **inputs: Any) -> Any:
        # A loop traces its body with tracers of its own, which must not end up in the caller's context.
        outputs, _ = functional(
            self._decoder,
            prng_key=None,
            state=self._state,
            inputs=inputs,
            method=method,
            is_training=False,
            drop_output_collections=("summaries", "state_updates", "module_outputs"),
        )
        return outputs

    def init_states(self, *, batch_size: int, max_len: int) -> dict[str, Any]:
        return self._call("init_states", batch_size=batch_size, max_len=max_len)

    def extend(
        self, cache: NestedTensor, token_ids: Tensor, *, live_step_len: Tensor
    ) -> tuple[NestedTensor, Tensor]:
        """See `axlearn.common.decoding.ExtendFn`."""
        cache, outputs = self._call(
            "extend_step", cached_states=cache, input_ids=token_ids, live_step_len=live_step_len
        )
        # Of a prompt only the last position needs logits; the others' are dead code to the compiler.
        last = jnp.maximum(live_step_len - 1, 0)
        hidden_states = jnp.take_along_axis(outputs["hidden_states"], last[:, None, None], axis=1)
        return cache, self._call("compute_logits", hidden_states=hidden_states)[:, 0]


class Decoder(BaseLayer):
    """A transformer decoder over token ids.

    Parameters live in the children `emb`, `transformer`, `output_norm` and, where the head is not the
    transposed embedding, `lm_head`.
    """

    @config_class
    class Config(BaseLayer.Config):
        """Configures Decoder."""

        # Config of a logit-bias layer, such as `ALiBiAttentionLogitBiasLayer.default_config()`, or of a mask,
        # such as `SlidingWindowAttentionBias.default_config()`. Its mask is that of every self-attention layer
        # that says neither `causal` nor `mask` itself, its bias that of every one without `logit_bias`. None:
        # what the layers say.
        attention_mask: Optional[InstantiableConfig] = CausalAttentionLogitBiasLayer.default_config()
        # Number of ids.
        vocab_size: Required[int] = REQUIRED
        # Dimension of the hidden states.
        dim: Required[int] = REQUIRED
        # Dropout rate of every child whose own rate is None, in [0, 1).
        dropout_rate: float = 0.0
        # Token ids to hidden states.
        emb: BaseLayer.Config = TransformerTextEmbeddings.default_config()
        # The stack of layers.
        transformer: Required[BaseLayer.Config] = REQUIRED
        # Norm between the last layer and the head; None: no norm.
        output_norm: Optional[BaseLayer.Config] = LayerNorm.default_config()
        # Dropout between the norm and the head.
        output_dropout: Dropout.Config = Dropout.default_config()
        # The head; None: the transposed token embedding.
        lm_head: Optional[LmHead.Config] = None
        # The id that fills a row behind its last token.
        pad_token_id: int = 0
        # The id behind the last token of a document; sampling stops at it.
        eos_token_id: int = 1
        # How logits [batch, seq, vocab_size] lie on the mesh; None: the compiler decides.
        logits_partition_spec: Optional[tuple] = ("data", None, "model")
        # How hidden states [batch, seq, dim] lie on the mesh before the head; None: the compiler decides.
        hidden_state_partition_spec: Optional[tuple] = None
        # Type that the head computes in; None: that of the hidden states.
        logits_forward_dtype: Optional[Any] = None
        # Applied to all logits, in training too; None: nothing is.
        output_logits_modifier: Optional[ConfigOr[LogitsToLogitsFn]] = None
        # The order in which the positions of a row lie in `forward`: head-tail order of so many chunks, in which
        # devices that split a row have equal work, see `sequence_order`. Twice the number of these devices is right,
        # and other numbers give the same results. Every self-attention layer is told. None: the order of the text.
        num_seq_chunks: Optional[int] = None
        # How `sample_decode` samples.
        decoding: DecodingLayer.Config = DecodingLayer.default_config()

    def __init__(self, cfg: Config, *, parent: Optional[Module]):
        super().__init__(cfg, parent=parent)
        cfg = self.config
        check_num_chunks(self.num_seq_chunks, where=f"{self.path()}.num_seq_chunks")
        # The order of the children decides which random numbers initialize them.
        self._add_child("emb", self._with_dropout(cfg.emb.clone(dim=cfg.dim, vocab_size=cfg.vocab_size)))
        transformer = self._with_mask(self._with_dropout(cfg.transformer.clone(input_dim=cfg.dim)))
        set_num_seq_chunks(transformer, cfg.num_seq_chunks, where=self.path())
        self._add_child("transformer", transformer)
        if cfg.output_norm is not None:
            self._add_child("output_norm", cfg.output_norm.clone(input_dim=cfg.dim))
        self._add_child("output_dropout", self._with_dropout(cfg.output_dropout.clone()))
        if cfg.lm_head is not None:
            head_cfg = cfg.lm_head.clone(vocab_size=cfg.vocab_size, embedding_dim=cfg.dim)
            if head_cfg.output_partition_spec is None:
                head_cfg.output_partition_spec = cfg.logits_partition_spec
            self._add_child("lm_head", head_cfg)
        self._add_child("decoding", cfg.decoding)
        self._output_logits_modifier = maybe_instantiate(cfg.output_logits_modifier)

    def _with_dropout(self, cfg: BaseLayer.Config) -> BaseLayer.Config:
        """Fills in this decoder's dropout rate where the child leaves its own open."""
        set_dropout_rate_recursively(cfg, self.config.dropout_rate, set_only_if_none=True)
        return cfg

    def _with_mask(self, cfg: BaseLayer.Config) -> BaseLayer.Config:
        """Fills in this decoder's mask and bias where an attention layer has none."""
        if self.config.attention_mask is not None:
            set_position_biases(cfg, self.config.attention_mask)
        return cfg

    @property
    def num_seq_chunks(self) -> int:
        """Number of chunks of the order in which the positions of a row lie in `forward`; 1: that of the text."""
        return 1 if self.config.num_seq_chunks is None else self.config.num_seq_chunks

    def forward(self, input_batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Computes the hidden states of whole sequences.

        Where `num_seq_chunks` is set, rows that are given lie in head-tail order, and so do those that are returned:
        `sequence_order.to_head_tail_order` puts them there. (`causal_lm.Model` takes and returns the order of the
        text.)

        Args:
            input_batch: A dictionary with
                input_ids: [batch, seq_len] int32;
                input_segment_ids: [batch, seq_len] int32, optional: positions of different segments do not
                    see each other (packed documents; 0 stands for padding);
                input_positions (or `positions`): [batch, seq_len] int32, optional; None: the indices in the row.

        Returns:
            A dictionary with hidden_states: [batch, seq_len, dim], normed, ready for `compute_logits`.
        """
        input_ids = input_batch["input_ids"]
        positions = input_batch.get("input_positions", input_batch.get("positions"))
        if positions is None and self.num_seq_chunks > 1:
            self.emb.check_seq_len(input_ids.shape[1])
            positions = jnp.asarray(self._indices(input_ids.shape[1]))[None]
        x = self.emb(input_ids, positions=positions)
        x = self.transformer(
            x,
            segment_ids=input_batch.get("input_segment_ids"),
            positions=positions,
        ).data
        return {"hidden_states": self._finish(x)}

    def _indices(self, seq_len: int) -> np.ndarray:
        """The index in the text of what lies at each place of a row."""
        num_chunks = self.num_seq_chunks
        check_num_chunks(num_chunks, seq_len=seq_len, where=f"{self.path()}.num_seq_chunks")
        return head_tail_indices(seq_len, num_chunks=num_chunks)

    def _finish(self, x: Tensor) -> Tensor:
        """What follows the last layer, up to the head."""
        if "output_norm" in self.children:
            x = self.output_norm(x)
        return maybe_shard(self.output_dropout(x), self.config.hidden_state_partition_spec)

    def compute_logits(self, hidden_states: Tensor, *, table: Optional[Tensor] = None) -> Tensor:
        """Maps hidden states of `forward` to logits.

        Args:
            hidden_states: [batch, seq_len, dim].
            table: What `output_table` gave, by a caller that comes more than once, such as a loop over chunks: then no
                parameter is read here. None: the head's own.

        Returns:
            [batch, seq_len, vocab_size], in the type of the hidden states or in `logits_forward_dtype`.
        """
        cfg = self.config
        if cfg.logits_forward_dtype is not None:
            hidden_states = hidden_states.astype(cfg.logits_forward_dtype)
        logits = self._head(hidden_states, table=table)
        logits = maybe_shard(logits, cfg.logits_partition_spec)
        return logits if self._output_logits_modifier is None else self._output_logits_modifier(logits)

    def _head(self, hidden_states: Tensor, *, table: Optional[Tensor]) -> Tensor:
        if "lm_head" in self.children:
            return self.lm_head(hidden_states, table=table)
        return self.attend(hidden_states, table=table)

    def attend(self, hidden_states: Tensor, *, table: Optional[Tensor] = None) -> Tensor:
        """Scores hidden states [batch, seq_len, dim] against the token embedding: [batch, seq_len, vocab]."""
        # In a context of its own: a decoding step has embedded its tokens in that of `emb`.
        with child_context("emb_attend", module=self.emb):
            spec = self.config.logits_partition_spec
            return self.emb.attend(hidden_states, logits_partition_spec=spec, table=table)

    def output_table(self) -> Tensor:
        """Returns the head's weight [vocab_size, dim], placed on the mesh as `compute_logits` multiplies by it."""
        if "lm_head" in self.children:
            return self.lm_head.output_table()
        with child_context("emb_attend", module=self.emb):
            return self.emb.output_table(logits_partition_spec=self.config.logits_partition_spec)

    def init_states(self, *, batch_size: int, max_len: int) -> dict[str, Any]:
        """Cached states before the first token.

        Args:
            batch_size: Rows.
            max_len: Tokens that each row has room for.

        Returns:
            What `extend_step` takes and returns; `time_step` [batch] int32 counts the tokens of each row.

        Raises:
            ValueError: The embedding has fewer than `max_len` positions.
        """
        self.emb.check_seq_len(max_len)
        return {
            "time_step": jnp.zeros([batch_size], dtype=jnp.int32),
            "transformer": self.transformer.init_states(batch_size=batch_size, max_len=max_len),
        }

    def extend_step(
        self, cached_states: Mapping[str, Any], input_ids: Tensor, *, live_step_len: Optional[Tensor] = None
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Continues each row at its own time step by one or more tokens.

        A prompt is a long step from empty states.

        Args:
            cached_states: From `init_states` or a previous call.
            input_ids: [batch, t] int32.
            live_step_len: [batch] int32 in [0, t]: how many of the t tokens are real; the others leave no
                trace and have no meaningful output. None: all.

        Returns:
            The new cached states, and a dictionary with hidden_states [batch, t, dim] and logits [batch, t,
            vocab_size].
        """
        time_step = cached_states["time_step"]
        step_len = input_ids.shape[1]
        positions = time_step[:, None] + jnp.arange(step_len, dtype=time_step.dtype)[None, :]
        x = self.emb(input_ids, positions=positions)
        transformer_states, outputs = self.transformer.extend_step(
            cached_states["transformer"], x, live_step_len=live_step_len
        )
        hidden_states = self._finish(outputs.data)
        new_states = {
            "time_step": time_step + (step_len if live_step_len is None else live_step_len),
            "transformer": transformer_states,
        }
        return new_states, {
            "hidden_states": hidden_states,
            "logits": self.compute_logits(hidden_states),
        }

    def sample_decode(
        self, input_batch: Mapping[str, Tensor], *, max_len: int, num_decodes: int = 1, **kwargs: Any
    ) -> SampleOutputs:
        """Samples continuations of prompts.

        Args:
            input_batch: A dictionary with
                prefix: [batch, prefix_len] int32: prompts, each followed by `pad_token_id` up to prefix_len;
                prefix_lens: [batch] int32, optional: ids in each prompt; None: up to its last id that is not
                    `pad_token_id`.
            max_len: Ids in a sequence at most, the prompt included.
            num_decodes: Continuations of each prompt.
            **kwargs: To `DecodingLayer.sample_decode`: `logits_modifier`, `stop_decoding_condition`.

        Returns:
            The sequences.

        Raises:
            ValueError: The prefixes are longer than `max_len`.
        """
        prefix = input_batch["prefix"]
        prefix_lens = input_batch.get("prefix_lens")
        if prefix_lens is None:
            prefix_lens = _num_ids(prefix, pad_token_id=self.config.pad_token_id)
        return self.decoding.sample_decode(
            decoder=self,
            decoder_state=self.state,
            prompt_ids=prefix,
            prompt_lens=prefix_lens,
            prng_key=self.prng_key,
            max_len=max_len,
            num_decodes=num_decodes,
            **kwargs,
        )


def _num_ids(ids: Tensor, *, pad_token_id: int) -> Tensor:
    """[batch] int32: the position behind the last id of each row that is not padding, at least 1."""
    ordinals = jnp.arange(1, ids.shape[1] + 1, dtype=jnp.int32)[None, :]
    return jnp.maximum(jnp.max(jnp.where(ids != pad_token_id, ordinals, 0), axis=1), 1)
