"""The sampling loop over a toy model whose next logits depend on all ids so far, against a loop in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axlearn.common.decoding import (
    CompositeDecodingCondition,
    StopOnMaxLength,
    StopOnSubsequence,
    sample_decode,
)
from axlearn.common.logit_modifiers import chain, scale_by, top_k_logits

VOCAB_SIZE = 7
PAD, EOS = 0, 1
MAX_LEN = 12
GREEDY = scale_by(0)
# The logits after some ids: a row chosen by the sum of (position + 1) * id.
TABLE = np.random.default_rng(0).normal(size=(101, VOCAB_SIZE)).astype(np.float32)

PROMPTS = np.asarray([[3, 4, 5, 6], [2, 0, 0, 0], [6, 6, 0, 0]], dtype=np.int32)
PROMPT_LENS = np.asarray([4, 1, 2], dtype=np.int32)


def _logits_after(ids: list[int]) -> np.ndarray:
    return TABLE[sum((i + 1) * x for i, x in enumerate(ids)) % len(TABLE)]


def _toy_cache(num_rows: int):
    return {"count": jnp.zeros([num_rows], jnp.int32), "sum": jnp.zeros([num_rows], jnp.int32)}


def _toy_extend(cache, token_ids, *, live_step_len):
    step = jnp.arange(token_ids.shape[1])[None, :]
    weights = jnp.where(step < live_step_len[:, None], cache["count"][:, None] + step + 1, 0)
    cache = {
        "count": cache["count"] + live_step_len,
        "sum": cache["sum"] + jnp.sum(weights * token_ids, axis=1),
    }
    return cache, jnp.asarray(TABLE)[cache["sum"] % len(TABLE)]


@functools.partial(jax.jit, static_argnames=("max_len", "num_decodes", "logits_modifier", "stop"))
def _sample(
    prompt_ids, prompt_lens, seed=0, *, max_len=MAX_LEN, num_decodes=1, logits_modifier=GREEDY, stop=None
):
    return sample_decode(
        prompt_ids=prompt_ids,
        prompt_lens=prompt_lens,
        cache=_toy_cache(prompt_ids.shape[0] * num_decodes),
        extend_fn=_toy_extend,
        prng_key=jax.random.PRNGKey(seed),
        max_len=max_len,
        num_decodes=num_decodes,
        logits_modifier=logits_modifier,
        stop_decoding_condition=stop,
        pad_token_id=PAD,
    )


def _greedy_reference(prompt: list[int], *, eos: int | None = None) -> list[int]:
    ids = list(prompt)
    while len(ids) < MAX_LEN:
        ids.append(int(_logits_after(ids).argmax()))
        if ids[-1] == eos:
            break
    return ids


def _rows(outputs) -> list[list[int]]:
    """The ids of each sequence without its padding, prompts outermost."""
    sequences = np.asarray(outputs.sequences).reshape(-1, outputs.sequences.shape[-1])
    return [row[:n].tolist() for row, n in zip(sequences, np.asarray(outputs.lengths).ravel(), strict=True)]


def test_greedy_continuations_of_ragged_prompts_equal_the_loop_in_numpy():
    outputs = _sample(PROMPTS, PROMPT_LENS)
    expected = [_greedy_reference(p[:n].tolist()) for p, n in zip(PROMPTS, PROMPT_LENS, strict=True)]
    assert _rows(outputs) == expected


_STOP_AT_EOS = StopOnSubsequence([[EOS]])


def test_a_row_ends_with_its_end_id_and_padding_follows():
    outputs = _sample(PROMPTS, PROMPT_LENS, stop=_STOP_AT_EOS)
    expected = [_greedy_reference(p[:n].tolist(), eos=EOS) for p, n in zip(PROMPTS, PROMPT_LENS, strict=True)]
    assert any(row[-1] == EOS and len(row) < MAX_LEN for row in expected), "the toy never stops: a void test"
    assert _rows(outputs) == expected
    behind = np.arange(MAX_LEN) >= np.asarray(outputs.lengths)[..., None]
    assert not np.asarray(outputs.sequences)[behind].any()
    assert not np.asarray(outputs.token_log_probs)[behind].any()


def test_what_stands_behind_a_prompt_does_not_matter():
    junk = np.where(np.arange(4)[None, :] < PROMPT_LENS[:, None], PROMPTS, 5)
    assert _rows(_sample(junk, PROMPT_LENS)) == _rows(_sample(PROMPTS, PROMPT_LENS))


def test_a_row_does_not_depend_on_its_neighbours():
    both = _rows(_sample(PROMPTS, PROMPT_LENS, 3, logits_modifier=None))
    others = PROMPTS[[0, 2, 2]]
    assert _rows(_sample(others, PROMPT_LENS[[0, 2, 2]], 3, logits_modifier=None))[0] == both[0]


def test_samples_depend_on_the_key_and_differ_between_decodes():
    outputs = _sample(PROMPTS, PROMPT_LENS, 0, num_decodes=4, logits_modifier=None)
    assert outputs.sequences.shape == (3, 4, MAX_LEN)
    rows = _rows(outputs)
    assert rows == _rows(_sample(PROMPTS, PROMPT_LENS, 0, num_decodes=4, logits_modifier=None))
    assert rows != _rows(_sample(PROMPTS, PROMPT_LENS, 1, num_decodes=4, logits_modifier=None))
    assert len({tuple(row) for row in rows[:4]}) > 1
    for prompt, n, decodes in zip(PROMPTS, PROMPT_LENS, np.asarray(outputs.sequences), strict=True):
        np.testing.assert_array_equal(decodes[:, :n], np.broadcast_to(prompt[:n], (4, n)))


def test_frequencies_of_the_first_sample_are_those_of_the_modified_distribution():
    modifier = chain(scale_by(0.7), top_k_logits(4))
    outputs = _sample(
        PROMPTS[1:2, :1], PROMPT_LENS[1:2], max_len=2, num_decodes=4000, logits_modifier=modifier
    )
    counts = np.bincount(np.asarray(outputs.sequences)[0, :, 1], minlength=VOCAB_SIZE) / 4000
    expected = np.asarray(jax.nn.softmax(modifier(jnp.asarray(_logits_after([2])))))
    # Four standard deviations of a frequency are at most 4 * sqrt(0.25 / 4000) = 0.032.
    np.testing.assert_allclose(counts, expected, atol=0.032)
    assert counts[expected == 0].sum() == 0
    log_probs = np.asarray(outputs.token_log_probs)[0, :, 1]
    np.testing.assert_allclose(log_probs, np.log(expected[np.asarray(outputs.sequences)[0, :, 1]]), rtol=1e-5)


def test_a_prompt_that_fills_the_row_comes_back_as_it_is():
    outputs = _sample(PROMPTS, PROMPT_LENS, max_len=4)
    assert _rows(outputs)[0] == PROMPTS[0].tolist()
    assert np.asarray(outputs.lengths).ravel().tolist() == [4, 4, 4]


def test_prompts_longer_than_the_row_are_refused():
    with pytest.raises(ValueError, match=r"room for 4 ids, longer than max_len=3"):
        _sample(PROMPTS, PROMPT_LENS, max_len=3)


def test_a_stopping_sequence_counts_only_inside_the_continuation():
    sequences = jnp.asarray([[5, 2, 3, 0], [5, 2, 3, 0], [4, 4, 2, 3]])
    stop = StopOnSubsequence([[2, 3], [9]])
    done = stop(sequences=sequences, lengths=jnp.asarray([3, 3, 4]), prompt_lens=jnp.asarray([1, 2, 1]))
    assert done.tolist() == [True, False, True]


def test_any_of_several_conditions_stops_a_row():
    stop = CompositeDecodingCondition([StopOnSubsequence([[9]]), StopOnMaxLength(3)])
    done = stop(
        sequences=jnp.asarray([[5, 9, 0, 0], [5, 5, 5, 0], [5, 5, 0, 0]]),
        lengths=jnp.asarray([2, 3, 2]),
        prompt_lens=jnp.asarray([1, 1, 1]),
    )
    assert done.tolist() == [True, True, False]


def test_an_empty_stopping_sequence_is_refused():
    with pytest.raises(ValueError, match="stopping sequence is empty"):
        StopOnSubsequence([[1], []])
