"""Recipes for runs of several processes, which write down which rows each process reads for training."""

import hashlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Optional

import jax

from axlearn.common import input_fake, input_grain
from axlearn.common.config import TrainerConfigFn
from axlearn.common.input_base import Batch, DataIterator, Feed
from axlearn.common.module import nowrap
from axlearn.common.trainer import SpmdTrainer
from axlearn.common.utils import HybridMeshShape
from tests.common.trainer import tiny_recipe
from tests.small_text_recipe import small_text_config

BATCH_SIZE = 8


def noted(iterator: DataIterator, feed: Feed) -> DataIterator:
    """Returns the same batches; each leaves the digests of its rows in $HOSTS_TEST_ROWS/<process>.jsonl.

    With $HOSTS_TEST_FAIL="1:5", process 1 cannot read the batch of step 5.
    """
    here = jax.process_index()
    path = pathlib.Path(os.environ["HOSTS_TEST_ROWS"]) / f"{here}.jsonl"
    bad = os.environ.get("HOSTS_TEST_FAIL")

    def batches_from(first: int) -> Iterator[Batch]:
        iterator.set_state({**iterator.get_state(), "next_step": first})
        for step, batch in enumerate(iterator, start=first + 1):
            if bad == f"{here}:{step}":
                raise OSError(f"cannot read the batch of step {step}")
            rows = batch["input_ids"]
            digests = [hashlib.sha256(row.tobytes()).hexdigest() for row in rows]
            record = {"step": step, "first_row": feed.process_index * len(rows), "rows": digests}
            with path.open("a", encoding="utf-8") as f:
                f.write(json.dumps(record) + "\n")
            yield batch

    return DataIterator(batches_from=batches_from, fingerprint=iterator.get_state()["fingerprint"])


class NotedFakeInput(input_fake.FakeLmInput):
    """Made-up ids, noted."""

    @nowrap
    def batches(self) -> DataIterator:
        return noted(super().batches(), self._feed(self.config.global_batch_size))


class NotedTextInput(input_grain.Input):
    """Packed text, noted."""

    @nowrap
    def batches(self) -> DataIterator:
        return noted(super().batches(), self._feed(self.config.global_batch_size))


def tiny_config(data_dir: Optional[str] = None) -> SpmdTrainer.Config:
    """Returns the trainer's smallest recipe on two parts of a batch, each on four devices that share the model.

    Four processes of two devices do not have parts of their own then: two and two read the same rows.
    """
    del data_dir
    cfg = tiny_recipe.trainer_config(eval_every_n_steps=100)
    fields = {name: getattr(cfg.input, name) for name in ("global_batch_size", "source_length", "vocab_size")}
    cfg.input = NotedFakeInput.default_config().set(**fields)
    cfg.mesh_shape = HybridMeshShape(ici_mesh_shape=(1, -1), dcn_mesh_shape=(2, -1))
    return cfg


def fuji_config(data_dir: Optional[str] = None) -> SpmdTrainer.Config:
    """Returns the small text recipe over the text at $HOSTS_TEST_TEXT."""
    del data_dir
    input_cfg = NotedTextInput.default_config().set(global_batch_size=BATCH_SIZE)
    return small_text_config(input_cfg, path=os.environ["HOSTS_TEST_TEXT"])


def named_trainer_configs() -> dict[str, TrainerConfigFn]:
    """Returns the recipes by name."""
    return {"hosts-tiny": tiny_config, "hosts-fuji": fuji_config}
