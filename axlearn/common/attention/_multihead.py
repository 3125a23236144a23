"""Multi-head attention."""

import dataclasses
from typing import Any, NamedTuple, Optional, Union

import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from axlearn.common.attention._linear import MultiheadOutputLinear
from axlearn.common.attention._logits import attention_context, attention_logits, attention_probs
from axlearn.common.attention._qkv import BaseQKVLinear, QKVLinear, QKVOutput, default_positions
from axlearn.common.attention._scale import ScaleKey, ScaleQuery
from axlearn.common.attention_bias import (
    BaseAttentionBias,
    BoolAttentionBias,
    CausalAttentionBias,
    LeftRightWindowAttentionBias,
    MaskFnAttentionBias,
    SegmentIdAttentionBias,
    SlidingWindowAttentionBias,
    ZeroAttentionBias,
    as_attention_bias,
)
from axlearn.common.base_layer import BaseLayer, ParameterSpec
from axlearn.common.config import (
    REQUIRED,
    ClassConfigBase,
    InstantiableConfig,
    Required,
    config_class,
    error_message,
)
from axlearn.common.kv_cache.base_kv_cache import UNWRITTEN_POSITION, KVCacheShape, KVState
from axlearn.common.kv_cache.kv_cache import KVCache
from axlearn.common.layers import Dropout
from axlearn.common.param_init import ConstantInitializer
from axlearn.common.sequence_order import check_num_chunks, head_tail_indices

# What a caller may pass as logit biases.
LogitBiases = Union[BaseAttentionBias, Float[Array, "*dims"]]


class AttentionOutput(NamedTuple):
    """What attention returns.

    Attributes:
        data: `[batch, target, output_dim]`.
        probs: The attention probabilities `[batch, num_heads, target, source]`; None unless asked for.
        kv_state: The keys and values that were attended to; None unless asked for.
    """

    data: Array
    probs: Optional[Array] = None
    kv_state: Optional[KVState] = None


