"""Some documents as rows of token ids: pure functions of the documents, without any dataset around them."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Optional, Protocol, Union

import numpy as np
from absl import logging
from jaxtyping import Int32

from axlearn.common.input_base import Batch
from axlearn.common.lm_packing import IGNORED_LABEL
from axlearn.common.vocabulary import Vocabulary

# Adjusts the ids of a document before its end-of-document id is added.
TokenAdjuster = Callable[[Sequence[int]], Sequence[int]]

_TEXT_FIELD = "text"
# How often a text that is no UTF-8 is reported.
_NUM_REPORTS = 5


class Rows(Protocol):
    """Rows of a window of documents, made when they are asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Batch: ...


class Tokenized(NamedTuple):
    """One document."""

    # Its ids and the end-of-document id behind them.
    ids: Int32[np.ndarray, " num_targets"]
    # Bytes of its text that each of them stands for.
    num_bytes: Int32[np.ndarray, " num_targets"]


class Tokenizer:
    """Texts to ids, with the bytes that each id stands for.

    Args:
        vocab: The vocabulary.
        replace_newlines_with: What stands for a newline in the text that the vocabulary sees.
        token_adjuster: Adjusts the ids of each document. None: they stay as they are.
    """

    def __init__(
        self,
        vocab: Vocabulary,
        *,
        replace_newlines_with: str = "\n",
        token_adjuster: Optional[TokenAdjuster] = None,
    ):
        self.eos_id = vocab.eos_id
        self.pad_id = vocab.pad_id
        self._vocab = vocab
        self._newline = replace_newlines_with
        self._adjust = token_adjuster
        self._prefix_num_bytes = vocab.prefix_num_bytes
        # Of the text that the vocabulary sees, and of the text that it stands for.
        self._seen_num_bytes = vocab.piece_num_bytes()
        self._piece_num_bytes = self._seen_num_bytes.copy()
        *before, newline_id = vocab.encode("a" + replace_newlines_with)
        if replace_newlines_with != "\n" and before == vocab.encode("a"):
            # It has a piece of its own, which stands for the one byte of a newline.
            self._piece_num_bytes[newline_id] = 1

    def __call__(self, examples: Sequence[dict[str, Any]]) -> list[Tokenized]:
        """Returns the documents of some examples; empty ones are left out."""
        texts = [_text(example[_TEXT_FIELD]) for example in examples]
        if self._newline != "\n":
            texts = [text.replace("\n", self._newline) for text in texts]
        documents = zip(texts, self._vocab.encode_batch(texts), strict=True)
        return [self._tokenized(text, ids) for text, ids in documents if ids]

    def _tokenized(self, text: str, ids: Sequence[int]) -> Tokenized:
        prefix = 0
        if self._prefix_num_bytes:
            # Some tokenizers put a space before every text, some only before texts without one.
            surplus = int(self._seen_num_bytes[ids].sum()) - len(text.encode("utf-8"))
            prefix = surplus if surplus == self._prefix_num_bytes else 0
        if self._adjust is not None:
            ids = self._adjust(ids)
        targets = np.asarray([*ids, self.eos_id], dtype=np.int32)
        num_bytes = self._piece_num_bytes[targets]
        num_bytes[0] -= prefix
        return Tokenized(targets, num_bytes)


def _text(value: Union[str, bytes, np.ndarray]) -> str:
    if isinstance(value, str):
        return value
    content = bytes(value)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as e:
        # One bad record among hundreds of millions should not end a run at the same place again and again.
        logging.log_first_n(
            logging.WARNING, "A text is no UTF-8 (%s); what cannot be read becomes U+FFFD.", _NUM_REPORTS, e
        )
        return content.decode("utf-8", errors="replace")


