"""The token ids of a corpus, computed once and read through the page cache ever after."""

import hashlib
import json
import logging
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from axlearn.common import file_system
from axlearn.common.text_corpus._corpus import Document, TextCorpus
from axlearn.common.vocabulary import Vocabulary

# Raise when the meaning of the files changes; caches of other versions are left alone and not read.
_FORMAT_VERSION = 2
_MANIFEST = "MANIFEST.json"
_TOKENS = "tokens.bin"
_OFFSETS = "offsets.npy"
_NUM_BYTES = "num_bytes.npy"
_PREFIX_NUM_BYTES = "prefix_num_bytes.npy"
_NAMES = "names.json"
_FILES = (_TOKENS, _OFFSETS, _NUM_BYTES, _PREFIX_NUM_BYTES, _NAMES)

# Texts are handed to the tokenizer's threads in portions of about this many characters, which bounds memory.
_PORTION_CHARS = 4_000_000


class TokenCache(NamedTuple):
    """The tokens of every document of a corpus, each document closed by the end-of-document id."""

    # Digest of everything that the tokens depend on: names, contents, tokenizer, format.
    fingerprint: str
    # Name of each document.
    names: tuple[str, ...]
    # Ids of all documents one after the other, [num_tokens] uint16 or uint32, mapped from the file.
    tokens: np.ndarray
    # Where each document starts in `tokens`, and where the last one ends, [num_documents + 1] int64.
    offsets: np.ndarray
    # Size of each document's text in UTF-8, [num_documents] int64.
    num_bytes: np.ndarray
    # Bytes that each document's pieces stand for beyond its text: of a space that the tokenizer puts before it,
    # [num_documents] int32, mostly zeros.
    prefix_num_bytes: np.ndarray


class _CorruptCacheError(ValueError):
    """A cache folder whose content is not what its manifest says."""


def open_token_cache(
    corpus: TextCorpus, *, vocab: Vocabulary, cache_dir: str | os.PathLike[str] | None = None
) -> TokenCache:
    """Returns the tokens of a corpus, computing them where no cache has them.

    A cache folder that does not verify is thrown away with a warning and made anew.

    Args:
        corpus: The documents.
        vocab: Their tokenizer.
        cache_dir: Where caches are kept; None: `tokens` in the user's cache directory.

    Raises:
        ValueError: If the corpus cannot be read.
    """
    fingerprint = _fingerprint(corpus, vocab)
    root = pathlib.Path(cache_dir) if cache_dir else pathlib.Path(file_system.cache_dir()) / "tokens"
    folder = root / fingerprint[:32]
    if folder.exists():
        try:
            return _read(folder, fingerprint=fingerprint)
        except _CorruptCacheError as e:
            logging.warning("The token cache %s is thrown away and made anew: %s", folder, e)
            shutil.rmtree(folder)
    started = time.monotonic()
    _build(folder, corpus=corpus, vocab=vocab, fingerprint=fingerprint)
    cache = _read(folder, fingerprint=fingerprint)
    logging.info(
        "Tokenised %s in %.1f s: %d documents, %d bytes, %d tokens: %s",
        corpus.name,
        time.monotonic() - started,
        len(cache.names),
        cache.num_bytes.sum(),
        len(cache.tokens),
        folder,
    )
    return cache


def _fingerprint(corpus: TextCorpus, vocab: Vocabulary) -> str:
    parts = {"format": _FORMAT_VERSION, "corpus": corpus.fingerprint(), "tokenizer": vocab.fingerprint}
    return hashlib.sha256(json.dumps(parts).encode("utf-8")).hexdigest()


