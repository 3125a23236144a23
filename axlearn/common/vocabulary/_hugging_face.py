"""The vocabulary backed by a tokenizer.json of Hugging Face's `tokenizers`."""

import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Optional

import numpy as np

from axlearn.common import file_system
from axlearn.common.config import error_message
from axlearn.common.vocabulary._base import DESCRIPTION_FILE, count_prefix_bytes

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
# What may lie beside tokenizer.json and describes the same tokenizer; `save` keeps all of it as it is.
HUGGING_FACE_FILES = (
    TOKENIZER_FILE,
    CONFIG_FILE,
    SPECIAL_TOKENS_FILE,
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def _tokenizers() -> Any:
    """Loads tokenizers, which only text inputs and generation need."""
    import tokenizers

    return tokenizers


class HuggingFaceVocabulary:
    """A vocabulary over one tokenizer.json.

    Text is text: the name of a special token, such as `</s>`, inside of a document is spelled out in ordinary
    pieces and never becomes that token. In a prompt it does, unless tokenizer_config.json says otherwise
    (`split_special_tokens`), as with transformers.
    """

    def __init__(
        self,
        files: Mapping[str, bytes],
        *,
        bos_id: Optional[int] = None,
        eos_id: Optional[int] = None,
        pad_id: Optional[int] = None,
    ):
        """Loads a tokenizer.

        Args:
            files: The content of tokenizer.json and of any other of `HUGGING_FACE_FILES`, by name.
            bos_id: The begin-of-document id where tokenizer_config.json names none; None: the end-of-document
                id.
            eos_id: The end-of-document id where tokenizer_config.json names none; None: it names one.
            pad_id: The padding id where tokenizer_config.json names none; None: the end-of-document id.

        Raises:
            ValueError: If the tokenizer cannot be read, has no end-of-document id, or it is not known how many
                bytes its pieces stand for.
        """
        self._files = {name: files[name] for name in HUGGING_FACE_FILES if name in files}
        self._text = _decoded(self._files[TOKENIZER_FILE])
        self._tokenizer = _loaded(self._text)
        # Nobody who writes a document can put a control token into it.
        self._tokenizer.encode_special_tokens = True
        self._ids: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        named = _special_tokens(self._files)
        eos = self._id_of(named, "eos_token", eos_id)
        if eos is None:
            raise ValueError(
                error_message(
                    where=CONFIG_FILE,
                    what="the tokenizer names no eos_token",
                    expected="the token that ends a document",
                    advice='Add it, such as "eos_token": "</s>".',
                )
            )
        bos, pad = self._id_of(named, "bos_token", bos_id), self._id_of(named, "pad_token", pad_id)
        self._special_ids = {
            "bos_id": eos if bos is None else bos,
            "eos_id": eos,
            "pad_id": eos if pad is None else pad,
        }
        digest = hashlib.sha256(self._files[TOKENIZER_FILE])
        digest.update(json.dumps(self._special_ids).encode("utf-8"))
        self._fingerprint = digest.hexdigest()
        self._piece_num_bytes = self._count_bytes()

    @classmethod
    def from_dir(cls, folder: str | os.PathLike[str], **ids: Optional[int]) -> "HuggingFaceVocabulary":
        """Loads the files of a folder; see `__init__`.

        Raises:
            ValueError: Also if there is no tokenizer.json.
        """
        folder = pathlib.Path(folder)
        if not (folder / TOKENIZER_FILE).is_file():
            raise ValueError(error_message(where=str(folder), what=f"there is no {TOKENIZER_FILE}"))
        try:
            return cls(
                {
                    name: (folder / name).read_bytes()
                    for name in HUGGING_FACE_FILES
                    if (folder / name).is_file()
                },
                **ids,
            )
        except ValueError as e:
            e.add_note(f"While loading the tokenizer in {folder}.")
            raise

    def _id_of(self, named: Mapping[str, str], role: str, default: Optional[int]) -> Optional[int]:
        token = named.get(role)
        if token is None:
            return default
        if token not in self._ids:
            raise ValueError(
                error_message(
                    where=f"{CONFIG_FILE}: {role}",
                    what=f"{token!r} is no token",
                    expected=f"one of the {len(self._ids)} tokens of {TOKENIZER_FILE}",
                )
            )
        return self._ids[token]

    def _count_bytes(self) -> np.ndarray:
        # Models may have a row for padding that the tokenizer knows nothing of.
        num_ids = 1 + max(*self._ids.values(), *self._special_ids.values())
        lengths = np.zeros([num_ids], dtype=np.int32)
        description = json.loads(self._text)
        piece_len = _piece_len_fn(description)
        for piece, i in self._ids.items():
            lengths[i] = piece_len(piece)
        for added in description.get("added_tokens", ()):
            lengths[added["id"]] = 0 if added["special"] else len(added["content"].encode("utf-8"))
        unknown = description["model"].get("unk_token")
        lengths[[*self._special_ids.values(), *([self._ids[unknown]] if unknown in self._ids else [])]] = 0
        return lengths

    @property
    def vocab_size(self) -> int:
        return len(self._piece_num_bytes)

    @property
    def pad_id(self) -> int:
        return self._special_ids["pad_id"]

    @property
    def eos_id(self) -> int:
        return self._special_ids["eos_id"]

    @property
    def bos_id(self) -> int:
        return self._special_ids["bos_id"]

    @functools.cached_property
    def prefix_num_bytes(self) -> int:
        return count_prefix_bytes(self)

    @property
    def files(self) -> Mapping[str, bytes]:
        """The files that it was made from, by name."""
        return self._files

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    @functools.cached_property
    def _prompt_tokenizer(self) -> Any:
        """A second one, in which the names of special tokens may be these tokens."""
        tokenizer = _loaded(self._text)
        config = json.loads(self._files.get(CONFIG_FILE, b"{}"))
        tokenizer.encode_special_tokens = bool(config.get("split_special_tokens", False))
        return tokenizer

    def encode_prompt(self, text: str) -> list[int]:
        """Returns the ids of a prompt, with what the tokenizer puts before a text, such as bos.

        What the tokenizer puts behind a text is left out, since it is to be continued; an empty prompt is the
        begin-of-document id.
        """
        ids = list(self._prompt_tokenizer.encode(text).ids)
        return ids[: len(ids) - self._num_suffix_ids] or [self.bos_id]

    @functools.cached_property
    def _num_suffix_ids(self) -> int:
        """How many ids the tokenizer puts behind a text."""
        is_added = self._prompt_tokenizer.encode("a").special_tokens_mask
        return len(is_added) - len("".join(map(str, is_added)).rstrip("1"))

    def encode_batch(self, texts: Sequence[str], *, num_threads: int = 1) -> list[list[int]]:
        """Returns the ids of several texts.

        Args:
            texts: The texts.
            num_threads: Not for this tokenizer: it takes its threads from RAYON_NUM_THREADS, else one per core.
        """
        del num_threads
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [list(encoding.ids) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        left_out = set(self._special_ids.values())
        known = [i for i in map(int, ids) if i not in left_out and 0 <= i < self.vocab_size]
        return str(self._tokenizer.decode(known, skip_special_tokens=True))

    def piece_num_bytes(self) -> np.ndarray:
        """Returns how many bytes of UTF-8 text each id stands for; special ids stand for none.

        Returns:
            An array [vocab_size] int32.
        """
        return self._piece_num_bytes.copy()

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes the files as they came, and a description, from which `load_vocabulary` makes an equal one.

        Args:
            directory: Made where it is missing.
        """
        directory = pathlib.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        description = {
            "class": "hugging_face",
            "files": {name: hashlib.sha256(content).hexdigest() for name, content in self._files.items()},
            "vocab_size": self.vocab_size,
            **self._special_ids,
        }
        for name, content in self._files.items():
            file_system.write_bytes_durably(directory / name, content)
        file_system.write_text_durably(directory / DESCRIPTION_FILE, json.dumps(description, indent=1) + "\n")


def _decoded(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(
            error_message(where=TOKENIZER_FILE, what=f"the tokenizer cannot be read ({e})")
        ) from e


def _loaded(text: str) -> Any:
    try:
        tokenizer = _tokenizers().Tokenizer.from_str(text)
    except Exception as e:
        # The library raises nothing more precise than Exception.
        raise ValueError(
            error_message(
                where=TOKENIZER_FILE,
                what=f"the tokenizer cannot be read ({e})",
                expected="a file that Hugging Face's tokenizers wrote",
            )
        ) from e
    # Rows are cut and filled elsewhere.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _special_tokens(files: Mapping[str, bytes]) -> dict[str, str]:
    """Returns the texts of bos_token, eos_token and pad_token, as far as the files name them."""
    named: dict[str, str] = {}
    for name in (SPECIAL_TOKENS_FILE, CONFIG_FILE):
        if name not in files:
            continue
        try:
            settings = json.loads(files[name])
            for role in ("bos_token", "eos_token", "pad_token"):
                token = settings.get(role)
                token = token["content"] if isinstance(token, dict) else token
                if isinstance(token, str):
                    named[role] = token
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as e:
            raise ValueError(
                error_message(where=name, what=f"it cannot be read ({type(e).__name__}: {e})")
            ) from e
    return named


def _steps(description: Optional[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Yields the steps of a decoder, those of sequences one by one."""
    if not description:
        return
    if description["type"] == "Sequence":
        for step in description["decoders"]:
            yield from _steps(step)
    else:
        yield description


def _kind(step: Mapping[str, Any]) -> str:
    if step["type"] == "Replace" and "String" not in step["pattern"]:
        return "Replace by regular expression"
    return str(step["type"])


def _piece_len_fn(description: Mapping[str, Any]) -> Any:
    """Returns the function from a piece to its number of bytes, by how the tokenizer decodes."""
    steps = list(_steps(description.get("decoder")))
    kinds = {_kind(step) for step in steps}
    if "ByteLevel" in kinds:
        # Each character stands for one byte.
        return len
    if unknown := kinds - {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        raise ValueError(
            error_message(
                where=f"{TOKENIZER_FILE}: decoder",
                what=f"it is not known how many bytes the pieces of a {sorted(unknown)[0]} decoder stand for",
                expected="a byte-level tokenizer, or one that falls back to bytes",
            )
        )
    replaced = [(step["pattern"]["String"], step["content"]) for step in steps if step["type"] == "Replace"]
    replaced += [(step["replacement"], " ") for step in steps if step["type"] == "Metaspace"]
    byte_pieces = {f"<0x{byte:02X}>" for byte in range(256)} if "ByteFallback" in kinds else set()

    def piece_len(piece: str) -> int:
        if piece in byte_pieces:
            return 1
        for old, new in replaced:
            piece = piece.replace(old, new)
        return len(piece.encode("utf-8"))

    return piece_len
