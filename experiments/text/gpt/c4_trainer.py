"""Fuji and gspmd on C4 (https://arxiv.org/abs/1910.10683): 102 recipes, and `fuji-70B` for the one most are after.

`python -m axlearn.common.launch_trainer_main --config=fuji-7B-v2-flash --data_dir=... --mesh_selector=tpu-v5p-128`

The data is TFDS' `c4/en:3.0.1` below `--data_dir`, the tokenizers are looked for below its `tokenizers/`
(`docs/data.md`). With `--data_dir=FAKE` ids are drawn at random, which needs neither.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Optional

from axlearn.common.config import InstantiableConfig, TrainerConfigFn, config_for_function
from axlearn.common.data_dir import set_data_dir
from axlearn.common.promises import FP8_PROMISE, with_promises
from axlearn.common.trainer import SpmdTrainer
from axlearn.experiments.text.common import DataMixtureComponent, vocab
from axlearn.experiments.text.gpt import common, fuji, gspmd

_C4 = "c4/en:3.0.1"
_SHUFFLE_BUFFER_SIZE = 8192
_EVAL_SPLITS = {"train": (_C4, "train[:8192]"), "validation": (_C4, "validation")}

_GSPMD_TOKENIZER = config_for_function(vocab).set(sentencepiece_model_name="bpe_32k_c4.model")


def _with_c4(
    cfg: SpmdTrainer.Config,
    *,
    vocab_cfg: InstantiableConfig,
    max_sequence_length: int,
    batch_size: int,
    eval_every: int,
) -> SpmdTrainer.Config:
    """Sets `input` and `evalers` of a recipe that has all else."""
    cfg.input, eval_inputs = common.input_configs(
        vocab_cfg=vocab_cfg,
        vocab_size=cfg.model.decoder.vocab_size,
        max_sequence_length=max_sequence_length,
        global_batch_size=batch_size,
        train_components=[
            DataMixtureComponent(name=_C4, weight=1.0, shuffle_buffer_size=_SHUFFLE_BUFFER_SIZE)
        ],
        eval_splits=_EVAL_SPLITS,
    )
    cfg.evalers = {
        name: common.evaler_config(
            input_config=eval_input,
            every_n_steps=eval_every,
            max_step=int(cfg.max_step),
            eval_dtype=cfg.train_dtype,
        )
        for name, eval_input in eval_inputs.items()
    }
    return cfg


def _fuji_config(variant: fuji.Variant, *, data_dir: Optional[str] = None) -> SpmdTrainer.Config:
    with _data_dir(data_dir):
        return _with_c4(
            fuji.trainer_config(variant),
            vocab_cfg=fuji.VERSIONS[variant.version].tokenizer,
            max_sequence_length=variant.max_sequence_length,
            batch_size=variant.batch_size,
            eval_every=fuji.SIZES[variant.size].eval_every,
        )


def _golden_run_config(variant: fuji.Variant, *, data_dir: Optional[str] = None) -> SpmdTrainer.Config:
    """A run of five steps whose every number is worth comparing; its policies still look to step 3000."""
    cfg = _fuji_config(variant, data_dir=data_dir).set(max_step=5, vlog=1)
    cfg.learner.optimizer.args[1].set(learning_rate=0.3, update_schedule=1)
    return cfg


def _gspmd_config(
    trainer_config_fn: Callable[[], SpmdTrainer.Config], *, data_dir: Optional[str] = None
) -> SpmdTrainer.Config:
    with _data_dir(data_dir):
        return _with_c4(
            trainer_config_fn(),
            vocab_cfg=_GSPMD_TOKENIZER,
            max_sequence_length=gspmd.MAX_SEQUENCE_LENGTH,
            batch_size=gspmd.GLOBAL_BATCH_SIZE,
            eval_every=gspmd.SAVE_EVERY_N_STEPS,
        )


def _data_dir(data_dir: Optional[str]) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if data_dir is None else set_data_dir(data_dir)


def named_trainer_configs() -> dict[str, TrainerConfigFn]:
    """Returns the recipes of this module by name."""
    configs: dict[str, TrainerConfigFn] = {}
    for variant in fuji.variants():
        recipe = functools.partial(_fuji_config, variant)
        configs[variant.name] = with_promises(recipe, [FP8_PROMISE]) if variant.fp8 else recipe
    for version in fuji.VERSIONS:
        variant = fuji.Variant(size="test", version=version)
        configs[f"fuji-golden-run-test-{version}"] = functools.partial(_golden_run_config, variant)
    for name, trainer_config_fn in gspmd.trainer_configs().items():
        configs[name] = functools.partial(_gspmd_config, trainer_config_fn)
    return configs


def trainer_config_aliases() -> dict[str, str]:
    """Returns further names under which recipes of this module are found, and the names they stand for."""
    return {"fuji-70B": "fuji-70B-v2-flash"}
