"""kill-test: the small text recipe on batches of four rows."""

import os
from typing import Optional

from axlearn.common import input_grain
from axlearn.common.config import TrainerConfigFn
from axlearn.common.trainer import SpmdTrainer
from tests.small_text_recipe import small_text_config


def trainer_config(data_dir: Optional[str] = None) -> SpmdTrainer.Config:
    """Returns the recipe over the text at $KILL_TEST_TEXT."""
    del data_dir
    input_cfg = input_grain.Input.default_config().set(global_batch_size=4)
    return small_text_config(input_cfg, path=os.environ["KILL_TEST_TEXT"])


def named_trainer_configs() -> dict[str, TrainerConfigFn]:
    """Returns the recipe by name."""
    return {"kill-test": trainer_config}
