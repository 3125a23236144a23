"""From a run of AXLearn to a run directory that goes on with it."""

import dataclasses
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Optional

import numpy as np

from axlearn.cli._imported_run import check_vocab_size, load_tokenizer, override, run_config
from axlearn.cli._new_dir import check_free_space, check_new_dir, format_bytes, new_dir
from axlearn.cli._run_files import NO_TOKENIZER, checkpoints_dir, write_config_files
from axlearn.common.checkpointer import CheckpointReader, export_native, open_checkpoint
from axlearn.common.config import config_from_text, error_message, join_messages, nearest_names
from axlearn.common.utils import TensorSpec, flatten_items
from axlearn.common.vocabulary import Vocabulary

# The dump of its config that AXLearn writes into the directory of a run.
CONFIG_FILE = "trainer_config"
# Of their config, what the numbers depend on; data, mesh and files are those of the recipe.
_PARTS = ("model", "learner")
_VALUES = ("max_step", "train_dtype")
# A few tell the story: a model of another width differs everywhere.
_MAX_LISTED = 8


@dataclasses.dataclass(frozen=True)
class ImportOptions:
    """What the command line of an import says.

    Attributes:
        source: The directory of AXLearn's run, with `checkpoints`.
        output: The run directory to make.
        trainer_config: The file with the dump of its config; None: `trainer_config` in `source`.
        recipe: The recipe whose data and mesh the run gets.
        data_dir: Given to the recipe.
        tokenizer: A SentencePiece model, or the folder of a tokenizer; "none": there is none.
        step: The step to go on from; None: the newest.
        overrides: "path=value" for the run's config.
    """

    source: str
    output: str
    trainer_config: Optional[str]
    recipe: str
    data_dir: Optional[str]
    tokenizer: str
    step: Optional[int]
    overrides: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Imported:
    """What was imported.

    Attributes:
        step: The step of the checkpoint.
        num_arrays: Arrays in it.
        num_bytes: Their size.
        left_out: Leaves that are no arrays, with their types.
        vocab: The tokenizer; None: there is none.
    """

    step: int
    num_arrays: int
    num_bytes: int
    left_out: Mapping[str, str]
    vocab: Optional[Vocabulary]


def import_run(options: ImportOptions) -> Imported:
    """Makes a run directory with the model, the learner and a checkpoint of a run of AXLearn.

    Raises:
        ValueError: If something does not fit together; nothing is written.
        OSError: If a file cannot be read or written; nothing is left.
        RuntimeError: If the checkpoint is damaged; nothing is left.
    """
    output = check_new_dir(options.output, flag="--output")
    text = _read_dump(options)
    reader = open_checkpoint(checkpoints_dir(options.source), step=options.step)
    model, learner = (config_from_text(text, path=part) for part in _PARTS)
    vocab = None if options.tokenizer == NO_TOKENIZER else _vocabulary(options.tokenizer, model)
    cfg = run_config(
        model,
        recipe=options.recipe,
        data_dir=options.data_dir,
        output=options.output,
        vocab=vocab,
        max_len=None,
    )
    cfg.set(learner=learner, **_values_from_text(text))
    overrides = override(cfg, options.overrides)
    _check_arrays(reader, cfg)
    num_bytes = sum(math.prod(entry.shape) * entry.dtype.itemsize for entry in reader.arrays.values())
    check_free_space(output, num_bytes=num_bytes, flag="--output")
    with new_dir(output) as folder:
        write_config_files(folder, cfg, overrides=overrides)
        if vocab is not None:
            vocab.save(folder / "tokenizer")
        exported = export_native(reader, output_dir=folder / "checkpoints")
    return Imported(
        step=reader.step,
        num_arrays=exported.num_arrays,
        num_bytes=exported.num_bytes,
        left_out=exported.left_out,
        vocab=vocab,
    )


