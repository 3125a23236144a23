"""A tokenizer trained on a corpus the first time it is asked for."""

import hashlib
import json
import logging
import pathlib
import time
from collections.abc import Iterator

from axlearn.common import file_system
from axlearn.common.config import ConfigOr, maybe_instantiate
from axlearn.common.text_corpus._corpus import Split, TextCorpus
from axlearn.common.vocabulary import (
    SentencePieceVocabulary,
    Vocabulary,
    load_vocabulary,
    train_sentencepiece,
)

# Raise when the same corpus and size would give another model.
_TRAINER_VERSION = 1


def trained_sentencepiece(
    corpus: ConfigOr[TextCorpus], *, vocab_size: int, cache_dir: str | None = None
) -> Vocabulary:
    """Returns a SentencePiece vocabulary trained on the training split of a corpus.

    The first call trains and caches it; later calls with the same text and size load it.

    Args:
        corpus: The corpus, or a config of it.
        vocab_size: Number of ids.
        cache_dir: Where to keep trained vocabularies; None: `tokenizers` in the user's cache directory.

    Raises:
        ValueError: If the corpus has too little text for `vocab_size`.
    """
    documents: TextCorpus = maybe_instantiate(corpus)
    settings = {
        "version": _TRAINER_VERSION,
        "text": documents.fingerprint(split=Split.TRAIN),
        "vocab_size": vocab_size,
    }
    key = hashlib.sha256(json.dumps(settings).encode("utf-8")).hexdigest()
    root = pathlib.Path(cache_dir) if cache_dir else pathlib.Path(file_system.cache_dir()) / "tokenizers"
    folder = root / f"sentencepiece-{vocab_size}-{key[:16]}"
    if folder.exists():
        try:
            return load_vocabulary(folder)
        except ValueError as e:
            logging.warning("The cached tokenizer cannot be used and is trained again: %s", e)
    started = time.monotonic()
    vocabulary = SentencePieceVocabulary(
        train_sentencepiece(_lines(documents.texts(split=Split.TRAIN)), vocab_size=vocab_size)
    )
    vocabulary.save(folder)
    logging.info(
        "Trained a tokenizer of %d pieces on %s in %.1f s: %s",
        vocabulary.vocab_size,
        documents.name,
        time.monotonic() - started,
        folder,
    )
    return vocabulary


def _lines(texts: Iterator[str]) -> Iterator[str]:
    for text in texts:
        # Not splitlines(): only "\n" is a piece of its own, other separators are ordinary characters.
        yield from text.split("\n")
