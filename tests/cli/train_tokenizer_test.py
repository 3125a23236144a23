"""The verb that trains a tokenizer: what it writes is what recipes load by name."""

import pytest

from axlearn.cli import train_tokenizer
from axlearn.common.data_dir import set_data_dir
from axlearn.experiments.text.common import vocab


def test_the_trained_tokenizer_is_found_by_its_name(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("one line of text\nand another line of text\n" * 9)
    output = tmp_path / "tokenizers" / "sentencepiece" / "mine.model"
    arguments = [f"--text={tmp_path / '*.txt'}", "--vocab_size=290", f"--output={output}"]
    assert train_tokenizer.main(arguments) == 0
    assert capsys.readouterr().out.startswith(f"{output}: 290 pieces, SHA-256 ")
    with set_data_dir(str(tmp_path)):
        assert vocab("mine.model").vocab_size == 290
        assert vocab("mine.model", num_extra_ids=10).vocab_size == 300


def test_missing_text_is_an_error_and_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match="no such file, folder or pattern"):
        train_tokenizer.main(["--text=/nowhere", "--vocab_size=290", f"--output={tmp_path / 'x.model'}"])
    assert list(tmp_path.iterdir()) == []
