"""What a user reads when something is wrong with the data, as golden files."""

import pathlib

import pytest

from axlearn.common import input_grain
from axlearn.common.config import config_for_function
from axlearn.common.input_fake import FakeLmInput
from axlearn.common.input_grain_lm import PackedTextSource
from axlearn.common.text_corpus import text_files, trained_sentencepiece
from axlearn.common.vocabulary import load_vocabulary


def packed_input(path, **source):
    corpus = config_for_function(text_files).set(path=str(path), on_unreadable="error", heldout_percent=0)
    source_cfg = PackedTextSource.default_config().set(
        corpus=corpus,
        vocab_cfg=config_for_function(trained_sentencepiece).set(corpus=corpus, vocab_size=5000),
        max_sequence_length=16,
    )
    cfg = input_grain.Input.default_config().set(name="input", is_training=True, global_batch_size=2)
    return cfg.set(source=source_cfg.set(**source)).instantiate(parent=None)


def missing_file(tmp_path):
    packed_input(tmp_path / "books" / "*.txt").batches()


def no_text_in_folder(tmp_path):
    packed_input(tmp_path).batches()


def bad_utf8(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"good \xff bad")
    packed_input(tmp_path).batches()


def empty_split(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    packed_input(tmp_path, split="heldout").batches()


def illegal_settings(tmp_path):
    packed_input(tmp_path, split="test", seed=-1, max_examples=0)


def vocabulary_too_large(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    packed_input(tmp_path).batches()


def no_tokenizer_in_run(tmp_path):
    load_vocabulary(tmp_path / "run" / "tokenizer")


def _fake(**kwargs):
    cfg = FakeLmInput.default_config().set(
        name="input", is_training=True, global_batch_size=4, source_length=7, vocab_size=11
    )
    return cfg.set(**kwargs).instantiate(parent=None)


def changed_data(tmp_path):
    del tmp_path
    _fake(seed=2, source_length=9).batches().set_state(_fake().batches().get_state())


def damaged_position(tmp_path):
    del tmp_path
    _fake().batches().set_state({"next_step": -1})


CASES = (
    missing_file,
    no_text_in_folder,
    bad_utf8,
    empty_split,
    illegal_settings,
    vocabulary_too_large,
    no_tokenizer_in_run,
    changed_data,
    damaged_position,
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_the_error_says_what_is_wrong_where_and_what_to_do(case, tmp_path, golden, monkeypatch):
    monkeypatch.setenv("AXLEARN_CACHE_DIR", str(tmp_path / ".cache"))
    with pytest.raises(ValueError) as e:
        case(tmp_path)
    text = "\n".join([str(e.value), *getattr(e.value, "__notes__", ())])
    for path, name in ((str(tmp_path), "TMP"), (str(pathlib.Path.cwd()), "CWD")):
        text = text.replace(path, name)
    golden(f"errors/data/{case.__name__}.txt", text + "\n")
