"""What counting alone achieves: unigram and bigram models, measured as a language model is."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int64

from axlearn.common.config import error_message

# Pairs are counted in portions of about this many tokens, which bounds memory.
_PORTION_TOKENS = 4_000_000


class NgramBaselines(NamedTuple):
    """Losses of the two models on the held-out targets; with one added to every count, none is infinite."""

    unigram_nats_per_byte: float
    bigram_nats_per_byte: float
    unigram_nats_per_token: float
    bigram_nats_per_token: float
    # What they were measured on.
    num_targets: int
    num_bytes: int


class _PairCounts:
    """How often each pair (input, target) occurs; only pairs that do are stored."""

    def __init__(self, vocab_size: int):
        self._vocab_size = vocab_size
        self._keys = np.zeros([0], dtype=np.int64)
        self._counts = np.zeros([0], dtype=np.int64)

    def add(self, inputs: Int[np.ndarray, " n"], targets: Int[np.ndarray, " n"]) -> None:
        keys, counts = np.unique(self._key(inputs, targets), return_counts=True)
        all_keys, where = np.unique(np.concatenate([self._keys, keys]), return_inverse=True)
        all_counts = np.zeros_like(all_keys)
        np.add.at(all_counts, where, np.concatenate([self._counts, counts]))
        self._keys, self._counts = all_keys, all_counts

    def of(self, inputs: Int[np.ndarray, " n"], targets: Int[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        wanted = self._key(inputs, targets)
        places = np.minimum(np.searchsorted(self._keys, wanted), len(self._keys) - 1)
        return np.where(self._keys[places] == wanted, self._counts[places], 0)

    def sums(self, which: int) -> Int64[np.ndarray, " vocab_size"]:
        """Returns how often each id occurs as input (0) or as target (1)."""
        ids = np.divmod(self._keys, self._vocab_size)[which]
        sums = np.zeros([self._vocab_size], dtype=np.int64)
        np.add.at(sums, ids, self._counts)
        return sums

    def _key(self, inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        keys: np.ndarray = inputs.astype(np.int64) * self._vocab_size + targets
        return keys


def unigram_bigram_baselines(
    train_documents: Iterable[Int[np.ndarray, " num_tokens"]],
    heldout_batches: Iterable[Mapping[str, np.ndarray]],
    vocab_size: int,
) -> NgramBaselines:
    """Counts tokens and pairs of tokens in the training documents and measures them on held-out batches.

    With c the counts in the training data, N its number of targets and V the vocabulary size:
    p(b) = (c(b) + 1) / (N + V), and p(b | a) = (c(a, b) + 1) / (c(a) + V).

    Args:
        train_documents: Each document's ids from begin to end of document, such as
            `PackedTextSource.document_token_ids()`; every pair of neighbours is an input and its target.
        heldout_batches: The batches that the language model is evaluated on: `input_ids`, `target_labels`
            [batch, seq_len] (negative: not a target) and `target_num_bytes` [batch].
        vocab_size: Number of token ids.

    Returns:
        The losses, over exactly the live targets of `heldout_batches`.

    Raises:
        ValueError: If there are no training pairs or no held-out targets, or an id is outside the vocabulary.
    """
    counts = _count_pairs(train_documents, vocab_size)
    input_counts, target_counts = counts.sums(0), counts.sums(1)
    num_train = int(target_counts.sum())
    if not num_train:
        raise ValueError(
            error_message(
                where="train_documents",
                what="there is nothing to count",
                expected="at least one document",
            )
        )
    unigram_nats = bigram_nats = 0.0
    num_targets = num_bytes = 0
    for batch in heldout_batches:
        live = batch["target_labels"] >= 0
        inputs, targets = batch["input_ids"][live], batch["target_labels"][live]
        _check_ids(inputs, vocab_size)
        _check_ids(targets, vocab_size)
        unigram_nats -= np.log((target_counts[targets] + 1) / (num_train + vocab_size)).sum()
        pairs = counts.of(inputs, targets)
        bigram_nats -= np.log((pairs + 1) / (input_counts[inputs] + vocab_size)).sum()
        num_targets += len(targets)
        num_bytes += int(batch["target_num_bytes"].sum())
    if not num_bytes:
        raise ValueError(
            error_message(
                where="heldout_batches",
                what="there is no text to measure on",
                expected="at least one target that stands for text",
            )
        )
    return NgramBaselines(
        unigram_nats_per_byte=float(unigram_nats / num_bytes),
        bigram_nats_per_byte=float(bigram_nats / num_bytes),
        unigram_nats_per_token=float(unigram_nats / num_targets),
        bigram_nats_per_token=float(bigram_nats / num_targets),
        num_targets=num_targets,
        num_bytes=num_bytes,
    )


def _count_pairs(documents: Iterable[np.ndarray], vocab_size: int) -> _PairCounts:
    counts = _PairCounts(vocab_size)
    inputs: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    num_waiting = 0
    for ids in documents:
        _check_ids(ids, vocab_size)
        inputs.append(ids[:-1])
        targets.append(ids[1:])
        num_waiting += len(ids)
        if num_waiting >= _PORTION_TOKENS:
            counts.add(np.concatenate(inputs), np.concatenate(targets))
            inputs, targets, num_waiting = [], [], 0
    if inputs:
        counts.add(np.concatenate(inputs), np.concatenate(targets))
    return counts


def _check_ids(ids: np.ndarray, vocab_size: int) -> None:
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise ValueError(
            error_message(
                where="vocab_size",
                what=f"token ids from {ids.min()} to {ids.max()} do not fit a vocabulary of {vocab_size}",
                expected=f"ids from 0 to {vocab_size - 1}",
            )
        )