class MultiheadAttention(BaseLayer):
    """Projects to heads, attends, projects back.

    Reference: Vaswani et al., Attention Is All You Need, https://arxiv.org/abs/1706.03762, section 3.2.2.
    """

    Output = AttentionOutput

    @config_class
    class Config(BaseLayer.Config):
        """Configures `MultiheadAttention`."""

        # Size of the last dim of queries, keys and values before projection.
        query_dim: Required[int] = REQUIRED
        key_dim: Required[int] = REQUIRED
        value_dim: Required[int] = REQUIRED
        # Size of the last dim of the outputs. None: query_dim.
        output_dim: Optional[int] = None
        # Size of all query heads together, a multiple of num_heads. None: query_dim.
        hidden_dim: Optional[int] = None
        # Number of query heads.
        num_heads: Required[int] = REQUIRED
        # The projection to queries, keys and values.
        input_linear: BaseLayer.Config = QKVLinear.default_config()
        # The projection of the heads to the outputs.
        output_linear: BaseLayer.Config = MultiheadOutputLinear.default_config()
        # Dropout of the attention probabilities.
        dropout: BaseLayer.Config = Dropout.default_config()
        # Scaling of queries and keys.
        query_scale: BaseLayer.Config = ScaleQuery.default_config()
        key_scale: BaseLayer.Config = ScaleKey.default_config()
        # Where incremental decoding keeps keys and values. None: a `KVCache` of the parameters' dtype.
        kv_cache: Optional[BaseLayer.Config] = None
        # Whether a query attends to keys at its own index and before only. None: False. Only one of causal
        # and mask.
        causal: Optional[bool] = None
        # Which keys a query attends to, such as
        # `SlidingWindowAttentionBias.default_config(sliding_window_size=...)`. Positions in the mask are
        # indices into the sequence. None: all keys, unless `causal`.
        mask: Optional[InstantiableConfig] = None
        # Makes a bias of target_positions and source_positions that is added to the logits, such as
        # `config_for_function(alibi_attention_bias)`; num_heads is filled in. None: nothing is added.
        logit_bias: Optional[InstantiableConfig] = None
        # Keeps logits within plus and minus this number, above 0, by tanh. None: no cap.
        atten_logit_cap: Optional[float] = None
        # The order in which the positions of a row lie in `forward`: head-tail order of so many chunks, see
        # `sequence_order`; self-attention only. A decoder fills it in. None: 1, the order of the text.
        num_seq_chunks: Optional[int] = None
        # Whether each head has a sink: a learned logit to which it can attend instead of to any key, see
        # `attention_probs`. It is the parameter "sink" [num_heads]. None: False.
        logit_sink: Optional[bool] = None

    def __init__(self, cfg: Config, *, parent: Optional[BaseLayer]):
        super().__init__(cfg, parent=parent)
        self._check_config()
        input_linear = cfg.input_linear.clone(
            query_dim=cfg.query_dim,
            key_dim=cfg.key_dim,
            value_dim=cfg.value_dim,
            num_heads=cfg.num_heads,
            per_head_dim=self.per_head_dim,
        )
        self._add_child("i_proj", input_linear)
        output_dim = cfg.query_dim if cfg.output_dim is None else cfg.output_dim
        output_linear = cfg.output_linear.clone(
            model_dim=output_dim, num_heads=cfg.num_heads, per_head_dim=self.per_head_dim
        )
        self._add_child("o_proj", output_linear)
        self._add_child("dropout", cfg.dropout)
        self._add_child("scale_query", cfg.query_scale.clone(per_head_dim=self.per_head_dim))
        self._add_child("scale_key", cfg.key_scale.clone(per_head_dim=self.per_head_dim))
        self._add_child("kv_cache", KVCache.default_config() if cfg.kv_cache is None else cfg.kv_cache)
        self._check_heads()
        self._check_window()
        self._logit_bias = self._complete_logit_bias()

    def _create_layer_parameter_specs(self) -> dict[str, ParameterSpec]:
        cfg: MultiheadAttention.Config = self.config
        if not cfg.logit_sink:
            return {}
        # Split like the query heads, which the output projection [model_dim, num_heads, per_head_dim] takes.
        output_spec = cfg.output_linear.param_partition_spec
        initializer = ConstantInitializer.default_config().set(value=0.0).instantiate()
        sink = ParameterSpec(
            shape=(cfg.num_heads,),
            mesh_axes=None if output_spec is None else PartitionSpec(output_spec[1]),
            initializer=initializer,
        )
        return {"sink": sink}

    def _check_config(self) -> None:
        cfg: MultiheadAttention.Config = self.config
        if cfg.causal and cfg.mask is not None:
            raise ValueError(
                error_message(
                    where=self.path(),
                    what=f"causal={cfg.causal} and a mask",
                    expected="only one of them",
                    advice="drop causal; join masks with attention_bias.and_masks",
                )
            )
        if cfg.atten_logit_cap is not None and not cfg.atten_logit_cap > 0:
            raise ValueError(
                error_message(
                    where=self.path(),
                    what=f"atten_logit_cap={cfg.atten_logit_cap}",
                    expected="a number above 0, or None for no cap",
                )
            )
        if self._hidden_dim % cfg.num_heads:
            raise ValueError(
                error_message(
                    where=self.path(),
                    what=f"hidden_dim={self._hidden_dim}",
                    expected=f"a multiple of num_heads={cfg.num_heads}",
                )
            )

    def _check_heads(self) -> None:
        num_heads, num_kv_heads = self.config.num_heads, self.num_kv_heads
        if num_kv_heads != num_heads:
            raise ValueError(
                error_message(
                    where=self.path(),
                    what=f"num_kv_heads={num_kv_heads}",
                    expected=f"num_heads={num_heads}",
                    advice="use GroupedQueryAttention for fewer key heads than query heads",
                )
            )

    def _check_window(self) -> None:
        """Raises unless the cache keeps whatever the mask lets queries see."""
        num_past = self.kv_cache.num_past_positions
        if num_past is None:
            return
        mask: Any = self.config.mask
        window = mask.sliding_window_size if _is_config_of(mask, SlidingWindowAttentionBias) else None
        if window is None or window > num_past:
            raise ValueError(
                error_message(
                    where=self.path(),
                    what=f"a {type(self.kv_cache).__name__} that keeps {num_past} past positions, and "
                    + ("no sliding window" if window is None else f"sliding_window_size={window}"),
                    expected="a mask SlidingWindowAttentionBias whose window the cache holds",
                    advice="use enable_sliding_window_attention",
                )
            )

    def _complete_logit_bias(self) -> Optional[InstantiableConfig]:
        """The config of the bias with the number of heads."""
        cfg: MultiheadAttention.Config = self.config
        bias: Any = cfg.logit_bias
        if bias is None or "num_heads" not in bias:
            return bias
        if bias.num_heads not in (REQUIRED, cfg.num_heads):
            raise ValueError(
                error_message(
                    where=self.path(),
                    what=f"logit_bias.num_heads={bias.num_heads}",
                    expected=f"num_heads={cfg.num_heads}",
                    advice="leave it out: it is filled in",
                )
            )
        return bias.clone(num_heads=cfg.num_heads)

    def _check_self_attention(
        self, *sources: Optional[Array], what: str, advice: Optional[str] = None
    ) -> None:
        if any(source is not None for source in sources):
            raise ValueError(
                error_message(
                    where=self.path(),
                    what=f"{what} together with key or value",
                    expected=f"{what} with self-attention only",
                    advice=advice,
                )
            )

    @property
    def _num_chunks(self) -> int:
        """The number of chunks of the order in which positions lie."""
        num_chunks = self.config.num_seq_chunks
        return 1 if num_chunks is None else num_chunks

    def _indices(self, query: Array, *sources: Optional[Array]) -> Array:
        """The index in its sequence of what lies at each place of `query` [batch, seq, ...]: [1, seq] int32."""
        num_chunks, seq_len = self._num_chunks, query.shape[1]
        if num_chunks == 1:
            return default_positions(query)
        self._check_self_attention(*sources, what=f"num_seq_chunks={num_chunks}")
        check_num_chunks(num_chunks, seq_len=seq_len, where=f"{self.path()}.num_seq_chunks")
        return jnp.asarray(head_tail_indices(seq_len, num_chunks=num_chunks))[None]

    @property
    def _hidden_dim(self) -> int:
        cfg: MultiheadAttention.Config = self.config
        return cfg.query_dim if cfg.hidden_dim is None else cfg.hidden_dim

    @property
    def per_head_dim(self) -> int:
        """Size of a head."""
        return self._hidden_dim // self.config.num_heads

    @property
    def knows_time(self) -> bool:
        """Whether outputs depend on the indices of queries and keys in their sequences."""
        cfg: MultiheadAttention.Config = self.config
        return bool(cfg.causal) or cfg.mask is not None or cfg.logit_bias is not None

    @property
    def num_kv_heads(self) -> int:
        """Number of key heads, and of value heads."""
        i_proj: BaseQKVLinear = self.i_proj
        return i_proj.num_kv_heads

    def forward(
        self,
        query: Float[Array, "batch target query_dim"],
        *,
        key: Optional[Float[Array, "batch source key_dim"]] = None,
        value: Optional[Float[Array, "batch source value_dim"]] = None,
        attention_logit_biases: Optional[LogitBiases] = None,
        segment_ids: Optional[Int[Array, "batch target"]] = None,
        query_positions: Optional[Int[Array, "#batch target"]] = None,
        return_aux: Optional[set[str]] = None,
    ) -> AttentionOutput:
        """Attends over whole sequences, whose positions lie in the order of `num_seq_chunks`: arrays that are given
        as well as those that are returned.

        Args:
            query: What queries are made from.
            key: What keys are made from. None: `query` (self-attention).
            value: What values are made from. None: `query`.
            attention_logit_biases: Added to the logits: a bias, or an array of rank 2 to 4 that broadcasts
                against `[batch, heads, target, source]`. None: nothing.
            segment_ids: Tokens attend only within their segment; self-attention only. None: one segment.
            query_positions: Positions in the text, for rotary embeddings; they do not influence the mask,
                which counts from the start of the sequence. None: the indices in the sequence.
            return_aux: Which of "probs" and "kv_state" to return. None: neither.

        Returns:
            The outputs.
        """
        indices = self._indices(query, key, value)
        if query_positions is None:
            query_positions = indices
        q_proj, k_proj, v_proj = self._project(query, key=key, value=value, query_positions=query_positions)
        key_positions = indices if key is None else default_positions(k_proj)
        kv_state = KVState(k_proj=k_proj, v_proj=v_proj, key_positions=key_positions)
        bias = as_attention_bias(attention_logit_biases) + self._position_bias(
            target_positions=indices, source_positions=key_positions, num_chunks=self._num_chunks
        )
        if segment_ids is not None:
            advice = "pass a SegmentIdAttentionBias as attention_logit_biases"
            self._check_self_attention(key, value, what="segment_ids", advice=advice)
            bias = bias + SegmentIdAttentionBias(segment_ids, segment_ids)
        return self._attend(q_proj, kv_state=kv_state, bias=bias, return_aux=return_aux)

    def init_states(self, *, batch_size: int, max_len: int) -> dict[str, Any]:
        """The state before the first token of an incremental decoding.

        Args:
            batch_size: Number of sequences.
            max_len: Number of tokens that a sequence may have.

        Returns:
            `time_step` [batch], the number of tokens seen; and the state of the cache.
        """
        shape = KVCacheShape(
            batch_size=batch_size,
            kv_len=max_len,
            num_kv_heads=self.num_kv_heads,
            per_head_dim=self.per_head_dim,
        )
        return {
            "time_step": jnp.zeros([batch_size], dtype=jnp.int32),
            "kv_cache": self.kv_cache.init_states(shape),
        }

    def extend_step(
        self,
        cached_states: dict[str, Any],
        query: Float[Array, "batch step query_dim"],
        *,
        live_step_len: Optional[Int[Array, "batch"]] = None,
        attention_logit_biases: Optional[LogitBiases] = None,
        return_aux: Optional[set[str]] = None,
    ) -> tuple[dict[str, Any], AttentionOutput]:
        """Continues each sequence at its own `time_step`: self-attention over what was seen and what is new.

        Args:
            cached_states: From `init_states` or an earlier call.
            query: The hidden states of the next `step` tokens.
            live_step_len: How many of them are real, for each sequence; outputs of the others mean nothing.
                None: all.
            attention_logit_biases: Added to the logits `[batch, heads, step, max_len]`; only with a cache
                that keeps all keys in order. None: nothing.
            return_aux: As in `forward`.

        Returns:
            The new state, and the outputs for the new tokens: NaN for a token that the cache has no room for.
            A mask of one's own may see ahead, such as a prefix that everybody sees. It then sees what is there
            already: steps equal the whole sequence where the prefix comes in one step.

        Raises:
            ValueError: If neither `causal` nor `mask` is configured, or a mask that sees the future: then
                past outputs would depend on the future. Also for biases with a cache that keeps a window.
        """
        self._check_extend_step(attention_logit_biases)
        time_step = cached_states["time_step"]
        step_len = query.shape[1]
        positions = time_step[:, None] + default_positions(query)
        q_proj, k_proj, v_proj = self._project(query, query_positions=positions)
        kv_cache_states, kv_state = self.kv_cache.extend_step(
            cached_states["kv_cache"],
            k_proj=k_proj,
            v_proj=v_proj,
            key_positions=positions,
            live_step_len=live_step_len,
        )
        bias = as_attention_bias(attention_logit_biases) + self._position_bias(
            target_positions=positions, source_positions=kv_state.key_positions
        )
        next_time_step = time_step + (step_len if live_step_len is None else live_step_len)
        if not self._is_surely_causal():
            # What is not decoded yet is empty slots of the cache: no query sees beyond the last live token.
            bias = bias + CausalAttentionBias((next_time_step - 1)[:, None], kv_state.key_positions)
        output = self._attend(q_proj, kv_state=kv_state, bias=bias, return_aux=return_aux)
        output = output._replace(
            data=_nan_where_not_kept(
                output.data, positions=positions, kv_state=kv_state, live_step_len=live_step_len
            )
        )
        return {"time_step": next_time_step, "kv_cache": kv_cache_states}, output

    def _check_extend_step(self, attention_logit_biases: Optional[LogitBiases]) -> None:
        cfg: MultiheadAttention.Config = self.config
        mask: Any = cfg.mask
        problem = None
        if not cfg.causal and mask is None:
            problem = "neither causal nor mask"
        elif _is_config_of(mask, LeftRightWindowAttentionBias) and mask.right_size > 0:
            problem = f"a window of right_size={mask.right_size}"
        if problem is not None:
            raise ValueError(
                error_message(
                    where=self.path(),
                    what=f"incremental decoding with {problem}",
                    expected="a layer whose past does not depend on its future, such as causal=True",
                )
            )
        if attention_logit_biases is not None and self.kv_cache.num_past_positions is not None:
            raise ValueError(
                error_message(
                    where=self.path(),
                    what=f"attention_logit_biases with a {type(self.kv_cache).__name__}",
                    expected="none: its keys are in no order that a caller could know",
                    advice="configure logit_bias, which is given their positions",
                )
            )

    def _is_surely_causal(self) -> bool:
        """Whether nobody sees the future, as far as the config tells. `_check_extend_step` refuses some others."""
        cfg: MultiheadAttention.Config = self.config
        classes = (CausalAttentionBias, SlidingWindowAttentionBias, LeftRightWindowAttentionBias)
        return bool(cfg.causal) or any(_is_config_of(cfg.mask, cls) for cls in classes)

    def _position_bias(
        self, *, target_positions: Array, source_positions: Array, num_chunks: Optional[int] = None
    ) -> BaseAttentionBias:
        """Whatever is configured as a function of these indices into the sequence.

        Args:
            target_positions: The index of each target.
            source_positions: The index of each source.
            num_chunks: The order of both, see `MaskFnAttentionBias`. None: nobody knows.
        """
        bias = self._mask_bias(target_positions=target_positions, source_positions=source_positions)
        # A mask of one's own may look at other positions than it was given.
        if (
            isinstance(bias, MaskFnAttentionBias)
            and bias.target_positions is target_positions
            and bias.source_positions is source_positions
        ):
            bias = dataclasses.replace(bias, num_chunks=num_chunks)
        if self._logit_bias is None:
            return bias
        return bias + self._logit_bias.instantiate(
            target_positions=target_positions, source_positions=source_positions
        )

    def _mask_bias(self, *, target_positions: Array, source_positions: Array) -> BaseAttentionBias:
        """The configured mask between these indices into the sequence."""
        cfg: MultiheadAttention.Config = self.config
        if cfg.mask is not None:
            mask: Any = cfg.mask.instantiate(
                target_positions=target_positions, source_positions=source_positions
            )
            if not isinstance(mask, BoolAttentionBias):
                raise ValueError(
                    error_message(
                        where=self.path(),
                        what=f"mask makes a {type(mask).__name__}",
                        expected="a BoolAttentionBias, such as SlidingWindowAttentionBias",
                        advice="set what is added to the logits as logit_bias",
                    )
                )
            return mask
        if cfg.causal:
            return CausalAttentionBias(target_positions, source_positions)
        return ZeroAttentionBias()

    def _project(
        self,
        query: Array,
        *,
        key: Optional[Array] = None,
        value: Optional[Array] = None,
        query_positions: Optional[Array] = None,
    ) -> QKVOutput:
        """From hidden states to queries, keys and values, scaled.

        They are named for rematerialisation before scaling: that is cheap to do again.
        """
        proj = self.i_proj(query, key=key, value=value, query_positions=query_positions)
        return QKVOutput(
            query=self.scale_query(self._remat_name(proj.query, "q_proj")),
            key=self.scale_key(self._remat_name(proj.key, "k_proj")),
            value=self._remat_name(proj.value, "v_proj"),
        )

    def _attend(
        self,
        query: Array,
        *,
        kv_state: KVState,
        bias: BaseAttentionBias,
        return_aux: Optional[set[str]],
    ) -> AttentionOutput:
        """From queries, keys and values to outputs."""
        return_aux = return_aux or set()
        context, probs = self._compute_attention(
            query=query,
            key=kv_state.k_proj,
            value=kv_state.v_proj,
            bias=bias,
            need_probs="probs" in return_aux,
        )
        output = self.o_proj(self._remat_name(context, "context"))
        return AttentionOutput(
            data=self._remat_name(output, "o_proj"),
            probs=probs if "probs" in return_aux else None,
            kv_state=kv_state if "kv_state" in return_aux else None,
        )

    def _compute_attention(
        self, *, query: Array, key: Array, value: Array, bias: BaseAttentionBias, need_probs: bool
    ) -> tuple[Array, Optional[Array]]:
        """Attends: the part that other backends replace.

        Args:
            query: `[batch, target, num_heads, per_head_dim]`, scaled.
            key: `[batch, source, num_kv_heads, per_head_dim]`, scaled.
            value: `[batch, source, num_kv_heads, per_head_dim]`.
            bias: Everything that is added to the logits, masks included.
            need_probs: Whether the probabilities are asked for.

        Returns:
            The context `[batch, target, num_heads, per_head_dim]`, and the probabilities; they may be None
            where nobody needs them.
        """
        probs = self._compute_probs(attention_logits(query, key), bias)
        return attention_context(self.dropout(probs), value), probs

    def _compute_probs(self, logits: Array, bias: BaseAttentionBias) -> Array:
        """From logits to probabilities, both `[batch, num_heads, target, source]`."""
        cfg: MultiheadAttention.Config = self.config
        sink = self.parameters["sink"] if cfg.logit_sink else None
        return attention_probs(logits, bias, logit_cap=cfg.atten_logit_cap, sink=sink)


def _is_config_of(cfg: Optional[InstantiableConfig], cls: type) -> bool:
    return isinstance(cfg, ClassConfigBase) and cfg.klass is cls


def _nan_where_not_kept(
    data: Array, *, positions: Array, kv_state: KVState, live_step_len: Optional[Array]
) -> Array:
    """Replaces the outputs `[batch, step, dim]` of live tokens that were too late for the cache.

    Such a token does not see itself. Its output would look like any other, and be wrong.
    """
    kept = jnp.where(kv_state.key_positions == UNWRITTEN_POSITION, -1, kv_state.key_positions)
    is_lost = positions > jnp.max(kept, axis=1, keepdims=True)  # [batch, step]
    if live_step_len is not None:
        is_lost &= default_positions(data) < live_step_len[:, None]
    return jnp.where(is_lost[..., None], jnp.nan, data)
