"""The caches of tokens and of trained tokenizers: exact, verified, rebuilt when damaged."""

import json
import logging
import pathlib

import numpy as np
import pytest

from axlearn.common.config import config_for_function
from axlearn.common.input_grain_lm import PackedTextSource
from axlearn.common.text_corpus import open_token_cache, text_files, trained_sentencepiece
from axlearn.common.vocabulary import SentencePieceVocabulary, load_vocabulary, train_sentencepiece

TEXTS = [f"def f{i}(x):\n    return x + {i}\n\n# \u00e9\u2581 {'x' * i}\n" for i in range(12)]


@pytest.fixture(scope="module")
def vocab():
    return SentencePieceVocabulary(train_sentencepiece("\n".join(TEXTS).split("\n"), vocab_size=290))


@pytest.fixture
def corpus_dir(tmp_path) -> pathlib.Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i, text in enumerate(TEXTS):
        (folder / f"{i:02}.txt").write_text(text, encoding="utf-8")
    return folder


def open_cache(corpus_dir, vocab, tmp_path):
    return open_token_cache(text_files(str(corpus_dir)), vocab=vocab, cache_dir=tmp_path / "cache")


def test_the_cache_holds_the_tokens_and_bytes_of_every_document(corpus_dir, vocab, tmp_path):
    cache = open_cache(corpus_dir, vocab, tmp_path)
    assert cache.tokens.dtype == np.uint16
    assert cache.names == tuple(f"{i:02}.txt" for i in range(12))
    for i, text in enumerate(TEXTS):
        ids = cache.tokens[cache.offsets[i] : cache.offsets[i + 1]]
        assert ids.tolist() == [*vocab.encode(text), vocab.eos_id]
        assert vocab.decode(ids) == text
        assert vocab.piece_num_bytes()[ids].sum() == cache.num_bytes[i] == len(text.encode())


def test_the_second_time_nothing_is_tokenised(corpus_dir, vocab, tmp_path, monkeypatch):
    first = open_cache(corpus_dir, vocab, tmp_path)
    monkeypatch.setattr(SentencePieceVocabulary, "encode_batch", None)
    second = open_cache(corpus_dir, vocab, tmp_path)
    assert np.array_equal(first.tokens, second.tokens)
    assert first.fingerprint == second.fingerprint


def _make_undecodable(path):
    path.write_bytes(b"\xff" + path.read_bytes()[1:])


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name",
    ["tokens.bin", "offsets.npy", "num_bytes.npy", "prefix_num_bytes.npy", "names.json", "MANIFEST.json"],
)
@pytest.mark.parametrize(
    "damage",
    [_flip, _make_undecodable, lambda p: p.unlink(), lambda p: p.write_bytes(p.read_bytes()[:-1])],
)
def test_a_damaged_cache_is_made_anew_with_a_warning(
    corpus_dir, vocab, tmp_path, caplog, name, damage, request
):
    whole = open_cache(corpus_dir, vocab, tmp_path)
    tokens = np.array(whole.tokens)
    (folder,) = (tmp_path / "cache").iterdir()
    damage(folder / name)
    with caplog.at_level(logging.WARNING):
        again = open_cache(corpus_dir, vocab, tmp_path)
    assert np.array_equal(again.tokens, tokens)
    if "made anew" not in caplog.text:
        # The manifest's last byte is a newline, and a flipped bit may lie in what only people read.
        assert name == "MANIFEST.json"
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [folder.name]


def test_a_changed_file_or_tokenizer_gives_another_cache(corpus_dir, vocab, tmp_path):
    fingerprints = {open_cache(corpus_dir, vocab, tmp_path).fingerprint}
    (corpus_dir / "03.txt").write_text("changed")
    fingerprints.add(open_cache(corpus_dir, vocab, tmp_path).fingerprint)
    other = SentencePieceVocabulary(train_sentencepiece(TEXTS, vocab_size=300))
    fingerprints.add(open_cache(corpus_dir, other, tmp_path).fingerprint)
    assert len(fingerprints) == len(list((tmp_path / "cache").iterdir())) == 3


