"""Functions from datasets of text to datasets of rows of token ids."""

import enum
import importlib
import os
from collections.abc import Callable, Sequence
from typing import Any, Optional, Union

from axlearn.common.config import InstantiableConfig, error_message, maybe_instantiate
from axlearn.common.input_base import lm_element_spec
from axlearn.common.input_lm._windows import Rows, TokenAdjuster, Tokenizer, eval_window, packed_window
from axlearn.common.input_tf_data import Dataset, DatasetToDatasetFn
from axlearn.common.utils import TensorSpec
from axlearn.common.vocabulary import Vocabulary

# Documents that are tokenised at once where they do not share rows.
_EVAL_WINDOW_SIZE = 64
# Threads that tokenise: more than these the trainer does not need at a million tokens a second.
_MAX_NUM_THREADS = 16

VocabOrConfig = Union[Vocabulary, InstantiableConfig[Vocabulary]]


class InputDataType(enum.Enum):
    """What examples are. Rows of sequence-to-sequence examples are not made yet."""

    # One text, every token of which is a target.
    LM = "lm"
    # A source and a target text, only the latter's tokens being targets.
    SEQ2SEQ_MASK = "seq2seq_mask"
    # A source and a target text, the tokens of both being targets.
    SEQ2SEQ_NO_MASK = "seq2seq_no_mask"


class PackingMethodType(enum.Enum):
    """What keeps the documents of a row apart."""

    # The end-of-document id, and segment ids and positions by which attention stays inside a document.
    EOS_DELIM_MASK = "eos_delim_mask"
    # The end-of-document id alone: tokens attend to all documents before theirs in the row.
    EOS_DELIM_NO_MASK = "eos_delim_no_mask"


def packed_row_spec(
    max_len: int, *, packing_method: Optional[PackingMethodType] = None
) -> dict[str, TensorSpec]:
    """Returns shape and dtype of each array of a row that the functions below make.

    Args:
        max_len: Number of positions of a row.
        packing_method: As in `text_to_lm_training_input`.
    """
    names = ["input_ids", "target_labels", "target_num_bytes"]
    if packing_method is PackingMethodType.EOS_DELIM_MASK:
        names += ["input_segment_ids", "input_positions"]
    return {name: spec for name, spec in lm_element_spec((max_len,)).items() if name in names}


def text_to_lm_training_input(
    vocab_cfg: VocabOrConfig,
    max_len: int,
    *,
    replace_newlines_with: str = "\n",
    window_size: int = 128,
    max_padding_fraction: float = 1.0,
    shuffle_buffer_size: int = 1024,
    is_training: bool = True,
    token_adjuster_cfg: Optional[Union[TokenAdjuster, InstantiableConfig[TokenAdjuster]]] = None,
    packing_method: Optional[PackingMethodType] = None,
    seed: Optional[int] = None,
) -> DatasetToDatasetFn:
    """Returns a function that packs texts into rows.

    `window_size` consecutive documents, each with its end-of-document id behind it, form one line, which is cut
    into rows of `max_len` targets. The input at a target is the token before it on the line; at the first one it
    is the end-of-document id. Within a window every token is a target exactly once, unless the last row is
    dropped. Documents without tokens are left out.

    The rows have `input_ids`, `target_labels` ([max_len] int32, -1 where there is no target) and
    `target_num_bytes`, the bytes of text that the row's targets stand for; with `EOS_DELIM_MASK` also
    `input_segment_ids` and `input_positions`.

    Args:
        vocab_cfg: The vocabulary or its config, which is built when the function is first applied.
        max_len: Number of positions of a row.
        replace_newlines_with: What stands for a newline in the text that the vocabulary sees. Where it is a piece
            of its own it counts as the one byte of a newline, else as the bytes of its own.
        window_size: Number of documents packed together; the last window of a dataset may have fewer.
        max_padding_fraction: Largest part of a window's last row that may be padding; a last row with more is
            dropped. 1: nothing is dropped. 0: only whole rows are kept.
        shuffle_buffer_size: Number of rows among which the order is drawn: whole windows are put together until
            they hold so many (the first ones: an eighth, a quarter, half of it), and their rows come in a drawn
            order. A run that starts from a checkpoint reads those windows again, and none before. 0: rows come
            as they are packed. Only for training.
        is_training: Whether rows are shuffled.
        token_adjuster_cfg: A function, or its config, from the ids of a document, without the end-of-document
            id, to the ids to use. None: they are used as they are. What it adds counts the bytes of its pieces.
        packing_method: What keeps documents apart. None: `EOS_DELIM_NO_MASK`.
        seed: Chooses the order of rows. None: 0.

    Raises:
        ValueError: If a number is out of range.
    """
    _check(
        max_len=(max_len, max_len >= 1, "an integer of at least 1"),
        window_size=(window_size, window_size >= 1, "an integer of at least 1"),
        max_padding_fraction=(max_padding_fraction, 0 <= max_padding_fraction <= 1, "a number from 0 to 1"),
        shuffle_buffer_size=(shuffle_buffer_size, shuffle_buffer_size >= 0, "an integer of at least 0"),
        seed=(seed, seed is None or seed >= 0, "None or an integer of at least 0"),
    )

    def window_fn() -> Callable[[Sequence[dict[str, Any]]], Rows]:
        tokenizer = Tokenizer(
            maybe_instantiate(vocab_cfg),
            replace_newlines_with=replace_newlines_with,
            token_adjuster=maybe_instantiate(token_adjuster_cfg),
        )
        return packed_window(
            tokenizer,
            max_len=max_len,
            max_padding_fraction=max_padding_fraction,
            with_segments=packing_method is PackingMethodType.EOS_DELIM_MASK,
        )

    num_rows = shuffle_buffer_size if is_training else 0
    return lambda dataset: _rows(
        dataset, window_fn=window_fn(), window_size=window_size, num_rows_to_shuffle=num_rows, seed=seed or 0
    )


