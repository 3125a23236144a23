"""What a vocabulary offers: text to token ids and back."""

import os
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

# Written by `Vocabulary.save`: which class it was, and what of its files.
DESCRIPTION_FILE = "vocabulary.json"


@runtime_checkable
class Vocabulary(Protocol):
    """What text inputs and text generation ask of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """The number of ids; every id is in [0, vocab_size)."""

    @property
    def pad_id(self) -> int:
        """The id that fills a row behind its last token."""

    @property
    def eos_id(self) -> int:
        """The id that ends a document."""

    @property
    def bos_id(self) -> int:
        """The id that a document's first token is predicted from."""

    @property
    def prefix_num_bytes(self) -> int:
        """How many bytes `encode` puts before every text and `decode` takes away: 1 for a space, mostly 0."""

    @property
    def fingerprint(self) -> str:
        """A digest that is equal exactly for vocabularies that tokenise alike."""

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without bos and eos."""

    def encode_prompt(self, text: str) -> list[int]:
        """Returns the ids that a model is given to continue a text from: those of a document's beginning."""

    def encode_batch(self, texts: Sequence[str], *, num_threads: int = 1) -> list[list[int]]:
        """Returns the ids of several texts, each as `encode` gives them."""

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of some ids; pad, bos, eos and ids that no piece has stand for no text."""

    def piece_num_bytes(self) -> np.ndarray:
        """Returns how many bytes of UTF-8 text each id stands for, [vocab_size] int32."""

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes what `load_vocabulary` needs into a directory."""


def count_prefix_bytes(vocab: Vocabulary) -> int:
    """Returns `Vocabulary.prefix_num_bytes`, found out on a text of one byte."""
    return max(0, int(vocab.piece_num_bytes()[vocab.encode("a")].sum()) - 1)
