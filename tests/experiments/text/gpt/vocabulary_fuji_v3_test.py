"""A tokenizers JSON by name, and which of its tokens end documents and rows."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import axlearn
from axlearn.common.data_dir import set_data_dir
from axlearn.common.vocabulary import Vocabulary, load_vocabulary
from axlearn.experiments.text.gpt.vocabulary_fuji_v3 import FujiV3Vocabulary

LINES = ["def f(self, x):", "    return x + 12", "Grüße, naïve café"] * 8
LLAMA_3 = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|finetune_right_pad_id|>",
]


def make_tokenizer(special):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    tokenizer.add_special_tokens(special)
    return tokenizer


@pytest.fixture
def data_dir(tmp_path):
    folder = tmp_path / "tokenizers" / "hf"
    folder.mkdir(parents=True)
    make_tokenizer(LLAMA_3).save(str(folder / "Llama-3-tokenizer.json"))
    make_tokenizer(["[END]", "[PAD]"]).save(str(folder / "other.json"))
    (folder / "whole").mkdir()
    make_tokenizer(["[END]", "[PAD]", "</s>"]).save(str(folder / "whole" / "tokenizer.json"))
    config = {"eos_token": "[END]", "pad_token": "[PAD]"}
    (folder / "whole" / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "broken.json").write_text("{}")
    with set_data_dir(str(tmp_path)):
        yield tmp_path


def make(filename="Llama-3-tokenizer.json", **kwargs):
    return FujiV3Vocabulary.default_config().set(filename=filename, **kwargs).instantiate()


def id_of(vocab, token):
    return Tokenizer.from_str(vocab.files["tokenizer.json"].decode()).token_to_id(token)


def test_llama_3_is_known_by_its_tokens(data_dir):
    vocab = make()
    assert isinstance(vocab, Vocabulary)
    assert vocab.eos_id == id_of(vocab, "<|end_of_text|>")
    assert vocab.pad_id == id_of(vocab, "<|finetune_right_pad_id|>")
    assert vocab.bos_id == id_of(vocab, "<|begin_of_text|>")
    assert vocab.vocab_size == 300 + 4 - (300 - id_of(vocab, LLAMA_3[0]))
    text = "def f(x): naïve <|end_of_text|>"
    ids = vocab.encode(text)
    assert ids == [i for i in ids if i < vocab.bos_id]
    assert vocab.decode(ids) == text
    assert vocab.piece_num_bytes()[ids].sum() == len(text.encode())


def test_a_folder_says_it_itself_and_fields_of_the_config_go_before(data_dir):
    vocab = make("whole")
    assert (vocab.eos_id, vocab.pad_id) == (id_of(vocab, "[END]"), id_of(vocab, "[PAD]"))
    vocab = make("whole", eos_token="</s>", pad_token="[END]")
    assert (vocab.eos_id, vocab.pad_id) == (id_of(vocab, "</s>"), id_of(vocab, "[END]"))
    vocab = make("other.json", eos_token="[END]")
    assert vocab.pad_id == vocab.eos_id == id_of(vocab, "[END]")


def test_it_is_kept_with_a_run_as_any_tokenizer_of_hugging_face(data_dir, tmp_path):
    vocab = make("other.json", eos_token="[END]", pad_token="[PAD]")
    vocab.save(tmp_path / "run")
    loaded = load_vocabulary(tmp_path / "run")
    assert (loaded.fingerprint, loaded.eos_id, loaded.pad_id) == (
        vocab.fingerprint,
        vocab.eos_id,
        vocab.pad_id,
    )


def test_what_cannot_be_used_is_said_with_what_to_do(data_dir, golden):
    (data_dir / "tokenizers" / "hf" / "empty").mkdir()
    cases = {
        "no file": {"filename": "missing.json"},
        "no tokenizer": {"filename": "broken.json"},
        "no tokenizer.json": {"filename": "empty"},
        "no end": {"filename": "other.json"},
        "no such token": {"filename": "other.json", "eos_token": "<end>"},
    }
    package = axlearn.__file__.removesuffix("/__init__.py")
    lines = []
    for title, kwargs in cases.items():
        with pytest.raises(ValueError) as e:
            make(**kwargs)
        text = "\n".join([str(e.value), *getattr(e.value, "__notes__", [])])
        lines.append(f"{title}: {text}".replace(str(data_dir), "DATA").replace(package, "PACKAGE"))
    golden("errors/data/fuji_v3_vocabulary.txt", "\n".join(lines) + "\n")


def test_its_config_prints_as_in_the_reference_dumps():
    cfg = FujiV3Vocabulary.default_config().set(filename="Llama-3-tokenizer.json")
    assert cfg.debug_string().split("\n") == [
        "filename: 'Llama-3-tokenizer.json'",
        "klass: 'axlearn.experiments.text.gpt.vocabulary_fuji_v3.FujiV3Vocabulary'",
    ]
