"""From the folder of a Hugging Face model to a run directory."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any, Optional

import numpy as np

from axlearn.cli._imported_run import (
    SENTENCEPIECE_FILE,
    check_vocab_size,
    load_tokenizer,
    override,
    run_config,
)
from axlearn.cli._new_dir import check_free_space, check_new_dir, format_bytes, new_dir
from axlearn.cli._run_files import HF_DIR, NO_TOKENIZER, read_json_object, write_config_files
from axlearn.common.causal_lm import Model
from axlearn.common.checkpointer import CheckpointWriter
from axlearn.common.config import InstantiableConfig, error_message
from axlearn.common.file_system import write_bytes_durably
from axlearn.common.hf import (
    WEIGHT_DTYPES,
    Copied,
    SafetensorsReader,
    TensorRule,
    TextFields,
    check_weights,
    family_from_hf,
    import_weights,
    parameter_shapes,
    tensor_rules,
    text_fields_from_hf,
)
from axlearn.common.utils import flatten_items
from axlearn.common.vocabulary import HUGGING_FACE_FILES, HuggingFaceVocabulary, Vocabulary
from axlearn.experiments.text.gpt import hf

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
# Kept for an export, beside the files of the tokenizer that the vocabulary does not keep.
MODEL_FILES = (CONFIG_FILE, GENERATION_CONFIG_FILE)
MODEL_PREFIX = "model/"


@dataclasses.dataclass(frozen=True)
class ImportOptions:
    """What the command line of an import says.

    Attributes:
        source: The folder of the model.
        output: The run directory.
        recipe: The recipe whose learner, data and mesh the run gets.
        data_dir: Given to the recipe.
        dtype: Type of the parameters.
        tokenizer: Where the tokenizer is; None: beside the model; "none": there is none.
        overrides: "path=value" for the run's config.
    """

    source: str
    output: str
    recipe: str
    data_dir: Optional[str]
    dtype: str
    tokenizer: Optional[str]
    overrides: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Imported:
    """What was imported.

    Attributes:
        family: The kind of model, such as "llama".
        copied: What was written.
        source_bytes: Size of the tensors that were read.
        num_files: In how many files they were.
        vocab: The tokenizer; None: there is none.
        trainer_config: The config of the run.
    """

    family: str
    copied: Copied
    source_bytes: int
    num_files: int
    vocab: Optional[Vocabulary]
    trainer_config: InstantiableConfig


def import_run(options: ImportOptions) -> Imported:
    """Makes a run directory whose step 0 is a Hugging Face model.

    Raises:
        ValueError: If something does not fit together; nothing is written.
        OSError: If a file cannot be read or written; nothing is left.
    """
    output = check_new_dir(options.output, flag="--output")
    source = pathlib.Path(options.source)
    hf_config = read_hf_config(source)
    _check_generation_config(source)
    dtype = WEIGHT_DTYPES[options.dtype]
    model = hf.model_config(hf_config, kv_cache_dtype=dtype.type).set(dtype=dtype.type)
    reader = SafetensorsReader(source)
    fields = text_fields_from_hf(hf_config)
    vocab = None if options.tokenizer == NO_TOKENIZER else _vocabulary(_tokenizer_path(options), fields)
    if vocab is not None:
        check_vocab_size(vocab, model)
        if model.decoder.eos_token_id == hf.NO_TOKEN_ID:
            model.decoder.eos_token_id = vocab.eos_id
    cfg = run_config(
        model,
        recipe=options.recipe,
        data_dir=options.data_dir,
        output=options.output,
        vocab=vocab,
        max_len=fields.max_len,
    )
    overrides = override(cfg, options.overrides)
    rules = tensor_rules(cfg.model, hf_config)
    _check_parameters(cfg.model, rules)
    check_weights(reader, rules=rules)
    num_params = sum(int(np.prod(s, dtype=np.int64)) for s in parameter_shapes(rules).values())
    check_free_space(output, num_bytes=num_params * dtype.itemsize, flag="--output")
    with new_dir(output) as folder:
        write_config_files(folder, cfg, overrides=overrides)
        if vocab is not None:
            vocab.save(folder / "tokenizer")
        _carry(folder / HF_DIR, source=source, tokenizer=_tokenizer_path(options), vocab=vocab)
        with CheckpointWriter(folder / "checkpoints", step=0) as writer:
            copied = import_weights(reader, rules=rules, sink=writer, prefix=MODEL_PREFIX, dtype=dtype)
    return Imported(
        family=family_from_hf(hf_config).value,
        copied=copied,
        source_bytes=sum(info.num_bytes for info in reader.tensors.values()),
        num_files=len(reader.files),
        vocab=vocab,
        trainer_config=cfg,
    )


def read_hf_config(folder: pathlib.Path) -> dict[str, Any]:
    """Returns the contents of the config.json of a model.

    Raises:
        ValueError: If there is none.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ValueError(
            error_message(
                where=str(folder),
                what=f"there is no {CONFIG_FILE}" if folder.is_dir() else "there is no such folder",
                expected="the folder of a model as Hugging Face saves it",
                advice="Names on the hub are not looked up: download the model first.",
            )
        )
    return read_json_object(path)


