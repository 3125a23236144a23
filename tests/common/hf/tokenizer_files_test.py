"""The exported tokenizer gives every text the same ids as SentencePiece, in the library that transformers uses."""

import json

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from axlearn.common.hf import tokenizer_files
from axlearn.common.text_corpus import Split, python_standard_library
from axlearn.common.vocabulary import HuggingFaceVocabulary, SentencePieceVocabulary, train_sentencepiece

LINES = ["def f(self, x):", "    return x + 12", "\tif x is None:", "        raise ValueError('no x')"] * 8
OURS = SentencePieceVocabulary(train_sentencepiece(LINES, vocab_size=330), num_extra_ids=2)
FILES = tokenizer_files(OURS, max_len=64)
THEIRS = HuggingFaceVocabulary(FILES)

# What the pieces are made of, so that texts meet the merges.
_TEXTS = st.lists(
    st.sampled_from(
        [
            "def",
            "self",
            "return",
            " ",
            "  ",
            "        ",
            "\n",
            "\t",
            "12",
            "None",
            "'",
            "\u2581",
            "é",
            "\r",
            "<s>",
        ]
    )
).map("".join)


@settings(max_examples=300, deadline=None)
@given(text=st.one_of(st.text(), _TEXTS))
@example("\n\n\tif x:\r\n        return  '\u2581 \u2581\u2581'  \n")
@example("\x00\x01\u2585 \ufffd\u2047 <s></s><pad><unk><0x0A> \U0001f600 e\u0301 \u00a0\u3000")
@example("")
def test_any_text_has_the_same_ids_and_comes_back(text):
    ids = OURS.encode(text)
    assert THEIRS.encode(text) == ids
    assert THEIRS.encode_prompt(text) == OURS.encode_prompt(text)
    assert THEIRS.decode(ids) == text


def test_a_trained_tokenizer_agrees_on_whole_files_and_their_lines():
    corpus = python_standard_library(heldout_percent=1)
    texts = list(corpus.texts(split=Split.HELDOUT))
    lines = [line for text in texts for line in text.split("\n")]
    ours = SentencePieceVocabulary(train_sentencepiece(lines, vocab_size=1000))
    theirs = HuggingFaceVocabulary(tokenizer_files(ours))
    assert len(lines) > 1000
    for batch in (texts, lines):
        assert theirs.encode_batch(batch) == ours.encode_batch(batch)


def test_special_ids_and_bytes_are_the_same():
    assert (THEIRS.bos_id, THEIRS.eos_id, THEIRS.pad_id) == (OURS.bos_id, OURS.eos_id, OURS.pad_id)
    num_pieces = OURS.vocab_size - OURS.num_extra_ids
    assert THEIRS.vocab_size == num_pieces
    assert THEIRS.piece_num_bytes().tolist() == OURS.piece_num_bytes()[:num_pieces].tolist()


def test_the_files_name_a_class_that_takes_the_tokenizer_as_it_is():
    config = json.loads(FILES["tokenizer_config.json"])
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["model_max_length"] == 64
    assert config["split_special_tokens"] is True
    assert FILES["tokenizer.model"] == OURS.model_proto
    assert json.loads(FILES["special_tokens_map.json"])["eos_token"] == "</s>"


def test_a_model_without_bos_begins_texts_with_the_end_of_document_id(tmp_path):
    vocab = _trained(tmp_path, model_type="bpe", byte_fallback=True, bos_id=-1)
    theirs = HuggingFaceVocabulary(tokenizer_files(vocab))
    assert theirs.encode_prompt("x") == [vocab.eos_id, *vocab.encode("x")]


def test_symbols_that_a_user_defined_are_matched_before_anything_else(tmp_path):
    vocab = _trained(
        tmp_path, model_type="bpe", byte_fallback=True, user_defined_symbols=["<x>", "<x>y", "s"]
    )
    theirs = HuggingFaceVocabulary(tokenizer_files(vocab))
    for text in [*LINES, "a<x>b<x>yself <x", " <x> ss</s><x>"]:
        assert theirs.encode(text) == vocab.encode(text)
        assert theirs.decode(theirs.encode(text)) == text
    assert theirs.piece_num_bytes().tolist() == vocab.piece_num_bytes().tolist()


def _trained(folder, **settings) -> SentencePieceVocabulary:
    settings = {
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "bos_id": -1,
        "vocab_size": 300,
        **settings,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_prefix=str(folder / "m"), pad_id=0, eos_id=1, unk_id=2,
        minloglevel=2, hard_vocab_limit=False, **settings,
    )  # fmt: skip
    return SentencePieceVocabulary.from_file(folder / "m.model")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"model_type": "unigram", "byte_fallback": True}, "not made by byte pair encoding"),
        ({"model_type": "bpe", "vocab_size": 40}, "do not fall back to bytes"),
        (
            {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "nmt_nfkc"},
            "normalises text",
        ),
        ({"model_type": "bpe", "byte_fallback": True, "add_dummy_prefix": True}, "a space before every text"),
        ({"model_type": "bpe", "byte_fallback": True, "remove_extra_whitespaces": True}, "removes spaces"),
    ],
)
def test_models_that_do_more_than_cut_are_refused(tmp_path, settings, reason):
    with pytest.raises(ValueError, match=f"cannot be written as a tokenizer.json: .*{reason}"):
        tokenizer_files(_trained(tmp_path, **settings))
