"""The vocabulary backed by a SentencePiece model, and the training of one."""

import functools
import hashlib
import io
import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, Optional

import numpy as np

from axlearn.common import file_system
from axlearn.common.config import error_message
from axlearn.common.vocabulary._base import DESCRIPTION_FILE, count_prefix_bytes

# SentencePiece writes a space inside a piece as this character (U+2581).
_SPACE_MARK = "\u2581"
_SPACE_MARK_BYTES = tuple(_SPACE_MARK.encode("utf-8"))

MODEL_FILE = "spm.model"


def _sentencepiece() -> Any:
    """Loads sentencepiece, which only text inputs and generation need."""
    import sentencepiece

    return sentencepiece


class SentencePieceVocabulary:
    """A vocabulary over one SentencePiece model.

    A literal U+2581 in the text would be read back as a space, since SentencePiece uses that character for
    spaces. Where the model has byte pieces, and puts no space before a text, it is therefore encoded by its three
    bytes.
    """

    def __init__(self, model: bytes, *, num_extra_ids: int = 0, pad_id: Optional[int] = None):
        """Loads a model.

        Args:
            model: The content of a SentencePiece model file.
            num_extra_ids: How many ids without text to add behind those of the model.
            pad_id: The padding id of a model that has none of its own; None: it has one.

        Raises:
            ValueError: If `model` is not a SentencePiece model, or has no padding or end-of-sentence piece.
        """
        try:
            self._processor = _sentencepiece().SentencePieceProcessor(model_proto=model)
        except RuntimeError as e:
            raise ValueError(
                error_message(
                    what=f"not a SentencePiece model ({len(model)} bytes: {e})",
                    expected="the content of a file that SentencePiece's trainer wrote",
                )
            ) from e
        self._model = model
        self._num_extra_ids = num_extra_ids
        own_pad_id = int(self._processor.pad_id())
        self._pad_id = own_pad_id if pad_id is None or own_pad_id >= 0 else pad_id
        self._fingerprint = hashlib.sha256(model + b"+%d" % num_extra_ids).hexdigest()
        for name, value in (("pad", self.pad_id), ("eos", self.eos_id)):
            if value < 0:
                raise ValueError(
                    error_message(
                        what=f"the SentencePiece model has no {name} piece ({name}_id is {value})",
                        expected=f"a model trained with --{name}_id set",
                    )
                )
        byte_ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK_BYTES]
        self._space_mark_ids = byte_ids if all(map(self._processor.is_byte, byte_ids)) else None
        if self.prefix_num_bytes:
            # A text cannot be encoded in parts, each of which would get a space.
            self._space_mark_ids = None

    @classmethod
    def from_file(
        cls, path: str | os.PathLike[str], *, num_extra_ids: int = 0, pad_id: Optional[int] = None
    ) -> "SentencePieceVocabulary":
        """Loads a model file; see `__init__`."""
        path = pathlib.Path(path)
        try:
            return cls(path.read_bytes(), num_extra_ids=num_extra_ids, pad_id=pad_id)
        except ValueError as e:
            e.add_note(f"While loading {path}.")
            raise

    @property
    def vocab_size(self) -> int:
        return int(self._processor.get_piece_size()) + self._num_extra_ids

    @property
    def pad_id(self) -> int:
        return self._pad_id

    @property
    def eos_id(self) -> int:
        return int(self._processor.eos_id())

    @property
    def bos_id(self) -> int:
        """The id that a first token is predicted from: the model's own bos, else the end-of-document id."""
        bos_id = int(self._processor.bos_id())
        return bos_id if bos_id >= 0 else self.eos_id

    @functools.cached_property
    def prefix_num_bytes(self) -> int:
        return count_prefix_bytes(self)

    @property
    def model_proto(self) -> bytes:
        """The content of the SentencePiece model file."""
        return self._model

    @property
    def num_extra_ids(self) -> int:
        """The number of ids without text behind those of the model."""
        return self._num_extra_ids

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def encode(self, text: str) -> list[int]:
        if self._space_mark_ids is None or _SPACE_MARK not in text:
            return list(self._processor.encode(text))
        parts = self._processor.encode(text.split(_SPACE_MARK))
        ids: list[int] = parts[0]
        for part in parts[1:]:
            ids += self._space_mark_ids + part
        return ids

    def encode_prompt(self, text: str) -> list[int]:
        return [self.bos_id, *self.encode(text)]

    def encode_batch(self, texts: Sequence[str], *, num_threads: int = 1) -> list[list[int]]:
        encoded: list[list[int]] = self._processor.encode(list(texts), num_threads=num_threads)
        if self._space_mark_ids is not None:
            for i, text in enumerate(texts):
                if _SPACE_MARK in text:
                    encoded[i] = self.encode(text)
        return encoded

    def decode(self, ids: Sequence[int]) -> str:
        known = self._processor.get_piece_size()
        return str(self._processor.decode([i for i in map(int, ids) if 0 <= i < known]))

    def piece_num_bytes(self) -> np.ndarray:
        """Returns how many bytes of UTF-8 text each id stands for.

        Pad, bos, eos, unknown and extra ids stand for none.

        Returns:
            An array [vocab_size] int32.
        """
        sp = self._processor
        lengths = np.zeros([self.vocab_size], dtype=np.int32)
        for i in range(sp.get_piece_size()):
            if sp.is_byte(i):
                lengths[i] = 1
            elif not (sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i)):
                lengths[i] = len(sp.id_to_piece(i).replace(_SPACE_MARK, " ").encode("utf-8"))
        return lengths

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes the model file and a description, from which `load_vocabulary` makes an equal vocabulary.

        Args:
            directory: Made where it is missing.
        """
        directory = pathlib.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        description = {
            "class": "sentencepiece",
            "model_file": MODEL_FILE,
            "sha256": hashlib.sha256(self._model).hexdigest(),
            "vocab_size": self.vocab_size,
            "num_extra_ids": self._num_extra_ids,
            "pad_id": self.pad_id,
            "eos_id": self.eos_id,
            "bos_id": self.bos_id,
            # The text reaches the model as it is, newlines included.
            "newlines": "kept",
        }
        file_system.write_bytes_durably(directory / MODEL_FILE, self._model)
        file_system.write_text_durably(directory / DESCRIPTION_FILE, json.dumps(description, indent=1) + "\n")


def train_sentencepiece(lines: Iterable[str], *, vocab_size: int, num_threads: int = 2) -> bytes:
    """Trains a byte-pair-encoding SentencePiece model that loses nothing of its input.

    Pieces do not cross from one word to the next, digits stand alone, runs of spaces have pieces of their
    own, a newline is one piece, and whatever is left falls back to its bytes. The ids of pad, eos, bos and
    unknown are 0, 1, 2, 3. The result depends on nothing but the arguments.

    Args:
        lines: Text, one line per element and without its newline.
        vocab_size: Number of ids; at least the 260 for bytes and special pieces, the newline, and the
            characters of the text.
        num_threads: Threads to train with; they do not change the result.

    Returns:
        The content of a SentencePiece model file.

    Raises:
        ValueError: If there is no text, or `vocab_size` does not suit it.

    Reference:
        Kudo and Richardson, "SentencePiece" (2018), https://arxiv.org/abs/1808.06226; byte pair encoding
        after Sennrich et al. (2016), https://arxiv.org/abs/1508.07909.
    """
    model = io.BytesIO()
    try:
        _sentencepiece().SentencePieceTrainer.train(
            sentence_iterator=(line for line in lines if line),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            # Rarer characters are spelled in bytes rather than given a piece each.
            character_coverage=0.9995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            user_defined_symbols=["\n"],
            pad_id=0,
            eos_id=1,
            bos_id=2,
            unk_id=3,
            num_threads=num_threads,
            # In bytes; longer lines, such as embedded data, teach nothing about words.
            max_sentence_length=16384,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as e:
        # SentencePiece puts its source line and the condition that failed before what it has to say.
        reason = str(e).rpartition("]")[2].strip(" .") or "there is no text"
        raise ValueError(
            error_message(
                where="vocab_size",
                what=f"no SentencePiece model with {vocab_size} pieces can be trained on this text: {reason}",
                expected="a vocab_size that holds all characters of the text, and text enough for it",
            )
        ) from e
    return model.getvalue()
