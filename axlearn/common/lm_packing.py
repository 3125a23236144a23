"""Packing documents into rows: which tokens stand in which row of which epoch, as a pure function.

An epoch lays all documents, in an order of its own, one behind the other and cuts that line into rows of
equal length. Every token of every document is a target exactly once per epoch. Nothing is remembered from row
to row: a row is found by bisection, so a run can start at any step.

A document of n tokens is n + 1 targets, the last of them its end. The input at a target is the token before
it, and at the first target the begin-of-document id.
"""

from typing import NamedTuple, Optional

import numpy as np
from jaxtyping import Int, Int32, Int64, UInt

# A label that is not a target.
IGNORED_LABEL = -1


class PackedRow(NamedTuple):
    """One training example."""

    # The token before each target; pad behind the last one.
    input_ids: Int32[np.ndarray, " seq_len"]
    # The token to predict; negative where there is none.
    target_labels: Int32[np.ndarray, " seq_len"]
    # 1, 2, ... by the piece of a document that a position belongs to; 0: padding.
    input_segment_ids: Int32[np.ndarray, " seq_len"]
    # Counted from 0 in each piece; 0 in padding.
    input_positions: Int32[np.ndarray, " seq_len"]
    # Bytes of text that the targets of this row stand for.
    target_num_bytes: np.int32


class PackedDocuments:
    """Documents of one split, to be packed into rows.

    Attributes:
        max_len: Number of positions of a row.
        num_rows: Number of rows of an epoch; the last row of the line is filled up with padding.
        num_targets: Number of targets of an epoch.
    """

    def __init__(
        self,
        *,
        tokens: UInt[np.ndarray, " num_tokens"],
        starts: Int64[np.ndarray, " num_documents"],
        lengths: Int64[np.ndarray, " num_documents"],
        piece_num_bytes: Int32[np.ndarray, " vocab_size"],
        max_len: int,
        bos_id: int,
        pad_id: int,
        prefix_num_bytes: Optional[Int32[np.ndarray, " num_documents"]] = None,
    ):
        """Describes the documents.

        Args:
            tokens: The targets of the documents, in any order; other things may stand between.
            starts: Where each document's first target stands in `tokens`.
            lengths: How many targets each document has, at least 1.
            piece_num_bytes: Bytes of text of each token id.
            max_len: Number of positions of a row.
            bos_id: Input at the first target of each document.
            pad_id: Input where a row has no target.
            prefix_num_bytes: Bytes that the pieces of each document stand for beyond its text, because the
                tokenizer puts a space before it; they count as none of the first target's. None: there are none.
        """
        self.max_len = max_len
        self.num_targets = int(lengths.sum())
        self.num_rows = -(-self.num_targets // max_len)
        self._tokens = tokens
        self._starts = starts
        self._lengths = lengths
        self._piece_num_bytes = piece_num_bytes
        self._prefix_num_bytes = prefix_num_bytes
        self._bos_id = bos_id
        self._pad_id = pad_id

    def epoch(self, *, seed: int, epoch: int) -> "PackedEpoch":
        """Returns the rows of an epoch in the order in which they are to be seen.

        Args:
            seed: Chooses the order, together with `epoch`.
            epoch: Counted from 0.
        """
        # Two orders: documents are shuffled so that pieces meet other neighbours in every epoch; rows are
        # shuffled so that the rows of one long document do not follow each other.
        document_order = permutation(len(self._lengths), key=(seed, epoch, 0))
        row_order = permutation(self.num_rows, key=(seed, epoch, 1))
        return PackedEpoch(self, document_order=document_order, row_order=row_order)

    def row(self, pieces: list[tuple[int, int, int]]) -> PackedRow:
        """Returns the row made of pieces of documents.

        Args:
            pieces: Of each piece: index of the document, its first target, the end of its targets. None at
                all: a row of padding.
        """
        input_ids = np.full([self.max_len], self._pad_id, dtype=np.int32)
        target_labels = np.full([self.max_len], IGNORED_LABEL, dtype=np.int32)
        segment_ids = np.zeros([self.max_len], dtype=np.int32)
        positions = np.zeros([self.max_len], dtype=np.int32)
        at = 0
        for segment_id, (document, first, end) in enumerate(pieces, start=1):
            start = self._starts[document]
            here = slice(at, at + end - first)
            target_labels[here] = self._tokens[start + first : start + end]
            input_ids[at + 1 : here.stop] = target_labels[at : here.stop - 1]
            input_ids[at] = self._bos_id if first == 0 else self._tokens[start + first - 1]
            segment_ids[here] = segment_id
            positions[here] = np.arange(end - first)
            at = here.stop
        num_bytes = self._piece_num_bytes[target_labels[:at]].sum()
        if self._prefix_num_bytes is not None:
            begun = [document for document, first, _ in pieces if first == 0]
            num_bytes -= self._prefix_num_bytes[begun].sum()
        return PackedRow(input_ids, target_labels, segment_ids, positions, np.int32(num_bytes))


class PackedEpoch:
    """The rows of one epoch; see `PackedDocuments.epoch`."""

    def __init__(
        self,
        documents: PackedDocuments,
        *,
        document_order: Int[np.ndarray, " num_documents"],
        row_order: Int[np.ndarray, " num_rows"],
    ):
        self._documents = documents
        self._document_order = document_order
        self._row_order = row_order
        # Where each document ends on the line of all documents.
        self._ends = np.cumsum(documents._lengths[document_order])

    def __getitem__(self, index: int) -> PackedRow:
        """Returns the row that is seen at place `index` of this epoch, 0 <= index < num_rows."""
        return self._documents.row(self._pieces(int(self._row_order[index])))

    def _pieces(self, row: int) -> list[tuple[int, int, int]]:
        """Returns the pieces of documents between two cuts of the line."""
        max_len = self._documents.max_len
        at, stop = row * max_len, min((row + 1) * max_len, self._documents.num_targets)
        place = int(np.searchsorted(self._ends, at, side="right"))
        pieces = []
        while at < stop:
            document = int(self._document_order[place])
            begin = int(self._ends[place] - self._documents._lengths[document])
            end = min(int(self._ends[place]), stop)
            pieces.append((document, at - begin, end - begin))
            at, place = end, place + 1
        return pieces


def permutation(n: int, *, key: tuple[int, ...]) -> Int[np.ndarray, " n"]:
    """Returns a permutation of n things as a function of `key` alone.

    It is made of the raw bits of a counter-based generator, which numpy promises to keep; its `permutation`
    method may change between versions of numpy, and with it every run.

    Reference:
        Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011), and NumPy enhancement proposal
        19.
    """
    bits = np.random.Philox(np.random.SeedSequence(key)).random_raw(n)
    return np.argsort(bits, kind="stable")
