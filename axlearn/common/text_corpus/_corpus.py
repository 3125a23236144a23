"""A corpus: named files of text, the split of their names, and a digest of what was read."""

import enum
import functools
import hashlib
import json
import logging
import pathlib
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

from axlearn.common.config import error_message

OnUnreadable = Literal["skip", "error"]


class Split(enum.Enum):
    """The two parts of a corpus. No document is in both."""

    TRAIN = "train"
    HELDOUT = "heldout"


class Document(NamedTuple):
    """One file of a corpus that is part of the data."""

    # Path below the corpus' root, with forward slashes; unique in the corpus.
    name: str
    # Where the file lies.
    path: pathlib.Path
    # Size of the text in UTF-8.
    num_bytes: int
    # SHA-256 of the file's content.
    sha256: str


class Skipped(NamedTuple):
    """One file of a corpus that is not part of the data, and why."""

    name: str
    reason: str


class _Scan(NamedTuple):
    documents: tuple[Document, ...]
    skipped: tuple[Skipped, ...]


def is_heldout(name: str, *, heldout_percent: float) -> bool:
    """Says whether a document is held out, which depends on its name alone.

    Adding, removing or editing other documents never moves one from one split to the other.

    Args:
        name: The document's name in its corpus.
        heldout_percent: Share of the names to hold out, in percent, 0 to 100.
    """
    bucket = int.from_bytes(hashlib.sha256(name.encode("utf-8")).digest()[:8], "big")
    return bucket * 100 < heldout_percent * 2**64


class TextCorpus:
    """Files of UTF-8 text under stable names, in the order of those names.

    Nothing is read before it is needed. Empty files and exact copies of an earlier file are left out, so that
    no text stands on both sides of the split.
    """

    def __init__(
        self,
        *,
        name: str,
        files: Mapping[str, pathlib.Path],
        heldout_percent: float,
        on_unreadable: OnUnreadable = "skip",
    ):
        """Describes a corpus.

        Args:
            name: What messages call it.
            files: Path of each file by the document's name.
            heldout_percent: Share of the documents, chosen by name, that is held out, in percent.
            on_unreadable: "skip" leaves out files that cannot be read or are not UTF-8, counting and logging
                them; "error" refuses the corpus.

        Raises:
            ValueError: If there are no files, or `heldout_percent` is not a percentage.
        """
        if not files:
            raise ValueError(
                error_message(what=f"the corpus {name} has no files", expected="at least one file of text")
            )
        if not 0 <= heldout_percent < 100:
            raise ValueError(
                error_message(
                    where="heldout_percent",
                    what=f"{heldout_percent!r} is not a share of the documents to hold out",
                    expected="a number from 0 to below 100",
                )
            )
        self.name = name
        self.heldout_percent = heldout_percent
        self._files = dict(sorted(files.items()))
        self._on_unreadable = on_unreadable

    @functools.cached_property
    def _scan(self) -> _Scan:
        documents: list[Document] = []
        skipped: list[Skipped] = []
        first_with: dict[str, str] = {}
        for name, path in self._files.items():
            try:
                content = path.read_bytes()
                content.decode("utf-8")
            except (OSError, UnicodeDecodeError) as e:
                if self._on_unreadable == "error":
                    raise ValueError(
                        error_message(
                            where=str(path),
                            what=f"cannot be read as UTF-8 text ({e})",
                            expected="a readable file in UTF-8",
                            advice="Convert or remove it, or set on_unreadable='skip'.",
                        )
                    ) from e
                skipped.append(Skipped(name, f"unreadable: {e}"))
                continue
            sha256 = hashlib.sha256(content).hexdigest()
            if not content:
                skipped.append(Skipped(name, "empty"))
            elif sha256 in first_with:
                skipped.append(Skipped(name, f"same text as {first_with[sha256]}"))
            else:
                first_with[sha256] = name
                documents.append(Document(name, path, len(content), sha256))
        self._log_skipped(skipped)
        if not documents:
            raise ValueError(
                error_message(
                    where=self.name,
                    what=f"none of the {len(self._files)} files of the corpus holds text",
                    expected="at least one non-empty file in UTF-8",
                    advice=f"The first: {skipped[0].name} ({skipped[0].reason}).",
                )
            )
        return _Scan(tuple(documents), tuple(skipped))

    def _log_skipped(self, skipped: list[Skipped]) -> None:
        unreadable = [s for s in skipped if s.reason.startswith("unreadable")]
        if unreadable:
            shown = "; ".join(f"{s.name} ({s.reason})" for s in unreadable[:3])
            logging.warning(
                "%s: skipped %d unreadable of %d files: %s%s",
                self.name,
                len(unreadable),
                len(self._files),
                shown,
                "; ..." if len(unreadable) > 3 else "",
            )

    @property
    def documents(self) -> tuple[Document, ...]:
        """The documents of both splits, by name. Reads the files the first time."""
        return self._scan.documents

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """The files that are not part of the data, with the reason. Reads the files the first time."""
        return self._scan.skipped

    def split_of(self, name: str) -> Split:
        """Returns the split that a document is in."""
        heldout = is_heldout(name, heldout_percent=self.heldout_percent)
        return Split.HELDOUT if heldout else Split.TRAIN

    def read(self, document: Document) -> str:
        """Returns the text of a document.

        Raises:
            ValueError: If the file has changed since the corpus was first read.
        """
        content = document.path.read_bytes()
        if hashlib.sha256(content).hexdigest() != document.sha256:
            raise ValueError(
                error_message(
                    where=str(document.path),
                    what="the file has changed while the corpus was being read",
                    expected=f"the content with SHA-256 {document.sha256[:12]}...",
                    advice="Start again when nothing writes to the corpus.",
                )
            )
        return content.decode("utf-8")

    def texts(self, *, split: Split) -> Iterator[str]:
        """Yields the texts of one split, by document name."""
        for document in self.documents:
            if self.split_of(document.name) is split:
                yield self.read(document)

    def fingerprint(self, *, split: Split | None = None) -> str:
        """Returns a digest of names and contents.

        Args:
            split: Only the documents of this split; None: all.

        Returns:
            A SHA-256 in hexadecimal, equal exactly when names and contents are.
        """
        listed = [
            [d.name, d.sha256] for d in self.documents if split is None or self.split_of(d.name) is split
        ]
        return hashlib.sha256(json.dumps(listed).encode("utf-8")).hexdigest()
