"""The counting models against a few lines of Python."""

import collections
import itertools
import math

import numpy as np
import pytest

from axlearn.common import ngram_baseline
from axlearn.common.ngram_baseline import unigram_bigram_baselines


def batch(rows, labels, num_bytes):
    return {
        "input_ids": np.asarray(rows, dtype=np.int32),
        "target_labels": np.asarray(labels, dtype=np.int32),
        "target_num_bytes": np.asarray(num_bytes, dtype=np.int32),
    }


@pytest.mark.parametrize("portion", [1, 7, 10**6])
def test_baselines_equal_the_textbook_formulas(monkeypatch, portion):
    monkeypatch.setattr(ngram_baseline, "_PORTION_TOKENS", portion)
    vocab_size = 6
    documents = [np.asarray(d) for d in ([2, 3, 4, 3, 4, 1], [2, 5, 3, 4, 1], [2, 1])]
    heldout = [
        batch([[2, 3, 4], [2, 5, 0]], [[3, 4, -1], [5, 0, -1]], [5, 4]),
        batch([[0, 0, 0]], [[-1, -1, -1]], [0]),
    ]
    pairs = collections.Counter((int(a), int(b)) for d in documents for a, b in itertools.pairwise(d))
    firsts, seconds = collections.Counter(), collections.Counter()
    for (a, b), n in pairs.items():
        firsts[a] += n
        seconds[b] += n
    total = sum(pairs.values())
    unigram = bigram = 0.0
    for a, b in [(2, 3), (3, 4), (2, 5), (5, 0)]:
        unigram -= math.log((seconds[b] + 1) / (total + vocab_size))
        bigram -= math.log((pairs[a, b] + 1) / (firsts[a] + vocab_size))
    result = unigram_bigram_baselines(iter(documents), iter(heldout), vocab_size)
    np.testing.assert_allclose(result, (unigram / 9, bigram / 9, unigram / 4, bigram / 4, 4, 9), rtol=1e-12)


def test_the_models_are_distributions():
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 5, size=30)]
    # Every target once after the same input: the probabilities have to add up to one.
    nats = [
        unigram_bigram_baselines(documents, [batch([[3]], [[target]], [1])], 5)[2:4] for target in range(5)
    ]
    np.testing.assert_allclose(np.exp(-np.asarray(nats)).sum(axis=0), [1, 1], rtol=1e-12)


def test_ids_outside_the_vocabulary_and_empty_data_are_refused():
    document, heldout = np.asarray([2, 3, 1]), batch([[2]], [[3]], [1])
    with pytest.raises(ValueError, match="ids from 1 to 3 do not fit a vocabulary of 3"):
        unigram_bigram_baselines([document], [heldout], 3)
    with pytest.raises(ValueError, match="train_documents"):
        unigram_bigram_baselines([], [heldout], 5)
    with pytest.raises(ValueError, match="heldout_batches"):
        unigram_bigram_baselines([document], [], 5)
