"""Sampling loops over any model that extends cached states one token at a time.

The loop knows no layer: it is given a cache, a function that extends it by token ids and answers with the
logits of the next token, and a function that shapes those logits. It runs inside jit as one `lax.while_loop`.

Rows of a batch are independent. Each continues its own prompt directly, however much longer its neighbours'
prompts are, and draws from its own stream of random numbers.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from axlearn.common.config import error_message
from axlearn.common.logit_modifiers import LogitsToLogitsFn
from axlearn.common.utils import NestedTensor, Tensor


class ExtendFn(Protocol):
    """Extends every row of a cache by its first `live_step_len` ids."""

    def __call__(
        self, cache: NestedTensor, token_ids: Tensor, *, live_step_len: Tensor
    ) -> tuple[NestedTensor, Tensor]:
        """Returns the new cache and the logits after each row's last live id.

        Args:
            cache: What the previous call returned.
            token_ids: [batch, t] int32.
            live_step_len: [batch] int32: how many of the t ids are real. A row of 0 stays as it is, and its
                logits mean nothing.

        Returns:
            The cache, and logits [batch, vocab_size].
        """


class StopDecodingCondition(Protocol):
    """Decides which rows are finished."""

    def __call__(self, *, sequences: Tensor, lengths: Tensor, prompt_lens: Tensor) -> Tensor:
        """Returns [batch] bool: the row needs no further token.

        Args:
            sequences: [batch, max_len] int32: prompt and continuation of each row, padded at the end.
            lengths: [batch] int32: ids in each row so far, the prompt included.
            prompt_lens: [batch] int32: ids in each prompt.
        """


class StopOnSubsequence:
    """Stops a row whose continuation ends in one of the given sequences of ids, which stays in the output."""

    def __init__(self, stopping_seqs: Sequence[Sequence[int]]):
        """Takes the sequences.

        Raises:
            ValueError: One of them is empty: it would end every continuation before it begins.
        """
        if not all(len(seq) for seq in stopping_seqs):
            raise ValueError(
                error_message(
                    where="stopping_seqs", what="a stopping sequence is empty", expected="ids in each"
                )
            )
        self._stopping_seqs = tuple(tuple(seq) for seq in stopping_seqs)

    def __call__(self, *, sequences: Tensor, lengths: Tensor, prompt_lens: Tensor) -> Tensor:
        stop = jnp.zeros(lengths.shape, dtype=bool)
        for seq in self._stopping_seqs:
            start = lengths - len(seq)
            positions = jnp.maximum(start, 0)[:, None] + jnp.arange(len(seq), dtype=lengths.dtype)[None, :]
            tail = jnp.take_along_axis(sequences, positions, axis=1)
            ends_in_seq = jnp.all(tail == jnp.asarray(seq, dtype=sequences.dtype)[None, :], axis=1)
            stop |= ends_in_seq & (start >= prompt_lens)
        return stop


class StopOnMaxLength:
    """Stops a row that has so many ids, the prompt included."""

    def __init__(self, max_len: int | Tensor):
        """Takes the number of ids; as an array it is not part of the compiled program."""
        self._max_len = max_len

    def __call__(self, *, sequences: Tensor, lengths: Tensor, prompt_lens: Tensor) -> Tensor:
        del sequences, prompt_lens
        return lengths >= self._max_len


class CompositeDecodingCondition:
    """Stops a row as soon as one of several conditions does."""

    def __init__(self, conditions: Sequence[StopDecodingCondition]):
        self._conditions = tuple(conditions)

    def __call__(self, *, sequences: Tensor, lengths: Tensor, prompt_lens: Tensor) -> Tensor:
        stop = jnp.zeros(lengths.shape, dtype=bool)
        for condition in self._conditions:
            stop |= condition(sequences=sequences, lengths=lengths, prompt_lens=prompt_lens)
        return stop


class SampleOutputs(NamedTuple):
    """Prompts with sampled continuations.

    Attributes:
        sequences: [batch, num_decodes, max_len] int32: prompt, continuation, then padding.
        lengths: [batch, num_decodes] int32: ids in each sequence before the padding.
        token_log_probs: [batch, num_decodes, max_len] float32: log-probability of each sampled id in the
            distribution it was drawn from; 0 at the prompt and the padding.
    """

    sequences: Tensor
    lengths: Tensor
    token_log_probs: Tensor


class DecodingState(NamedTuple):
    """What the loop carries from token to token; rows are batch times num_decodes.

    Attributes:
        num_new: Scalar int32: ids sampled so far by rows that are not finished.
        cache: Cached states of all ids but `last_ids`.
        last_ids: [rows] int32: the ids sampled last.
        sequences: [rows, max_len] int32.
        lengths: [rows] int32.
        token_log_probs: [rows, max_len] float32.
        done: [rows] bool.
    """

    num_new: Tensor
    cache: NestedTensor
    last_ids: Tensor
    sequences: Tensor
    lengths: Tensor
    token_log_probs: Tensor
    done: Tensor


def sample_decode(
    *,
    prompt_ids: Tensor,
    prompt_lens: Tensor,
    cache: NestedTensor,
    extend_fn: ExtendFn,
    prng_key: Tensor,
    max_len: int,
    num_decodes: int = 1,
    logits_modifier: LogitsToLogitsFn | None = None,
    stop_decoding_condition: StopDecodingCondition | None = None,
    pad_token_id: int = 0,
) -> SampleOutputs:
    """Samples continuations of a batch of prompts.

    Args:
        prompt_ids: [batch, prompt_len] int32; what stands after a row's prompt does not matter.
        prompt_lens: [batch] int32 in [1, prompt_len].
        cache: Empty cached states of batch * num_decodes rows that hold at least `max_len` ids each.
        extend_fn: Extends the cache and gives the next logits.
        prng_key: Row i draws from a stream that depends on this key and on i only.
        max_len: Ids in a finished row at most, the prompt included; at least prompt_len.
        num_decodes: Continuations of each prompt.
        logits_modifier: Shapes the distribution, for instance `chain(scale_by(0.8), top_p_logits(0.95))`;
            None: the model's own.
        stop_decoding_condition: Finishes a row before `max_len`; None: nothing does.
        pad_token_id: Fills sequences after their end.

    Returns:
        The sequences. A prompt of `max_len` ids comes back as it is.

    Raises:
        ValueError: The prompts are longer than `max_len`.
    """
    prompt_len = prompt_ids.shape[1]
    if prompt_len > max_len:
        raise ValueError(
            error_message(
                where="prompt_ids",
                what=f"the prompts have room for {prompt_len} ids, longer than max_len={max_len}",
                expected=f"at most {max_len} ids",
                advice="Shorten the prompt or raise max_len.",
            )
        )
    stop_fn = CompositeDecodingCondition(
        [StopOnMaxLength(max_len), *([stop_decoding_condition] if stop_decoding_condition else [])]
    )
    prompt_ids = jnp.repeat(prompt_ids.astype(jnp.int32), num_decodes, axis=0)
    prompt_lens = jnp.repeat(prompt_lens.astype(jnp.int32), num_decodes, axis=0)
    num_rows = prompt_ids.shape[0]
    row_keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(prng_key, jnp.arange(num_rows))

    def append_sample(state: DecodingState, logits: Tensor) -> DecodingState:
        """Draws one id for each row that is not finished and writes it behind the row's last one."""
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(row_keys, state.num_new)
        ids, log_probs = _draw(keys, logits, logits_modifier=logits_modifier)
        # Out of range, hence dropped, for finished rows.
        column = jnp.where(state.done, max_len, state.lengths)
        rows = jnp.arange(num_rows)
        sequences = state.sequences.at[rows, column].set(ids, mode="drop")
        lengths = jnp.where(state.done, state.lengths, state.lengths + 1)
        return DecodingState(
            num_new=state.num_new + 1,
            cache=state.cache,
            last_ids=ids,
            sequences=sequences,
            lengths=lengths,
            token_log_probs=state.token_log_probs.at[rows, column].set(log_probs, mode="drop"),
            done=state.done | stop_fn(sequences=sequences, lengths=lengths, prompt_lens=prompt_lens),
        )

    def extend_and_append(state: DecodingState) -> DecodingState:
        cache, logits = extend_fn(
            state.cache, state.last_ids[:, None], live_step_len=(~state.done).astype(jnp.int32)
        )
        return append_sample(state._replace(cache=cache), logits)

    is_prompt = jnp.arange(max_len)[None, :] < prompt_lens[:, None]
    padded_prompts = jnp.pad(prompt_ids, ((0, 0), (0, max_len - prompt_len)))
    prefilled_cache, first_logits = extend_fn(cache, prompt_ids, live_step_len=prompt_lens)
    initial = DecodingState(
        num_new=jnp.zeros([], dtype=jnp.int32),
        cache=prefilled_cache,
        last_ids=jnp.zeros([num_rows], dtype=jnp.int32),
        sequences=jnp.where(is_prompt, padded_prompts, pad_token_id),
        lengths=prompt_lens,
        token_log_probs=jnp.zeros([num_rows, max_len], dtype=jnp.float32),
        done=prompt_lens >= max_len,
    )
    final = jax.lax.while_loop(
        lambda state: ~jnp.all(state.done), extend_and_append, append_sample(initial, first_logits)
    )

    def per_prompt(x: Tensor) -> Tensor:
        return x.reshape((-1, num_decodes, *x.shape[1:]))

    return SampleOutputs(
        sequences=per_prompt(final.sequences),
        lengths=per_prompt(final.lengths),
        token_log_probs=per_prompt(final.token_log_probs),
    )


def _draw(keys: Tensor, logits: Tensor, *, logits_modifier: LogitsToLogitsFn | None) -> tuple[Tensor, Tensor]:
    """Draws an id per row; returns ids [rows] int32 and their log-probabilities [rows] float32."""
    logits = logits.astype(jnp.float32)
    if logits_modifier is not None:
        logits = logits_modifier(logits)
    ids = jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    return ids, jnp.take_along_axis(log_probs, ids[:, None], axis=-1)[:, 0]
