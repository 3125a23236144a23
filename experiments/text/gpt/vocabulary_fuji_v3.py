"""The tokenizer of fuji's version 3 with tiktoken: Llama 3's, or any other tokenizers JSON of Hugging Face."""

import json
import pathlib
from collections.abc import Sequence
from typing import Optional

from axlearn.common.config import REQUIRED, Configurable, Required, config_class, error_message
from axlearn.common.vocabulary import HUGGING_FACE_FILES, TOKENIZER_FILE, HuggingFaceVocabulary
from axlearn.experiments.text.common import find_tokenizer

# Llama 3's names, and those of other families: the first that the tokenizer has. In Llama 3's tokenizer their ids
# are 128001 and 128004 (https://arxiv.org/abs/2407.21783).
_EOS_TOKENS = ("<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>")
_PAD_TOKENS = ("<|finetune_right_pad_id|>", "<pad>", "<|pad|>")
_BOS_TOKENS = ("<|begin_of_text|>", "<s>", "<bos>")


class FujiV3Vocabulary(HuggingFaceVocabulary, Configurable):
    """A `HuggingFaceVocabulary` that is found by name in `DATA_DIR/tokenizers/hf`."""

    @config_class
    class Config(Configurable.Config):
        # Name of a tokenizers JSON, such as Llama-3-tokenizer.json, or of a folder with a tokenizer.json and the
        # files that belong to it.
        filename: Required[str] = REQUIRED
        # The token that ends a document. None: what tokenizer_config.json says, else Llama 3's, else that of
        # another family.
        eos_token: Optional[str] = None
        # The token behind the last one of a row. None: likewise, else that which ends a document.
        pad_token: Optional[str] = None

    def __init__(self, cfg: Config):
        """Finds and loads the tokenizer.

        Raises:
            ValueError: If it is in neither place, cannot be read, or has no token that ends a document.
        """
        Configurable.__init__(self, cfg)
        path = find_tokenizer(
            cfg.filename,
            kind="hf",
            where="filename",
            expected="a tokenizers JSON",
            advice="Put the file there: the tokenizer.json of a model on Hugging Face (Llama 3's needs Meta's "
            "licence), or one that tokenizers has written: Tokenizer.save('{path}').",
        )
        files = _files(path)
        ids = _token_ids(files[TOKENIZER_FILE])
        if cfg.eos_token is not None or cfg.pad_token is not None:
            # What is named here goes before what the tokenizer's own files name.
            files = {TOKENIZER_FILE: files[TOKENIZER_FILE]}
        eos_id = _first(ids, _EOS_TOKENS, named=cfg.eos_token, field="eos_token")
        try:
            HuggingFaceVocabulary.__init__(
                self,
                files,
                bos_id=_first(ids, _BOS_TOKENS),
                eos_id=eos_id,
                pad_id=_first(ids, _PAD_TOKENS, named=cfg.pad_token, field="pad_token"),
            )
        except ValueError as e:
            e.add_note(
                f"While loading {path}" + (", or name it with eos_token." if ids and eos_id is None else ".")
            )
            raise


def _files(path: pathlib.Path) -> dict[str, bytes]:
    if not path.is_dir():
        return {TOKENIZER_FILE: path.read_bytes()}
    files = {name: (path / name).read_bytes() for name in HUGGING_FACE_FILES if (path / name).is_file()}
    if TOKENIZER_FILE not in files:
        raise ValueError(error_message(where=str(path), what=f"there is no {TOKENIZER_FILE}"))
    return files


def _token_ids(tokenizer_json: bytes) -> dict[str, int]:
    """Returns the ids of the tokens by their texts; none where the file is no tokenizer, which is found later."""
    try:
        tokenizer = json.loads(tokenizer_json)
        vocab = tokenizer["model"].get("vocab", {})
        ids = dict(vocab) if isinstance(vocab, dict) else {piece: i for i, (piece, _) in enumerate(vocab)}
        return {**ids, **{added["content"]: added["id"] for added in tokenizer.get("added_tokens") or ()}}
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
        return {}


def _first(
    ids: dict[str, int], candidates: Sequence[str], *, named: Optional[str] = None, field: str = ""
) -> Optional[int]:
    if named is None:
        return next((ids[token] for token in candidates if token in ids), None)
    if named not in ids:
        raise ValueError(
            error_message(
                where=field,
                what=f"{named!r} is no token",
                expected=f"one of the {len(ids)} tokens of the tokenizer",
            )
        )
    return ids[named]
