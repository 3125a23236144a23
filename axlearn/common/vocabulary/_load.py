"""From the folder that a vocabulary was saved in back to it."""

import hashlib
import json
import os
import pathlib
from typing import Any

from axlearn.common.config import error_message
from axlearn.common.vocabulary._base import DESCRIPTION_FILE, Vocabulary
from axlearn.common.vocabulary._hugging_face import HuggingFaceVocabulary
from axlearn.common.vocabulary._sentencepiece import SentencePieceVocabulary


def load_vocabulary(directory: str | os.PathLike[str]) -> Vocabulary:
    """Loads the vocabulary that `Vocabulary.save` wrote.

    Args:
        directory: Where it was written, such as `RUN/tokenizer`.

    Returns:
        A vocabulary equal to the saved one.

    Raises:
        ValueError: If a file is missing, cannot be read as what it should be, or differs from what was saved.
    """
    directory = pathlib.Path(directory)
    try:
        description = json.loads((directory / DESCRIPTION_FILE).read_text(encoding="utf-8"))
        kind = description["class"]
    except (OSError, KeyError, TypeError, ValueError) as e:
        raise _no_vocabulary(directory, e) from e
    loaders = {"sentencepiece": _load_sentencepiece, "hugging_face": _load_hugging_face}
    if kind not in loaders:
        raise ValueError(
            error_message(
                where=f"{directory / DESCRIPTION_FILE}: class",
                what=f"unknown kind of vocabulary {kind!r}",
                expected=" or ".join(map(repr, loaders)),
            )
        )
    try:
        return loaders[kind](directory, description)
    except (OSError, AttributeError, KeyError, TypeError) as e:
        raise _no_vocabulary(directory, e) from e


def _load_sentencepiece(directory: pathlib.Path, description: dict[str, Any]) -> Vocabulary:
    try:
        num_extra_ids, pad_id = int(description["num_extra_ids"]), int(description["pad_id"])
    except ValueError as e:
        raise _no_vocabulary(directory, e) from e
    model = _verified(directory, description["model_file"], sha256=description["sha256"])
    return SentencePieceVocabulary(model, num_extra_ids=num_extra_ids, pad_id=pad_id)


def _load_hugging_face(directory: pathlib.Path, description: dict[str, Any]) -> Vocabulary:
    files = {name: _verified(directory, name, sha256=sha256) for name, sha256 in description["files"].items()}
    return HuggingFaceVocabulary(files, **{key: description[key] for key in ("bos_id", "eos_id", "pad_id")})


def _verified(directory: pathlib.Path, name: str, *, sha256: str) -> bytes:
    """Returns the content of a file that a description names, after comparing its digest."""
    # Only the name counts: a path in a description must not lead out of its folder.
    path = directory / pathlib.PurePath(name).name
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ValueError(
            error_message(
                where=str(path),
                what=f"the tokenizer has changed (SHA-256 {found[:12]}...)",
                expected=f"SHA-256 {sha256[:12]}... as {DESCRIPTION_FILE} records",
                advice="Restore the file from the run it came from.",
            )
        )
    return content


def _no_vocabulary(directory: pathlib.Path, cause: Exception) -> ValueError:
    return ValueError(
        error_message(
            where=str(directory),
            what=f"no vocabulary can be read here ({type(cause).__name__}: {cause})",
            expected=f"{DESCRIPTION_FILE} and the files that it names, as a run writes to RUN/tokenizer",
        )
    )
