"""Language-model examples from documents of text: tokenised once, packed into rows, in a seeded order."""

import functools
import os
from collections.abc import Iterator
from typing import Any, NamedTuple, Optional, Union

import numpy as np
from jaxtyping import Int32

from axlearn.common.config import (
    REQUIRED,
    Configurable,
    InstantiableConfig,
    Required,
    config_class,
    error_message,
)
from axlearn.common.input_base import lm_element_spec
from axlearn.common.lm_packing import PackedDocuments, PackedEpoch
from axlearn.common.text_corpus import Split, TextCorpus, open_token_cache
from axlearn.common.utils import TensorSpec
from axlearn.common.vocabulary import Vocabulary

# Raise when the same fingerprint would give other rows or another order.
_ORDER_VERSION = 1


class _Data(NamedTuple):
    vocab: Vocabulary
    corpus_fingerprint: str
    heldout_percent: float
    # Of all documents of the corpus.
    tokens: np.ndarray
    # Of the documents of this source's split.
    starts: np.ndarray
    lengths: np.ndarray
    documents: PackedDocuments


class PackedTextSource(Configurable):
    """Rows of packed documents of one split of a corpus, as an `input_grain.ExampleSource`.

    Nothing is read before the first example, or the fingerprint, is asked for. What an epoch covers and how
    rows are made is the matter of `lm_packing`.
    """

    @config_class
    class Config(Configurable.Config):
        # Builds the `text_corpus.TextCorpus`.
        corpus: Required[InstantiableConfig[Any]] = REQUIRED
        # Builds the `vocabulary.Vocabulary`. Where it has a field `corpus` that is not set, as
        # `trained_sentencepiece` does, it gets the corpus above.
        vocab_cfg: Required[InstantiableConfig[Any]] = REQUIRED
        # Number of tokens of a row.
        max_sequence_length: Required[int] = REQUIRED
        # "train" or "heldout": which documents, by the corpus' own split.
        split: str = "train"
        # Chooses the order, together with the epoch; not negative.
        seed: int = 0
        # Rows of an epoch, the first in its order; None: all.
        max_examples: Optional[int] = None

    def __init__(self, cfg: Config):
        super().__init__(cfg)
        limit = cfg.max_examples
        problems = [
            error_message(where=field, what=f"{getattr(cfg, field)!r} cannot be used", expected=expected)
            for field, is_legal, expected in (
                ("max_sequence_length", cfg.max_sequence_length > 0, "an integer of at least 1"),
                ("split", cfg.split in [split.value for split in Split], "'train' or 'heldout'"),
                ("seed", cfg.seed >= 0, "an integer of at least 0"),
                ("max_examples", limit is None or limit > 0, "None or an integer of at least 1"),
            )
            if not is_legal
        ]
        if problems:
            raise ValueError("\n".join(problems))
        # Epochs follow each other, and the threads of one batch may stand in two of them.
        self._epoch = functools.lru_cache(maxsize=2)(self._make_epoch)

    @functools.cached_property
    def _data(self) -> _Data:
        cfg = self.config
        corpus: TextCorpus = cfg.corpus.instantiate()
        in_split = [
            i
            for i, document in enumerate(corpus.documents)
            if corpus.split_of(document.name) is Split(cfg.split)
        ]
        if not in_split:
            raise ValueError(
                error_message(
                    where="split",
                    what=f"no document of {corpus.name} is in the split {cfg.split!r}",
                    expected=f"at least one of {len(corpus.documents)}",
                    advice=f"heldout_percent is {corpus.heldout_percent}: change it, or add documents.",
                )
            )
        vocab_cfg = cfg.vocab_cfg
        if getattr(vocab_cfg, "corpus", None) is REQUIRED:
            vocab_cfg = vocab_cfg.clone(corpus=cfg.corpus)
        vocab: Vocabulary = vocab_cfg.instantiate()
        cache = open_token_cache(corpus, vocab=vocab)
        starts, ends = cache.offsets[:-1][in_split], cache.offsets[1:][in_split]
        documents = PackedDocuments(
            tokens=cache.tokens,
            starts=starts,
            lengths=ends - starts,
            piece_num_bytes=vocab.piece_num_bytes(),
            max_len=cfg.max_sequence_length,
            bos_id=vocab.bos_id,
            pad_id=vocab.pad_id,
            prefix_num_bytes=cache.prefix_num_bytes[in_split] if vocab.prefix_num_bytes else None,
        )
        return _Data(
            vocab=vocab,
            corpus_fingerprint=corpus.fingerprint(),
            heldout_percent=corpus.heldout_percent,
            tokens=cache.tokens,
            starts=starts,
            lengths=ends - starts,
            documents=documents,
        )

    def _make_epoch(self, epoch: int) -> PackedEpoch:
        return self._data.documents.epoch(seed=self.config.seed, epoch=epoch)

    @property
    def vocab(self) -> Vocabulary:
        """The tokenizer of the text."""
        return self._data.vocab

    def num_examples(self) -> int:
        """Returns the number of rows of an epoch."""
        num_rows = self._data.documents.num_rows
        max_examples = self.config.max_examples
        return num_rows if max_examples is None else min(num_rows, max_examples)

    def example(self, *, epoch: int, index: int) -> dict[str, np.ndarray]:
        """Returns a row of an epoch; see `lm_packing.PackedRow` for the keys.

        Args:
            epoch: Counted from 0.
            index: Place in the epoch's order, 0 <= index < num_examples().
        """
        return self._epoch(epoch)[index]._asdict()

    def dead_example(self) -> dict[str, np.ndarray]:
        """Returns a row of padding, without any target."""
        return self._data.documents.row([])._asdict()

    def element_spec(self) -> dict[str, TensorSpec]:
        """Returns shape and dtype of each array of a row, without reading data."""
        return lm_element_spec((self.config.max_sequence_length,))

    def fingerprint(self) -> dict[str, Union[str, int, float, None]]:
        """Returns what the rows and their order are a function of."""
        cfg, data = self.config, self._data
        return {
            "tokenizer": data.vocab.fingerprint,
            "corpus": data.corpus_fingerprint,
            "heldout_percent": data.heldout_percent,
            "split": cfg.split,
            "max_sequence_length": cfg.max_sequence_length,
            "max_examples": cfg.max_examples,
            "seed": cfg.seed,
            "order_version": _ORDER_VERSION,
        }

    def write_assets(self, directory: Union[str, os.PathLike[str]]) -> None:
        """Writes the tokenizer, for `vocabulary.load_vocabulary`."""
        self._data.vocab.save(directory)

    def document_token_ids(self) -> Iterator[Int32[np.ndarray, " num_tokens"]]:
        """Yields each document of the split as ids from begin to end of document, both included.

        Every pair of neighbours is an input and its target; together they are the pairs of one whole epoch.
        """
        data = self._data
        for start, length in zip(data.starts, data.lengths, strict=True):
            ids = data.tokens[start : start + length].astype(np.int32)
            yield np.concatenate([np.asarray([data.vocab.bos_id], dtype=np.int32), ids])
