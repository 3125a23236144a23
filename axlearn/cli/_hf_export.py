"""From a run directory to the folder of a Hugging Face model."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any, Optional

from axlearn.cli._hf_import import CONFIG_FILE, GENERATION_CONFIG_FILE, MODEL_PREFIX, read_hf_config
from axlearn.cli._new_dir import check_free_space, check_new_dir, format_bytes, new_dir
from axlearn.cli._run_files import HF_DIR, context_len, read_config
from axlearn.common.checkpointer import CheckpointReader, open_checkpoint
from axlearn.common.config import error_message
from axlearn.common.file_system import write_bytes_durably, write_text_durably
from axlearn.common.hf import (
    WEIGHT_DTYPES,
    Copied,
    TensorRule,
    export_weights,
    facts_from_hf,
    facts_from_model,
    family_from_hf,
    hf_config_from_model,
    parameter_shapes,
    tensor_rules,
    tokenizer_files,
)
from axlearn.common.vocabulary import (
    HUGGING_FACE_FILES,
    HuggingFaceVocabulary,
    SentencePieceVocabulary,
    Vocabulary,
    load_vocabulary,
)

_EMA_PREFIX = "learner/ema/ema/"


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """What the command line of an export says.

    Attributes:
        run: The run directory.
        output: The folder to make.
        step: The checkpoint's step; None: the newest that can be used.
        dtype: Type of the tensors; None: that of the parameters.
        ema: Whether to take the moving average of the parameters.
        max_shard_bytes: The most bytes of tensors in one file.
    """

    run: str
    output: str
    step: Optional[int]
    dtype: Optional[str]
    ema: bool
    max_shard_bytes: int


@dataclasses.dataclass(frozen=True)
class Exported:
    """What was exported.

    Attributes:
        family: The kind of model, such as "llama".
        step: The checkpoint's step.
        copied: What was written.
        dtype: Type of the tensors.
        has_tokenizer: Whether there is a tokenizer.
    """

    family: str
    step: int
    copied: Copied
    dtype: str
    has_tokenizer: bool


def export_run(options: ExportOptions) -> Exported:
    """Makes the folder of a Hugging Face model from a checkpoint of a run.

    Raises:
        ValueError: If something does not fit together, or no family of models can express this one; nothing is
            written.
        RuntimeError: If the checkpoint is not what was written; nothing is left.
        OSError: If a file cannot be read or written; nothing is left.
    """
    output = check_new_dir(options.output, flag="--output")
    cfg: Any = read_config(options.run)
    run = pathlib.Path(options.run)
    reader = open_checkpoint(run / "checkpoints", step=options.step)
    prefix = _EMA_PREFIX if options.ema else MODEL_PREFIX
    vocab = _vocabulary(run)
    tokenizer = _tokenizer_files(run, vocab, max_len=context_len(cfg.input))
    hf_config = _hf_config(run, cfg, vocab=vocab)
    rules = tensor_rules(cfg.model, hf_config)
    stored_dtype = _check_arrays(reader, rules, prefix=prefix, ema=options.ema)
    dtype_name = options.dtype or stored_dtype
    hf_config = _with_dtype(hf_config, dtype_name)
    dtype = WEIGHT_DTYPES[dtype_name]
    num_bytes = sum(_num_elements(rule) for rule in rules) * dtype.itemsize
    check_free_space(output, num_bytes=num_bytes, flag="--output")
    with new_dir(output) as folder:
        write_text_durably(folder / CONFIG_FILE, json.dumps(hf_config, indent=2) + "\n")
        for name, content in {**_generation_config(run, hf_config), **tokenizer}.items():
            write_bytes_durably(folder / name, content)
        copied = export_weights(
            reader,
            rules=rules,
            prefix=prefix,
            folder=folder,
            dtype=dtype,
            max_shard_bytes=options.max_shard_bytes,
        )
    return Exported(
        family=family_from_hf(hf_config).value,
        step=reader.step,
        copied=copied,
        dtype=dtype_name,
        has_tokenizer=bool(tokenizer),
    )


def _num_elements(rule: TensorRule) -> int:
    num = 1
    for size in rule.shape:
        num *= size
    return num


def _vocabulary(run: pathlib.Path) -> Optional[Vocabulary]:
    """Returns the tokenizer of a run; None where it has none, as runs on made-up data."""
    return load_vocabulary(run / "tokenizer") if (run / "tokenizer").is_dir() else None


def _tokenizer_files(
    run: pathlib.Path, vocab: Optional[Vocabulary], *, max_len: Optional[int]
) -> dict[str, bytes]:
    """Returns the files of the tokenizer: those that were imported, or made from a SentencePiece model."""
    carried = _carried_files(run)
    if isinstance(vocab, HuggingFaceVocabulary):
        return {**carried, **vocab.files}
    if carried or vocab is None:
        return carried
    assert isinstance(vocab, SentencePieceVocabulary), vocab
    return tokenizer_files(vocab, max_len=max_len, where=str(run / "tokenizer"))


def _carried_files(run: pathlib.Path) -> dict[str, bytes]:
    """Returns what an import kept of the tokenizer for an export."""
    folder = run / HF_DIR
    return {name: (folder / name).read_bytes() for name in HUGGING_FACE_FILES if (folder / name).is_file()}


def _hf_config(run: pathlib.Path, cfg: Any, *, vocab: Optional[Vocabulary]) -> dict[str, Any]:
    """Returns the config.json: the one that was imported, as long as it still describes the model, or a new one."""
    if (run / HF_DIR / CONFIG_FILE).is_file():
        carried = read_hf_config(run / HF_DIR)
        if facts_from_hf(carried) == facts_from_model(cfg.model):
            return carried
    decoder = cfg.model.decoder
    max_len = context_len(cfg.input)
    if max_len is None:
        raise ValueError(
            error_message(
                where=f"{run}: input",
                what="the length of its rows is not known, and config.json needs the longest that the model reads",
                expected="an input with max_sequence_length or source_length",
            )
        )
    return hf_config_from_model(
        cfg.model,
        max_position_embeddings=max_len,
        bos_token_id=None if vocab is None else vocab.bos_id,
        eos_token_id=decoder.eos_token_id,
        pad_token_id=decoder.pad_token_id,
    )


def _with_dtype(hf_config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Returns a config.json that says in which type the tensors are, under the name that it has for it."""
    names = [name for name in ("dtype", "torch_dtype") if name in hf_config] or ["torch_dtype"]
    return {**hf_config, **dict.fromkeys(names, dtype)}