def _build(folder: pathlib.Path, *, corpus: TextCorpus, vocab: Vocabulary, fingerprint: str) -> None:
    """Writes a cache beside its final place and renames it, so that readers see all of it or nothing."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    attempt = pathlib.Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp-", dir=folder.parent))
    try:
        manifest = _write_arrays(attempt, corpus=corpus, vocab=vocab)
        manifest["fingerprint"] = fingerprint
        manifest["files"] = {
            name: {"size": (attempt / name).stat().st_size, "sha256": _sha256(attempt / name)}
            for name in _FILES
        }
        file_system.write_text_durably(attempt / _MANIFEST, json.dumps(manifest, indent=1) + "\n")
        try:
            attempt.rename(folder)
        except OSError:
            # Another process may have finished the same cache first; then theirs is as good.
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(attempt, ignore_errors=True)


def _write_arrays(folder: pathlib.Path, *, corpus: TextCorpus, vocab: Vocabulary) -> dict[str, Any]:
    """Tokenises the corpus into the cache's files and returns the manifest's facts about them."""
    dtype = np.dtype(np.uint16 if vocab.vocab_size <= 2**16 else np.uint32)
    piece_num_bytes = vocab.piece_num_bytes()
    lengths, prefixes, inexact = [], [], 0
    with open(folder / _TOKENS, "wb") as tokens_file:
        for document, ids in _tokenised(corpus, vocab):
            surplus = int(piece_num_bytes[ids].sum()) - document.num_bytes
            # Some tokenizers put the space only before texts that do not begin with one.
            prefixes.append(surplus if surplus == vocab.prefix_num_bytes else 0)
            inexact += surplus != prefixes[-1]
            tokens_file.write(np.asarray([*ids, vocab.eos_id], dtype=dtype).tobytes())
            lengths.append(len(ids) + 1)
    if inexact:
        logging.warning(
            "The tokenizer changes the text of %d of %d documents of %s, and does not keep their bytes: "
            "losses per byte will count the bytes of the changed text.",
            inexact,
            len(lengths),
            corpus.name,
        )
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    np.save(folder / _OFFSETS, offsets)
    np.save(folder / _NUM_BYTES, np.asarray([d.num_bytes for d in corpus.documents], dtype=np.int64))
    np.save(folder / _PREFIX_NUM_BYTES, np.asarray(prefixes, dtype=np.int32))
    (folder / _NAMES).write_text(json.dumps([d.name for d in corpus.documents]), encoding="utf-8")
    return {
        "format": _FORMAT_VERSION,
        "corpus": corpus.name,
        "corpus_fingerprint": corpus.fingerprint(),
        "tokenizer_fingerprint": vocab.fingerprint,
        "dtype": dtype.name,
        "num_documents": len(lengths),
        "num_tokens": int(offsets[-1]),
        "num_bytes": sum(d.num_bytes for d in corpus.documents),
        "documents_with_inexact_bytes": inexact,
        "skipped": [list(s) for s in corpus.skipped],
    }


def _tokenised(corpus: TextCorpus, vocab: Vocabulary) -> Iterator[tuple[Document, list[int]]]:
    """Yields each document with its ids, tokenising a portion of them at a time."""
    portion: list[tuple[Document, str]] = []
    num_chars = 0
    for document in corpus.documents:
        text = corpus.read(document)
        portion.append((document, text))
        num_chars += len(text)
        if num_chars >= _PORTION_CHARS:
            yield from _encode_portion(portion, vocab)
            portion, num_chars = [], 0
    yield from _encode_portion(portion, vocab)


def _encode_portion(
    portion: list[tuple[Document, str]], vocab: Vocabulary
) -> Iterator[tuple[Document, list[int]]]:
    encoded = vocab.encode_batch([text for _, text in portion], num_threads=os.cpu_count() or 1)
    for (document, _), ids in zip(portion, encoded, strict=True):
        yield document, ids


def _read(folder: pathlib.Path, *, fingerprint: str) -> TokenCache:
    """Opens a cache after checking every file against the manifest."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        if manifest["fingerprint"] != fingerprint:
            raise _CorruptCacheError(f"{_MANIFEST} belongs to another corpus or tokenizer")
        for name in _FILES:
            recorded = manifest["files"][name]
            if (folder / name).stat().st_size != recorded["size"]:
                raise _CorruptCacheError(f"{name} has another size than {_MANIFEST} says")
            if _sha256(folder / name) != recorded["sha256"]:
                raise _CorruptCacheError(f"{name} has another content than {_MANIFEST} says")
        dtype = np.dtype({"uint16": np.uint16, "uint32": np.uint32}[manifest["dtype"]])
        names = tuple(json.loads((folder / _NAMES).read_text(encoding="utf-8")))
    except _CorruptCacheError:
        raise
    except (OSError, KeyError, TypeError, ValueError) as e:
        # Not only what is no JSON: bytes that are not UTF-8 are a ValueError too.
        raise _CorruptCacheError(f"{type(e).__name__}: {e}") from e
    return TokenCache(
        fingerprint=fingerprint,
        names=names,
        tokens=np.memmap(folder / _TOKENS, dtype=dtype, mode="r"),
        offsets=np.load(folder / _OFFSETS),
        num_bytes=np.load(folder / _NUM_BYTES),
        prefix_num_bytes=np.load(folder / _PREFIX_NUM_BYTES),
    )


def _sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
