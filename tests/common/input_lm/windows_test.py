"""What is a target in which row, against formulas of a few lines."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axlearn.common.input_lm._windows import EvalWindow, PackedWindow, Tokenized, Tokenizer, packed_window
from axlearn.common.vocabulary import SentencePieceVocabulary, train_sentencepiece

EOS, PAD = 1, 0


def documents_of(lengths):
    """Documents whose ids are all different, of one to three bytes each."""
    next_id, documents = 10, []
    for length in lengths:
        ids = np.arange(next_id, next_id + length, dtype=np.int32)
        documents.append(Tokenized(np.append(ids, np.int32(EOS)), np.append(ids % 3 + 1, np.int32(0))))
        next_id += length
    return documents


def packed(lengths, *, max_len, max_padding_fraction=1.0):
    return PackedWindow(
        documents_of(lengths),
        max_len=max_len,
        max_padding_fraction=max_padding_fraction,
        with_segments=True,
        eos_id=EOS,
        pad_id=PAD,
    )


def targets(rows):
    return np.concatenate(
        [np.zeros([0], int), *(row["target_labels"][row["target_labels"] >= 0] for row in rows)]
    )


_LENGTHS = st.lists(st.integers(1, 13), min_size=0, max_size=6)


@settings(max_examples=60, deadline=None)
@given(lengths=_LENGTHS, max_len=st.integers(1, 9))
def test_every_token_of_every_document_is_a_target_exactly_once_and_in_order(lengths, max_len):
    window = packed(lengths, max_len=max_len)
    rows = [window[i] for i in range(len(window))]
    line = np.concatenate([np.zeros([0], int), *(document.ids for document in documents_of(lengths))])
    np.testing.assert_array_equal(targets(rows), line)
    num_bytes = sum(int(document.num_bytes.sum()) for document in documents_of(lengths))
    assert sum(int(row["target_num_bytes"]) for row in rows) == num_bytes
    inputs = np.concatenate([np.zeros([0], int), *(row["input_ids"] for row in rows)])[: len(line)]
    np.testing.assert_array_equal(inputs, np.concatenate([[EOS], line])[: len(line)])


@settings(max_examples=60, deadline=None)
@given(lengths=_LENGTHS, max_len=st.integers(1, 9))
def test_segments_and_positions_say_which_document_a_target_is_of(lengths, max_len):
    window = packed(lengths, max_len=max_len)
    owner = np.repeat(np.arange(len(lengths)), np.asarray(lengths, int) + 1)
    for i in range(len(window)):
        row, here = window[i], owner[i * max_len : (i + 1) * max_len]
        segments, positions = row["input_segment_ids"], row["input_positions"]
        np.testing.assert_array_equal(segments[: len(here)] - 1, here - here[0])
        for segment in range(1, segments.max() + 1):
            np.testing.assert_array_equal(
                positions[segments == segment], np.arange(np.sum(segments == segment))
            )
        assert not segments[len(here) :].any()
        assert not positions[len(here) :].any()


@pytest.mark.parametrize(("fraction", "num_rows"), [(0.0, 2), (0.49, 2), (0.5, 3), (1.0, 3)])
def test_a_last_row_with_more_padding_than_allowed_is_dropped(fraction, num_rows):
    # 2 whole rows of 8 and one with 4 of 8.
    window = packed([9, 9], max_len=8, max_padding_fraction=fraction)
    assert len(window) == num_rows
    if num_rows == 3:
        assert np.sum(window[2]["target_labels"] < 0) == 4
        np.testing.assert_array_equal(window[2]["input_ids"][4:], PAD)


def test_no_documents_are_no_rows():
    assert len(packed([], max_len=4)) == 0


@settings(max_examples=60, deadline=None)
@given(lengths=_LENGTHS, max_len=st.integers(1, 9), data=st.data())
def test_for_evaluation_every_target_counts_once_behind_all_the_context_there_is(lengths, max_len, data):
    stride = data.draw(st.integers(1, max_len))
    documents = documents_of(lengths)
    window = EvalWindow(documents, max_len=max_len, stride=stride, eos_id=EOS, pad_id=PAD)
    rows = [window[i] for i in range(len(window))]
    line = np.concatenate([np.zeros([0], int), *(document.ids for document in documents)])
    np.testing.assert_array_equal(targets(rows), line)
    assert sum(int(row["target_num_bytes"]) for row in rows) == sum(int(d.num_bytes.sum()) for d in documents)
    for row in rows:
        live = np.flatnonzero(row["target_labels"] >= 0)
        # The first target of a row is that of a document, or has at least max_len - stride of context.
        assert live[0] == (0 if row["input_ids"][0] == EOS else max_len - stride)
        np.testing.assert_array_equal(row["input_ids"][live[1:]], row["target_labels"][live[:-1]])


TEXTS = ["one line\nand two\n", "", "  spaces  \n\n", "naïve größe\n日本\n", "\n", "<n>"]


@pytest.fixture(scope="module")
def plain_vocab():
    lines = [line for text in TEXTS for line in text.split("\n")] + ["abcdefghijklmnopqrstuvwxyz <n>"] * 30
    return SentencePieceVocabulary(train_sentencepiece(lines, vocab_size=300))


def _trained(texts, **kwargs):
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, model_type="bpe", vocab_size=310, byte_fallback=True,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2, **kwargs,
    )  # fmt: skip
    return SentencePieceVocabulary(model.getvalue())


def test_bytes_are_those_of_the_text_whatever_the_tokenizer_sees(plain_vocab):
    # As C4's own tokenizers are: a space before every text, and a piece for newlines.
    with_piece = _trained(
        ["abc def ghi one line and two spaces naïve größe"] * 30,
        user_defined_symbols=["<n>"],
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )
    assert with_piece.prefix_num_bytes == 1
    for vocab, newline in ((plain_vocab, "\n"), (with_piece, "<n>")):
        documents = Tokenizer(vocab, replace_newlines_with=newline)([{"text": text} for text in TEXTS[:5]])
        sizes = [len(text.encode("utf-8")) for text in TEXTS[:5] if text]
        assert [int(document.num_bytes.sum()) for document in documents] == sizes
        assert all(document.ids[-1] == vocab.eos_id for document in documents)


def test_a_newline_without_a_piece_of_its_own_counts_as_it_is_spelled(plain_vocab):
    if len(plain_vocab.encode("<n>")) == 1:
        pytest.skip("this training made it a piece")
    (document,) = Tokenizer(plain_vocab, replace_newlines_with="<n>")([{"text": "a\nb"}])
    assert int(document.num_bytes.sum()) == 5


def test_texts_may_be_bytes_and_what_is_no_utf8_is_replaced_and_reported(plain_vocab, caplog):
    tokenizer = Tokenizer(plain_vocab)
    (from_bytes,) = tokenizer([{"text": "größe".encode()}])
    (from_text,) = tokenizer([{"text": "größe"}])
    np.testing.assert_array_equal(from_bytes.ids, from_text.ids)
    (broken,) = tokenizer([{"text": b"gr\xff"}])
    assert plain_vocab.decode(broken.ids.tolist()) == "gr\ufffd"


def test_ids_can_be_adjusted(plain_vocab):
    tokenizer = Tokenizer(plain_vocab, token_adjuster=lambda ids: ids[:2])
    window = packed_window(tokenizer, max_len=4, max_padding_fraction=1.0, with_segments=False)(
        [{"text": "one line"}, {"text": "two"}]
    )
    first = plain_vocab.encode("one line")[:2]
    np.testing.assert_array_equal(window[0]["target_labels"][:3], [*first, plain_vocab.eos_id])
    assert set(window[0]) == {"input_ids", "target_labels", "target_num_bytes"}
