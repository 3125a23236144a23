"""Inputs that need no data: token rows drawn from a seed, and batches without anything in them."""

from collections.abc import Iterator
from typing import Optional

import numpy as np

from axlearn.common import input_base
from axlearn.common.config import REQUIRED, Required, config_class, error_message
from axlearn.common.input_base import Batch, DataIterator, Feed, lm_element_spec
from axlearn.common.input_lm import packed_row_spec
from axlearn.common.input_tf_data import ENDLESS, DescribedSource, load_grain
from axlearn.common.module import nowrap
from axlearn.common.utils import TensorSpec


def _steps(step: int, total_num_batches: Optional[int]) -> Iterator[int]:
    while total_num_batches is None or step < total_num_batches:
        yield step
        step += 1


class EmptyInput(input_base.Input):
    """Batches without arrays, for models that need no input."""

    @config_class
    class Config(input_base.Input.Config):
        # Set by the trainer and by evalers; it makes no difference here.
        is_training: Optional[bool] = None
        # Number of batches; None: endless.
        total_num_batches: Optional[int] = None

    @nowrap
    def batches(self) -> DataIterator:
        total = self.config.total_num_batches
        return DataIterator(
            batches_from=lambda step: ({} for _ in _steps(step, total)), fingerprint={"input": "EmptyInput"}
        )

    @nowrap
    def element_spec(self) -> dict[str, TensorSpec]:
        return {}


class FakeLmInput(input_base.Input):
    """Language-model batches of uniformly drawn token ids, a function of seed and step alone.

    The ids of a batch do not depend on the number of processes: each takes its rows of the same global batch.
    The label of a position is the next id of its row, so nothing but the ids' range can be learnt. Every
    target stands for one byte.
    """

    @config_class
    class Config(input_base.Input.Config):
        # Set by the trainer and by evalers; training and evaluation batches are drawn apart.
        is_training: Required[bool] = REQUIRED
        # Number of rows of a batch, over all processes.
        global_batch_size: Required[int] = REQUIRED
        # Number of tokens of a row.
        source_length: Required[int] = REQUIRED
        # Ids are drawn from 0 to vocab_size - 1.
        vocab_size: Required[int] = REQUIRED
        # Number of batches; None: endless.
        total_num_batches: Optional[int] = None
        # Chooses the ids, together with the step; not negative.
        seed: int = 0

    @nowrap
    def batches(self) -> DataIterator:
        cfg = self.config
        feed = self._feed(cfg.global_batch_size)
        return DataIterator(
            batches_from=lambda step: (
                self._to_physical(self._batch(i, feed)) for i in _steps(step, cfg.total_num_batches)
            ),
            fingerprint={
                "input": "FakeLmInput",
                "global_batch_size": cfg.global_batch_size,
                "source_length": cfg.source_length,
                "vocab_size": cfg.vocab_size,
                "is_training": cfg.is_training,
                "seed": cfg.seed,
            },
        )

    def _batch(self, step: int, feed: Feed) -> Batch:
        """Returns a process' rows of the batch of a step."""
        cfg = self.config
        bits = np.random.Philox(np.random.SeedSequence((cfg.seed, int(cfg.is_training), step))).random_raw(
            cfg.global_batch_size * (cfg.source_length + 1)
        )
        ids = (bits % np.uint64(cfg.vocab_size)).astype(np.int32).reshape(cfg.global_batch_size, -1)
        feed_batch_size = cfg.global_batch_size // feed.num_processes
        ids = ids[feed.process_index * feed_batch_size :][:feed_batch_size]
        shape = (feed_batch_size, cfg.source_length)
        return {
            "input_ids": ids[:, :-1],
            "target_labels": ids[:, 1:],
            "input_segment_ids": np.ones(shape, dtype=np.int32),
            "input_positions": np.broadcast_to(np.arange(cfg.source_length, dtype=np.int32), shape),
            "target_num_bytes": np.full([feed_batch_size], cfg.source_length, dtype=np.int32),
        }

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @nowrap
    def element_spec(self) -> dict[str, TensorSpec]:
        cfg = self.config
        return self._to_physical_spec(lm_element_spec((cfg.global_batch_size, cfg.source_length)))


def fake_lm_source(
    *,
    is_training: bool,
    max_sequence_length: int,
    vocab_size: int,
    num_examples: Optional[int] = None,
    seed: Optional[int] = None,
) -> DescribedSource:
    """Returns a source of rows of uniformly drawn ids, for `input_tf_data.Input`, in place of packed text.

    A row is a function of the seed, its index and `is_training`. The label of a position is the next id of its
    row, and every target stands for one byte.

    Args:
        is_training: Rows for training and for evaluation are drawn apart.
        max_sequence_length: Number of positions of a row.
        vocab_size: Ids are drawn from 0 to vocab_size - 1.
        num_examples: Number of rows. None: endless for training; to be given for evaluation.
        seed: Chooses the ids; not negative. None: 0.

    Raises:
        ValueError: If rows for evaluation are without an end, or a number is out of range.
    """
    problems = [
        error_message(where=name, what=f"{value!r} cannot be used", expected=expected)
        for name, value, is_legal, expected in (
            ("max_sequence_length", max_sequence_length, max_sequence_length >= 1, "at least 1"),
            ("vocab_size", vocab_size, vocab_size >= 1, "at least 1"),
            (
                "num_examples",
                num_examples,
                is_training or (num_examples or 0) >= 1,
                "at least 1 for evaluation",
            ),
            ("seed", seed, (seed or 0) >= 0, "None or an integer of at least 0"),
        )
        if not is_legal
    ]
    if problems:
        raise ValueError("\n".join(problems))
    rows = _FakeRows(
        num_rows=ENDLESS if num_examples is None else num_examples,
        row_len=max_sequence_length,
        vocab_size=vocab_size,
        key=(seed or 0, int(is_training)),
    )
    return DescribedSource(
        lambda: load_grain().MapDataset.source(rows),
        element_spec=packed_row_spec(max_sequence_length),
        vocab_size=lambda: vocab_size,
    )


class _FakeRows:
    """Rows of drawn ids: grain's random-access data source."""

    def __init__(self, *, num_rows: int, row_len: int, vocab_size: int, key: tuple[int, ...]):
        self._num_rows = num_rows
        self._row_len = row_len
        self._vocab_size = vocab_size
        self._key = key

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, index: int) -> Batch:
        bits = np.random.Philox(np.random.SeedSequence((*self._key, int(index)))).random_raw(
            self._row_len + 1
        )
        ids = (bits % np.uint64(self._vocab_size)).astype(np.int32)
        return {
            "input_ids": ids[:-1],
            "target_labels": ids[1:],
            "target_num_bytes": np.asarray(self._row_len, dtype=np.int32),
        }