def _generation_config(run: pathlib.Path, hf_config: Mapping[str, Any]) -> dict[str, bytes]:
    """Returns how text is to be continued: as imported, or the likeliest token each time, up to the end."""
    carried = run / HF_DIR / GENERATION_CONFIG_FILE
    if carried.is_file():
        return {GENERATION_CONFIG_FILE: carried.read_bytes()}
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    settings = {name: hf_config[name] for name in names if hf_config.get(name) is not None}
    return {GENERATION_CONFIG_FILE: (json.dumps(settings, indent=2) + "\n").encode("utf-8")}


def _check_arrays(reader: CheckpointReader, rules: list[TensorRule], *, prefix: str, ema: bool) -> str:
    """Checks that a checkpoint has the parameters of the model, and returns the name of their type."""
    if ema and not any(path.startswith(prefix) for path in reader.arrays):
        raise ValueError(
            error_message(
                where="--ema",
                what=f"step {reader.step} keeps no moving average of its parameters",
                advice="Leave the flag out.",
            )
        )
    dtypes = set()
    for path, shape in parameter_shapes(rules).items():
        entry = reader.arrays.get(prefix + path)
        if entry is None or tuple(entry.shape) != tuple(shape):
            found = "nothing" if entry is None else f"shape {tuple(entry.shape)}"
            raise ValueError(
                error_message(
                    where=f"{reader.path}: {prefix}{path}",
                    what=f"there is {found}",
                    expected=f"shape {tuple(shape)}, from the run's trainer_config.json",
                )
            )
        dtypes.add(entry.dtype.name)
    known = [name for name in WEIGHT_DTYPES if {name} == dtypes]
    # Of parameters of several types, the widest loses nothing.
    return known[0] if known else "float32"


def report(options: ExportOptions, exported: Exported) -> str:
    """Returns what the command prints of an export."""
    copied, output = exported.copied, options.output
    what = "the moving average of step" if options.ema else "step"
    tokenizer = "" if exported.has_tokenizer else "There is no tokenizer in the run, so there is none here.\n"
    return (
        f"{output}: {what} {exported.step} as a {exported.family} of {copied.num_params:,} parameters, "
        f"{format_bytes(copied.num_bytes)} in {exported.dtype}.\n{tokenizer}"
        f'Load it with transformers: AutoModelForCausalLM.from_pretrained("{output}").'
    )