def _read_dump(options: ImportOptions) -> str:
    path = pathlib.Path(options.trainer_config or os.path.join(options.source, CONFIG_FILE))
    if not path.is_file():
        raise ValueError(
            error_message(
                where=str(path),
                what="there is no such file",
                expected="the config of the run, as AXLearn writes it: a line for each field",
                advice="Name it with --trainer_config.",
            )
        )
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(
            error_message(where=str(path), what=f"it cannot be read ({e})", expected="text in UTF-8")
        ) from e


def _vocabulary(path: str, model: Any) -> Vocabulary:
    """Returns the tokenizer; the model's config helps out where it does not name its special tokens."""
    decoder = model.decoder
    ids = {"bos_id": None, "eos_id": decoder.eos_token_id, "pad_id": decoder.pad_token_id}
    vocab = load_tokenizer(pathlib.Path(path), ids=ids)
    check_vocab_size(vocab, model)
    return vocab


def _values_from_text(text: str) -> dict[str, Any]:
    """Returns those fields of the trainer itself that decide numbers, as far as the dump has them."""
    lines = [line for line in text.splitlines() if line.partition(":")[0] in (*_VALUES, "klass")]
    trainer: Any = config_from_text("\n".join(lines))
    return {name: getattr(trainer, name) for name in _VALUES}


def _check_arrays(reader: CheckpointReader, cfg: Any) -> None:
    """Compares the arrays of the checkpoint with those of the config's model and learner."""
    expected = _expected_arrays(cfg)
    found = {
        path: _described(entry.shape, entry.dtype)
        for path, entry in reader.arrays.items()
        if path.partition("/")[0] in _PARTS
    }
    unknown = found.keys() - expected.keys()
    problems = [
        f"{path}: {wanted} in the config, not in the checkpoint{_hint(path, unknown)}"
        for path, wanted in expected.items()
        if path not in found
    ]
    problems += [f"{path}: in the checkpoint, not in the config" for path in sorted(unknown)]
    problems += [
        f"{path}: {found[path]} in the checkpoint, {wanted} in the config"
        for path, wanted in expected.items()
        if path in found and found[path] != wanted
    ]
    if not problems:
        return
    shown = sorted(problems, key=lambda problem: not problem.startswith("model/"))[:_MAX_LISTED]
    if len(problems) > _MAX_LISTED:
        shown.append(f"... and {len(problems) - _MAX_LISTED} more")
    raise ValueError(
        join_messages(
            shown, heading=f"{reader.path} holds other arrays than the config: {len(problems)} differ:"
        )
    )


def _hint(path: str, candidates: Any) -> str:
    near = nearest_names(path, candidates)[:1]
    return f" (there is {near[0]})" if near else ""


def _described(shape: Sequence[int], dtype: Any) -> str:
    return f"{np.dtype(dtype).name} {tuple(shape)}"


def _expected_arrays(cfg: Any) -> dict[str, str]:
    """Returns type and shape of the arrays of the config's model and learner, in words, by path."""
    model = cfg.model.clone(name="model").instantiate(parent=None)
    learner = cfg.learner.clone(name="learner").instantiate(parent=None)
    model_specs = model.create_parameter_specs_recursively()
    specs = {"model": model_specs, "learner": learner.create_state_partition_specs(model_specs)}
    return {
        path: _described(spec.shape, spec.dtype)
        for path, spec in flatten_items(specs)
        if isinstance(spec, TensorSpec)
    }


def report(options: ImportOptions, imported: Imported) -> str:
    """Returns what the command prints of an import."""
    run, vocab = options.output, imported.vocab
    lines = [
        f"{run}: step {imported.step}, {imported.num_arrays} arrays, {format_bytes(imported.num_bytes)}; model, "
        "learner and their length as in AXLearn's config.",
        *(
            f"Left out: {path} ({kind}), which only AXLearn reads."
            for path, kind in imported.left_out.items()
        ),
        f"Tokenizer: {vocab.vocab_size:,} ids." if vocab is not None else "Tokenizer: none.",
        f"Data and mesh: those of the recipe {options.recipe}, at the batch behind step {imported.step}.",
        "Next:",
        f"  python -m axlearn.common.launch_trainer_main --trainer_dir={run}",
    ]
    return "\n".join(lines)