class PackedWindow:
    """The documents of a window one behind the other, cut into rows; see `packed_window`."""

    def __init__(
        self,
        documents: Sequence[Tokenized],
        *,
        max_len: int,
        max_padding_fraction: float,
        with_segments: bool,
        eos_id: int,
        pad_id: int,
    ):
        self._max_len = max_len
        self._with_segments = with_segments
        self._pad_id = pad_id
        none = np.zeros([0], dtype=np.int32)
        # The target at place i; the input at place i is what stands before it.
        self._line = np.concatenate([[eos_id], *(document.ids for document in documents)]).astype(np.int32)
        self._num_bytes = np.concatenate([none, *(document.num_bytes for document in documents)])
        self._starts = np.cumsum([0, *(len(document.ids) for document in documents[:-1])])
        num_full, rest = divmod(len(self._line) - 1, max_len)
        is_last_kept = rest > 0 and max_len - rest <= max_padding_fraction * max_len
        self._num_rows = num_full + is_last_kept

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, index: int) -> Batch:
        begin = index * self._max_len
        end = min(begin + self._max_len, len(self._line) - 1)
        row = _row(
            self._line[begin : end + 1], max_len=self._max_len, pad_id=self._pad_id,
            num_bytes=self._num_bytes[begin:end].sum(),
        )  # fmt: skip
        return {**row, **self._segments(begin, end)} if self._with_segments else row

    def _segments(self, begin: int, end: int) -> Batch:
        first, last = np.searchsorted(self._starts, [begin, end - 1], side="right") - 1
        # Where the pieces of documents in this row begin.
        starts = np.maximum(self._starts[first : last + 1], begin) - begin
        segment_ids = np.zeros([self._max_len], dtype=np.int32)
        positions = np.zeros([self._max_len], dtype=np.int32)
        segment_ids[starts] = 1
        segment_ids[: end - begin] = np.cumsum(segment_ids[: end - begin])
        segment_ids[end - begin :] = 0
        live = np.arange(end - begin, dtype=np.int32)
        positions[: end - begin] = live - starts[segment_ids[: end - begin] - 1]
        return {"input_segment_ids": segment_ids, "input_positions": positions}


class EvalWindow:
    """The documents of a window, each in rows of its own; see `text_to_lm_eval_input`."""

    def __init__(
        self, documents: Sequence[Tokenized], *, max_len: int, stride: int, eos_id: int, pad_id: int
    ):
        self._documents = documents
        self._max_len = max_len
        self._stride = stride
        self._eos_id = eos_id
        self._pad_id = pad_id
        # Of each document: the rows of the documents before it and its own.
        num_rows = [1 + -(-max(0, len(document.ids) - max_len) // stride) for document in documents]
        self._ends = np.cumsum(num_rows, dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Batch:
        which = int(np.searchsorted(self._ends, index, side="right"))
        document = self._documents[which]
        place = index - (int(self._ends[which - 1]) if which else 0)
        begin = place * self._stride
        end = min(begin + self._max_len, len(document.ids))
        line = np.concatenate(
            [[self._eos_id if begin == 0 else document.ids[begin - 1]], document.ids[begin:end]]
        )
        # What the row before has had as targets is only read here.
        num_seen = self._max_len - self._stride if place else 0
        row = _row(
            line, max_len=self._max_len, pad_id=self._pad_id,
            num_bytes=document.num_bytes[begin + num_seen : end].sum(),
        )  # fmt: skip
        row["target_labels"][:num_seen] = IGNORED_LABEL
        return row


def _row(line: np.ndarray, *, max_len: int, pad_id: int, num_bytes: Any) -> Batch:
    """Returns a row whose targets are all but the first element of `line`, and whose inputs are all but the last."""
    input_ids = np.full([max_len], pad_id, dtype=np.int32)
    target_labels = np.full([max_len], IGNORED_LABEL, dtype=np.int32)
    input_ids[: len(line) - 1] = line[:-1]
    target_labels[: len(line) - 1] = line[1:]
    return {
        "input_ids": input_ids,
        "target_labels": target_labels,
        "target_num_bytes": np.asarray(num_bytes, dtype=np.int32),
    }


def packed_window(tokenizer: Tokenizer, **kwargs: Any) -> Callable[[Sequence[dict[str, Any]]], Rows]:
    """Returns a function from the examples of a window to its rows.

    The documents, each with its end-of-document id, form one line, which is cut into rows of `max_len` targets.
    The input at a target is what stands before it on the line, and at the first one the end-of-document id. What
    is left behind the last whole row is a row with padding, or dropped where too much of it would be padding.

    Args:
        tokenizer: Makes documents of examples.
        kwargs: `max_len`; `max_padding_fraction`, the largest part of the last row that may be padding;
            `with_segments`, whether rows say which document a position belongs to.
    """
    return functools.partial(_window, PackedWindow, tokenizer, kwargs)


def eval_window(tokenizer: Tokenizer, **kwargs: Any) -> Callable[[Sequence[dict[str, Any]]], Rows]:
    """Returns a function from the examples of a window to rows of single documents.

    Args:
        tokenizer: Makes documents of examples.
        kwargs: `max_len`; `stride`, by how many targets the next row of a document moves on.
    """
    return functools.partial(_window, EvalWindow, tokenizer, kwargs)


def _window(
    cls: Callable[..., Rows], tokenizer: Tokenizer, kwargs: dict[str, Any], examples: Sequence[dict[str, Any]]
) -> Rows:
    return cls(tokenizer(examples), eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id, **kwargs)