def test_a_build_that_fails_leaves_nothing_behind(corpus_dir, vocab, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(SentencePieceVocabulary, "encode_batch", fail)
    with pytest.raises(OSError, match="disk full"):
        open_cache(corpus_dir, vocab, tmp_path)
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_manifest_says_what_was_skipped(corpus_dir, vocab, tmp_path):
    (corpus_dir / "bad.txt").write_bytes(b"\xff")
    open_cache(corpus_dir, vocab, tmp_path)
    (manifest,) = (tmp_path / "cache").glob("*/MANIFEST.json")
    facts = json.loads(manifest.read_text())
    assert facts["num_documents"] == 12
    assert facts["num_bytes"] == sum(len(t.encode()) for t in TEXTS)
    assert facts["skipped"][0][0] == "bad.txt"
    assert facts["documents_with_inexact_bytes"] == 0


def test_a_tokenizer_that_changes_the_text_is_reported(corpus_dir, tmp_path, caplog):
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=41, pad_id=0, eos_id=1, bos_id=-1,
        unk_id=2, minloglevel=2,
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        open_cache(corpus_dir, SentencePieceVocabulary(model.getvalue()), tmp_path)
    assert "changes the text of 12 of 12 documents" in caplog.text


def test_a_space_before_every_text_is_no_change_and_no_byte_of_it(corpus_dir, tmp_path, caplog):
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(TEXTS).split("\n")), model_writer=model, vocab_size=300, pad_id=0,
        eos_id=1, bos_id=-1, unk_id=2, minloglevel=2, model_type="bpe", byte_fallback=True,
        add_dummy_prefix=True, remove_extra_whitespaces=False, normalization_rule_name="identity",
    )  # fmt: skip
    for path in corpus_dir.iterdir():
        # A literal mark for spaces is a space to such a model.
        path.write_text(path.read_text(encoding="utf-8").replace("\u2581", ""), encoding="utf-8")
    vocab = SentencePieceVocabulary(model.getvalue())
    with caplog.at_level(logging.WARNING):
        cache = open_cache(corpus_dir, vocab, tmp_path)
    assert "changes the text" not in caplog.text
    assert vocab.prefix_num_bytes == 1
    assert cache.prefix_num_bytes.tolist() == [1] * 12
    vocab.save(tmp_path / "tokenizer")
    source = PackedTextSource.default_config().set(
        corpus=config_for_function(text_files).set(path=str(corpus_dir), heldout_percent=0),
        vocab_cfg=config_for_function(load_vocabulary).set(directory=str(tmp_path / "tokenizer")),
        max_sequence_length=16,
    )
    source = source.instantiate()
    num_bytes = [source.example(epoch=0, index=i)["target_num_bytes"] for i in range(source.num_examples())]
    assert sum(num_bytes) == sum(path.stat().st_size for path in corpus_dir.iterdir())


def test_a_tokenizer_is_trained_on_the_training_split_and_cached(corpus_dir, tmp_path, monkeypatch, caplog):
    corpus = config_for_function(text_files).set(path=str(corpus_dir), heldout_percent=40)
    first = trained_sentencepiece(corpus, vocab_size=300, cache_dir=str(tmp_path / "tokenizers"))
    assert first.vocab_size == 300
    (corpus_dir / "new").mkdir()
    held_out = next(n for n in ("a", "b", "c", "d", "e", "f") if _is_heldout(f"new/{n}.txt"))
    (corpus_dir / "new" / f"{held_out}.txt").write_text("held out")
    monkeypatch.setattr("axlearn.common.text_corpus._tokenizer.train_sentencepiece", None)
    again = trained_sentencepiece(corpus, vocab_size=300, cache_dir=str(tmp_path / "tokenizers"))
    assert again.fingerprint == first.fingerprint
    monkeypatch.undo()
    (model,) = (tmp_path / "tokenizers").glob("*/spm.model")
    _flip(model)
    with caplog.at_level(logging.WARNING):
        retrained = trained_sentencepiece(corpus, vocab_size=300, cache_dir=str(tmp_path / "tokenizers"))
    assert retrained.fingerprint == first.fingerprint
    assert "is trained again" in caplog.text


def _is_heldout(name):
    from axlearn.common.text_corpus import is_heldout

    return is_heldout(name, heldout_percent=40)
