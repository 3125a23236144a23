"""Nothing is lost between text and ids, and a saved vocabulary comes back equal."""

import json

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from axlearn.common.vocabulary import (
    SentencePieceVocabulary,
    Vocabulary,
    load_vocabulary,
    train_sentencepiece,
)

LINES = ["def f(self, x):", "    return x + 12", "\tif x is None:", "        raise ValueError('no x')"] * 8
MODEL = train_sentencepiece(LINES, vocab_size=330)
VOCAB = SentencePieceVocabulary(MODEL)


@settings(max_examples=300, deadline=None)
@given(text=st.text())
@example("\n\n\tif x:\r\n        return  '\u2581 \u2581\u2581'  \n")
@example("\x00\x01\u2585 \ufffd\u2047 <s></s><pad><unk><0x0A> \U0001f600 e\u0301 \u00a0\u3000")
@example("")
@example(" ")
def test_any_text_comes_back_as_it_was(text):
    ids = VOCAB.encode(text)
    assert VOCAB.decode(ids) == text
    assert all(0 <= i < VOCAB.vocab_size for i in ids)
    assert VOCAB.piece_num_bytes()[ids].sum() == len(text.encode("utf-8"))


@settings(max_examples=30, deadline=None)
@given(texts=st.lists(st.text(), max_size=5))
@example(["a\u2581b", "plain", ""])
def test_a_batch_is_encoded_like_its_texts(texts):
    assert VOCAB.encode_batch(texts, num_threads=2) == [VOCAB.encode(text) for text in texts]


def test_special_ids_are_the_conventional_ones_and_stand_for_no_text():
    assert (VOCAB.pad_id, VOCAB.eos_id, VOCAB.bos_id, VOCAB.vocab_size) == (0, 1, 2, 330)
    assert VOCAB.decode([2, *VOCAB.encode("x = 1"), 1, 0, 0]) == "x = 1"
    assert VOCAB.piece_num_bytes()[:4].tolist() == [0, 0, 0, 0]
    assert VOCAB.piece_num_bytes().dtype == np.int32
    assert isinstance(VOCAB, Vocabulary)


def test_words_and_indentation_have_pieces():
    processor = sentencepiece.SentencePieceProcessor(model_proto=MODEL)
    assert len(VOCAB.encode("        return")) <= 4
    assert processor.id_to_piece(VOCAB.encode("\n\n")) == ["\n", "\n"]
    assert len(VOCAB.encode("12")) == 2


def test_training_is_a_function_of_its_input():
    assert train_sentencepiece(LINES, vocab_size=330) == MODEL
    one_thread = SentencePieceVocabulary(train_sentencepiece(LINES, vocab_size=330, num_threads=1))
    assert np.array_equal(one_thread.piece_num_bytes(), VOCAB.piece_num_bytes())
    assert [one_thread.encode(line) for line in LINES] == [VOCAB.encode(line) for line in LINES]
    assert train_sentencepiece(LINES, vocab_size=329) != MODEL


@pytest.mark.parametrize(("lines", "vocab_size"), [([], 300), (["", ""], 300), (["ab"], 3000), (["ab"], 20)])
def test_text_that_does_not_suit_the_size_is_refused(lines, vocab_size):
    with pytest.raises(ValueError, match="vocab_size"):
        train_sentencepiece(lines, vocab_size=vocab_size)


def test_extra_ids_stand_behind_the_models_and_for_no_text():
    vocab = SentencePieceVocabulary(MODEL, num_extra_ids=5)
    assert vocab.vocab_size == 335
    assert vocab.decode([-1, *vocab.encode("ab"), 333, 335]) == "ab"
    assert vocab.piece_num_bytes()[330:].tolist() == [0] * 5
    assert vocab.fingerprint != VOCAB.fingerprint


def test_a_model_without_bos_begins_documents_with_the_end_of_document_id(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_prefix=str(tmp_path / "m"), vocab_size=34, pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    vocab = SentencePieceVocabulary.from_file(tmp_path / "m.model")
    assert vocab.bos_id == vocab.eos_id == 1
    # Without byte pieces an unknown character stands for no bytes that could be counted.
    assert vocab.piece_num_bytes()[2] == 0


def test_a_saved_vocabulary_comes_back_equal(tmp_path):
    vocab = SentencePieceVocabulary(MODEL, num_extra_ids=3)
    vocab.save(tmp_path / "new" / "tokenizer")
    loaded = load_vocabulary(tmp_path / "new" / "tokenizer")
    assert loaded.fingerprint == vocab.fingerprint
    assert loaded.vocab_size == vocab.vocab_size
    assert loaded.encode("return x") == vocab.encode("return x")
    description = json.loads((tmp_path / "new" / "tokenizer" / "vocabulary.json").read_text())
    assert (description["pad_id"], description["eos_id"], description["bos_id"]) == (0, 1, 2)


def _damage_nothing(folder):
    for path in folder.iterdir():
        path.unlink()


def _damage_model(folder):
    content = bytearray((folder / "spm.model").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "spm.model").write_bytes(content)


def _damage_description(folder):
    (folder / "vocabulary.json").write_text('{"class": "sentencepiece"')


def _escape(folder):
    # A description must not make us read a file outside of its folder, not even one with the right digest.
    (folder / "spm.model").rename(folder.parent / "outside.model")
    description = json.loads((folder / "vocabulary.json").read_text())
    (folder / "vocabulary.json").write_text(json.dumps({**description, "model_file": "../outside.model"}))


def _damage_encoding(folder):
    (folder / "vocabulary.json").write_bytes(b'{"class": "\xff"}')


def _damage_number(folder):
    text = (folder / "vocabulary.json").read_text().replace('"num_extra_ids": 0', '"num_extra_ids": "x"')
    (folder / "vocabulary.json").write_text(text)


@pytest.mark.parametrize(
    "damage",
    [_damage_nothing, _damage_model, _damage_description, _damage_encoding, _damage_number, _escape],
)
def test_a_damaged_vocabulary_is_refused_with_its_place(tmp_path, damage):
    folder = tmp_path / "tokenizer"
    VOCAB.save(folder)
    damage(folder)
    with pytest.raises(ValueError, match=str(folder)):
        load_vocabulary(folder)


def test_a_file_that_is_no_model_is_refused_with_its_path(tmp_path):
    (tmp_path / "x.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="not a SentencePiece model") as e:
        SentencePieceVocabulary.from_file(tmp_path / "x.model")
    assert str(tmp_path / "x.model") in "".join(e.value.__notes__)