def _check_generation_config(folder: pathlib.Path) -> None:
    """Checks that the generation_config.json can be read, if there is one."""
    if (folder / GENERATION_CONFIG_FILE).is_file():
        read_json_object(folder / GENERATION_CONFIG_FILE)


def _tokenizer_path(options: ImportOptions) -> pathlib.Path:
    return pathlib.Path(
        options.source if options.tokenizer in (None, NO_TOKENIZER) else str(options.tokenizer)
    )


def _vocabulary(path: pathlib.Path, fields: TextFields) -> Vocabulary:
    """Returns the tokenizer; config.json helps out where it does not name its special tokens."""
    eos_id = fields.eos_ids[0] if fields.eos_ids else None
    return load_tokenizer(path, ids={"bos_id": fields.bos_id, "eos_id": eos_id, "pad_id": fields.pad_id})


def _check_parameters(model: Model.Config, rules: Sequence[TensorRule]) -> None:
    """Checks that the rules make exactly the parameters of the model."""
    specs = model.clone(name="model").instantiate(parent=None).create_parameter_specs_recursively()
    expected = {path: tuple(spec.shape) for path, spec in flatten_items(specs)}
    assert parameter_shapes(rules) == expected, (parameter_shapes(rules), expected)


def _carry(
    folder: pathlib.Path, *, source: pathlib.Path, tokenizer: pathlib.Path, vocab: Optional[Vocabulary]
) -> None:
    """Copies what an export needs as it is, without the files that the vocabulary keeps."""
    kept = vocab.files if isinstance(vocab, HuggingFaceVocabulary) else {}
    folder.mkdir()
    paths = {name: source / name for name in MODEL_FILES}
    if tokenizer.is_file():
        paths[SENTENCEPIECE_FILE] = tokenizer
    else:
        paths |= {name: tokenizer / name for name in HUGGING_FACE_FILES if name not in kept}
    for name, path in paths.items():
        if path.is_file():
            write_bytes_durably(folder / name, path.read_bytes())


def report(options: ImportOptions, imported: Imported) -> str:
    """Returns what the command prints of an import."""
    copied, vocab = imported.copied, imported.vocab
    run = options.output
    files = "1 file" if imported.num_files == 1 else f"{imported.num_files} files"
    lines = [
        f"{run}: a {imported.family} of {copied.num_params:,} parameters, from {files} with "
        f"{format_bytes(imported.source_bytes)}; {format_bytes(copied.num_bytes)} in {options.dtype}.",
        *(f"Left out: {name}: {reason}." for name, reason in sorted(copied.ignored.items())),
        f"Tokenizer: {vocab.vocab_size:,} ids." if vocab is not None else "Tokenizer: none.",
        f"Data, learner and mesh: those of the recipe {options.recipe}. Its learning rate was made for another "
        "model; --set changes it.",
        "Next:",
        f"  python -m axlearn.common.launch_trainer_main --trainer_dir={run}",
    ]
    if vocab is not None:
        lines.append(f'  axlearn generate {run} --temperature 0 --prompt "..."')
    lines.append(f"  axlearn convert hf export {run} --output DIR")
    return "\n".join(lines)
