"""What imports of all formats share: the recipe that gives a run its rest, and the tokenizer."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Optional

from axlearn.cli._run_files import NO_TOKENIZER
from axlearn.common.causal_lm import Model
from axlearn.common.config import (
    Override,
    UnknownConfigNameError,
    apply_overrides,
    config_for_function,
    error_message,
    nearest_names,
)
from axlearn.common.vocabulary import (
    DESCRIPTION_FILE,
    TOKENIZER_FILE,
    HuggingFaceVocabulary,
    SentencePieceVocabulary,
    Vocabulary,
    load_vocabulary,
)
from axlearn.experiments import registry
from axlearn.experiments.text.gpt import hf

# What Hugging Face calls the model of SentencePiece.
SENTENCEPIECE_FILE = "tokenizer.model"
# Fields of the run's config that have to agree with what is written, and what to do instead.
_DECIDED = {
    "dir": "--output decides it; the run can be moved later.",
    "model.dtype": "It is the type that the parameters are written in; of a Hugging Face model, --dtype decides it.",
}


def load_tokenizer(path: pathlib.Path, *, ids: Mapping[str, Optional[int]]) -> Vocabulary:
    """Returns the tokenizer of a model from elsewhere.

    Args:
        path: A SentencePiece model, or a folder with tokenizer.json or tokenizer.model, or that of a run.
        ids: `bos_id`, `eos_id` and `pad_id` of the model, for a tokenizer that does not name its own.

    Raises:
        ValueError: If there is none, or it cannot be used.
    """
    if (path / DESCRIPTION_FILE).is_file():
        return load_vocabulary(path)
    if (path / TOKENIZER_FILE).is_file():
        return HuggingFaceVocabulary.from_dir(path, **ids)
    model = path if path.is_file() else path / SENTENCEPIECE_FILE
    if model.is_file():
        pad_id = ids["pad_id"] if ids["pad_id"] is not None else ids["eos_id"]
        return SentencePieceVocabulary.from_file(model, pad_id=pad_id)
    raise ValueError(
        error_message(
            where=str(path),
            what="there is no tokenizer" if path.is_dir() else "there is no such file or folder",
            expected=f"a folder with {TOKENIZER_FILE} or {SENTENCEPIECE_FILE}, or a SentencePiece model",
            advice=f"Name it with --tokenizer, or --tokenizer={NO_TOKENIZER} to do without (then --data_dir=FAKE).",
        )
    )


def check_vocab_size(vocab: Vocabulary, model: Model.Config) -> None:
    """Checks that a model knows every id of a tokenizer.

    Raises:
        ValueError: If it does not.
    """
    decoder: Any = model.decoder
    if vocab.vocab_size > decoder.vocab_size:
        raise ValueError(
            error_message(
                where="tokenizer",
                what=f"it has {vocab.vocab_size} ids, the model's embedding {decoder.vocab_size} rows",
                expected="a tokenizer with at most that many",
                advice="Give the tokenizer that the model was trained with, by --tokenizer.",
            )
        )


def run_config(
    model: Model.Config,
    *,
    recipe: str,
    data_dir: Optional[str],
    output: str,
    vocab: Optional[Vocabulary],
    max_len: Optional[int],
) -> Any:
    """Returns the config of a trainer: a recipe with another model.

    Args:
        model: The model.
        recipe: The name of the recipe.
        data_dir: Given to the recipe.
        output: The run directory, as the user wrote it; `set_run_dir` moves it.
        vocab: The tokenizer, which will be in the run directory; None: there is none.
        max_len: See `hf.trainer_config`.

    Raises:
        ValueError: If there is no such recipe, or it does not go with the model.
    """
    run_dir, vocab_cfg = os.path.normpath(output), None
    if vocab is not None:
        vocab_cfg = config_for_function(load_vocabulary).set(directory=os.path.join(run_dir, "tokenizer"))
    return hf.trainer_config(
        model,
        recipe=_recipe(recipe)(data_dir=data_dir),
        run_dir=run_dir,
        vocab_cfg=vocab_cfg,
        max_len=max_len,
    )


def _recipe(name: str) -> Any:
    try:
        return registry.find_trainer_config(name)
    except UnknownConfigNameError as e:
        names = [*dict(registry.listed_trainer_configs()), *dict(registry.listed_aliases())]
        raise ValueError(
            error_message(
                where="--recipe",
                what=f"no recipe is called {name!r}",
                nearest=nearest_names(name, names),
                advice=f"Recipes: {registry.some_names(names)}",
            )
        ) from e


def override(cfg: Any, overrides: Sequence[str]) -> list[Override]:
    """Changes the config of a run by --set.

    Args:
        cfg: From `run_config`.
        overrides: "path=value".

    Raises:
        ValueError: If one does not apply, or changes what something else than the config has decided.
    """
    applied = apply_overrides(cfg, list(overrides))
    for change in applied:
        if change.path in _DECIDED and change.new != change.old:
            raise ValueError(
                error_message(
                    where=f"--set {change.text}",
                    what="it cannot be changed here",
                    advice=_DECIDED[change.path],
                )
            )
    return applied