def text_to_lm_eval_input(
    vocab_cfg: VocabOrConfig,
    max_len: int,
    *,
    replace_newlines_with: str = "\n",
    stride: Optional[int] = None,
) -> DatasetToDatasetFn:
    """Returns a function that turns each text into rows of its own, for evaluation.

    A document's targets are its tokens and the end-of-document id behind them; its first input is the
    end-of-document id. Behind its last target a row is padding. Every target counts exactly once.

    Args:
        vocab_cfg: The vocabulary or its config, which is built when the function is first applied.
        max_len: Number of positions of a row.
        replace_newlines_with: As in `text_to_lm_training_input`.
        stride: By how many targets each further row of a document that is longer than a row moves on, at most
            `max_len`; the `max_len - stride` before them are read again, as context only. None: `max_len`.

    Raises:
        ValueError: If a number is out of range.
    """
    _check(
        max_len=(max_len, max_len >= 1, "an integer of at least 1"),
        stride=(stride, stride is None or 1 <= stride <= max_len, f"None or an integer from 1 to {max_len}"),
    )

    def process(dataset: Dataset) -> Dataset:
        tokenizer = Tokenizer(maybe_instantiate(vocab_cfg), replace_newlines_with=replace_newlines_with)
        window_fn = eval_window(tokenizer, max_len=max_len, stride=max_len if stride is None else stride)
        return _rows(
            dataset, window_fn=window_fn, window_size=_EVAL_WINDOW_SIZE, num_rows_to_shuffle=0, seed=0
        )

    return process


def lm_text_preprocessor(
    *,
    vocab_cfg: VocabOrConfig,
    max_sequence_length: int,
    replace_newlines_with: str,
    window_size: int = 128,
    max_padding_fraction: float = 1.0,
    shuffle_buffer_size: int = 1024,
    is_training: bool,
    token_adjuster_cfg: Optional[Union[TokenAdjuster, InstantiableConfig[TokenAdjuster]]] = None,
    packing_method: Optional[PackingMethodType] = None,
    seed: Optional[int] = None,
) -> DatasetToDatasetFn:
    """Returns a function that packs texts into rows: `text_to_lm_training_input`, as recipes name it.

    Args:
        vocab_cfg: See there, as for the other arguments.
        max_sequence_length: Number of positions of a row.
        replace_newlines_with: See there.
        window_size: See there.
        max_padding_fraction: See there.
        shuffle_buffer_size: See there.
        is_training: See there.
        token_adjuster_cfg: See there.
        packing_method: See there.
        seed: See there.

    Raises:
        ValueError: If a number is out of range.
    """
    return text_to_lm_training_input(
        vocab_cfg,
        max_sequence_length,
        replace_newlines_with=replace_newlines_with,
        window_size=window_size,
        max_padding_fraction=max_padding_fraction,
        shuffle_buffer_size=shuffle_buffer_size,
        is_training=is_training,
        token_adjuster_cfg=token_adjuster_cfg,
        packing_method=packing_method,
        seed=seed,
    )


def _check(**values: tuple[Any, bool, str]) -> None:
    problems = [
        error_message(where=name, what=f"{value!r} cannot be used", expected=expected)
        for name, (value, is_legal, expected) in values.items()
        if not is_legal
    ]
    if problems:
        raise ValueError("\n".join(problems))


def _rows(dataset: Dataset, **kwargs: Any) -> Dataset:
    # The stream's class is one of grain's, which is loaded only when data is read.
    module = importlib.import_module("axlearn.common.input_lm._rows_dataset")
    return module.rows_dataset(dataset, num_threads=min(_MAX_NUM_THREADS, os.cpu_count() or 1), **kwargs)
