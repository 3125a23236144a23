"""Tokenizers of Hugging Face: ids are the library's, text stays text, and bytes are counted exactly."""

import functools
import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from axlearn.common.vocabulary import HuggingFaceVocabulary, Vocabulary, load_vocabulary

LINES = ["def f(self, x):", "    return x + 12", "\tif x is None:", "Grüße, naïve café", "<s> </s>"] * 8
EOS, BOS = "</s>", "<s>"


def _byte_level() -> Tokenizer:
    """As Qwen's and Llama 3's: every byte has a piece, nothing stands before a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    tokenizer.add_special_tokens([BOS, EOS])
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    return tokenizer


def _with_spaces_before_texts(kind: str) -> Tokenizer:
    """As Llama 2's, in its old form ("prepend": before every text) and in its new one ("first")."""
    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    letters = sorted({c for line in LINES for c in line.replace(" ", "▁") if c not in "ïü"})
    pieces = ["<unk>", BOS, EOS, *byte_pieces, *letters, "▁▁", "▁x", "re"]
    merges = [("▁", "▁"), ("▁", "x"), ("r", "e")]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=merges,
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    if kind == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(content=" ", left=1, right=0)])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        steps = [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")]
        tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([BOS, EOS, "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 1)])
    return tokenizer


def _files(tokenizer: Tokenizer, **config) -> dict[str, bytes]:
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps({"eos_token": EOS, **config}).encode(),
    }


@functools.cache
def _vocab(kind: str) -> HuggingFaceVocabulary:
    if kind == "byte-level":
        return HuggingFaceVocabulary(_files(_byte_level()))
    return HuggingFaceVocabulary(_files(_with_spaces_before_texts(kind), bos_token={"content": BOS}))


@settings(max_examples=100, deadline=None)
@given(text=st.text())
@example("\n\n\tif x:\r\n        return  '\u2581 \u2581\u2581'  \n")
@example("a</s><s> <think> \U0001f600 e\u0301 \u00a0\u3000")
@example("")
@example(" ")
def test_bytes_are_counted_exactly_and_text_never_becomes_a_control_token(text):
    vocab = _vocab("byte-level")
    ids = vocab.encode(text)
    assert vocab.piece_num_bytes()[ids].sum() == len(text.encode("utf-8"))
    assert vocab.eos_id not in ids
    assert vocab.decode([vocab.bos_id, *ids, vocab.eos_id]) == text


@settings(max_examples=100, deadline=None)
@given(text=st.text(min_size=1), kind=st.sampled_from(["prepend", "first"]))
@example("  x", "first")
@example("  x", "prepend")
def test_the_space_before_a_text_is_what_is_counted_beyond_its_bytes(text, kind):
    # A literal mark for spaces is a space to these tokenizers, of other length.
    text = text.replace("\u2581", "")
    vocab = _vocab(kind)
    surplus = vocab.piece_num_bytes()[vocab.encode(text)].sum() - len(text.encode("utf-8"))
    has_prefix = text != "" and not (kind == "first" and text.startswith(" "))
    assert surplus == has_prefix * vocab.prefix_num_bytes
    assert vocab.prefix_num_bytes == 1
    if has_prefix:
        assert vocab.decode(vocab.encode(text)) == text


def test_ids_are_those_of_the_library():
    tokenizer = _byte_level()
    for text in [*LINES, "x = 'é'"]:
        if "</s>" not in text:
            expected = tokenizer.encode(text, add_special_tokens=False).ids
            assert _vocab("byte-level").encode(text) == expected
    assert _vocab("byte-level").encode_batch(LINES) == [_vocab("byte-level").encode(text) for text in LINES]


def test_a_prompt_begins_as_the_tokenizer_begins_texts_and_may_name_special_tokens():
    byte_level, llama = _vocab("byte-level"), _vocab("prepend")
    assert byte_level.encode_prompt("def f") == byte_level.encode("def f")
    assert byte_level.encode_prompt("") == [byte_level.bos_id] == [byte_level.eos_id]
    assert llama.encode_prompt("def f") == [1, *llama.encode("def f")]
    assert llama.encode_prompt("") == [1]
    assert llama.eos_id in llama.encode_prompt("a</s>b")
    plain = HuggingFaceVocabulary(_files(_with_spaces_before_texts("prepend"), split_special_tokens=True))
    assert plain.encode_prompt("a</s>b") == [1, *llama.encode("a</s>b")]


def test_what_a_tokenizer_puts_behind_texts_is_no_part_of_a_prompt():
    tokenizer = _byte_level()
    eos_id = tokenizer.token_to_id(EOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", special_tokens=[(EOS, eos_id)]
    )
    vocab = HuggingFaceVocabulary(_files(tokenizer))
    assert vocab.encode_prompt("def f") == vocab.encode("def f")
    assert vocab.encode_prompt("") == [eos_id]
    # An end that the prompt itself names, such as that of a turn, stays.
    assert vocab.encode_prompt(f"def f{EOS}") == [*vocab.encode("def f"), eos_id]
    assert _vocab("byte-level").encode_prompt(f"x{EOS}") == [*vocab.encode("x"), eos_id]


def test_special_ids_come_from_the_files_then_from_the_caller_then_from_the_end():
    tokenizer = _byte_level()
    ids = {name: tokenizer.token_to_id(name) for name in (BOS, EOS)}
    vocab = HuggingFaceVocabulary(_files(tokenizer))
    assert (vocab.bos_id, vocab.eos_id, vocab.pad_id) == (ids[EOS],) * 3
    vocab = HuggingFaceVocabulary(_files(tokenizer, bos_token=BOS), bos_id=5, eos_id=6, pad_id=7)
    assert (vocab.bos_id, vocab.eos_id, vocab.pad_id) == (ids[BOS], ids[EOS], 7)
    files = {"tokenizer.json": tokenizer.to_str().encode()}
    assert HuggingFaceVocabulary(files, eos_id=9).eos_id == 9
    files["special_tokens_map.json"] = json.dumps({"eos_token": EOS}).encode()
    assert HuggingFaceVocabulary(files, eos_id=9).eos_id == ids[EOS]
    assert np.all(vocab.piece_num_bytes()[[ids[BOS], ids[EOS], 7]] == 0)
    assert isinstance(vocab, Vocabulary)
    beyond = HuggingFaceVocabulary(_files(tokenizer), pad_id=500)
    assert beyond.vocab_size == 501
    assert beyond.decode([500, *beyond.encode("x"), 500, 400]) == "x"


def test_a_saved_vocabulary_comes_back_with_all_files_as_they_were(tmp_path):
    files = {
        **_files(_byte_level()),
        "merges.txt": b"a b\n",
        "chat_template.jinja": b"{{ x }}\r\n",
        "README.md": b"",
    }
    vocab = HuggingFaceVocabulary(files, pad_id=3)
    vocab.save(tmp_path / "tokenizer")
    loaded = load_vocabulary(tmp_path / "tokenizer")
    assert loaded.fingerprint == vocab.fingerprint
    assert (loaded.pad_id, loaded.vocab_size) == (3, vocab.vocab_size)
    assert loaded.encode("return x") == vocab.encode("return x")
    for name, content in files.items():
        path = tmp_path / "tokenizer" / name
        assert path.read_bytes() == content if name != "README.md" else not path.exists()
    (tmp_path / "tokenizer" / "tokenizer.json").write_bytes(files["tokenizer.json"] + b" ")
    with pytest.raises(ValueError, match="the tokenizer has changed"):
        load_vocabulary(tmp_path / "tokenizer")


def test_other_tokenizers_have_other_fingerprints():
    fingerprints = {
        _vocab("byte-level").fingerprint,
        _vocab("prepend").fingerprint,
        _vocab("first").fingerprint,
        HuggingFaceVocabulary(_files(_byte_level()), pad_id=3).fingerprint,
    }
    assert len(fingerprints) == 4


def test_a_file_that_is_no_tokenizer_is_refused():
    with pytest.raises(ValueError, match=r"tokenizer\.json: the tokenizer cannot be read"):
        HuggingFaceVocabulary({"tokenizer.json": b'{"version": "1.0"}'}, eos_id=1)


def _unknown_decoder() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, EOS: 1}, merges=[]))
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def test_errors_say_what_is_wrong_with_the_files(tmp_path, golden):
    cases = {
        "no tokenizer.json": lambda: HuggingFaceVocabulary.from_dir(tmp_path),
        "no end": lambda: HuggingFaceVocabulary({"tokenizer.json": _byte_level().to_str().encode()}),
        "an end that is no token": lambda: HuggingFaceVocabulary(_files(_byte_level(), eos_token="<end>")),
        "a config that is no config": lambda: HuggingFaceVocabulary(
            {**_files(_byte_level()), "tokenizer_config.json": b"[]"}
        ),
        "no text": lambda: HuggingFaceVocabulary({"tokenizer.json": b"\xff"}),
        "a config that is too deep": lambda: HuggingFaceVocabulary(
            {**_files(_byte_level()), "tokenizer_config.json": b"[" * 100_000}
        ),
        "pieces of unknown size": lambda: HuggingFaceVocabulary(_files(_unknown_decoder())),
    }
    texts = []
    for name, make in cases.items():
        with pytest.raises(ValueError) as e:
            make()
        texts.append(f"# {name}\n{e.value}\n".replace(str(tmp_path), "FOLDER"))
    golden("errors/data/hugging_face_tokenizer.txt", "".join(texts))
