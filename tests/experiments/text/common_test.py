"""How recipes find a tokenizer by name."""

import pathlib

import pytest

import axlearn
from axlearn.common.config import config_for_function
from axlearn.common.data_dir import FAKE, set_data_dir
from axlearn.experiments.text.common import vocab


@pytest.mark.parametrize("data_dir", [None, FAKE, "/data"])
def test_a_missing_tokenizer_is_an_error_that_names_both_places_and_the_command(
    data_dir, golden, monkeypatch
):
    monkeypatch.setenv("HOME", "/home/user")
    with set_data_dir(data_dir), pytest.raises(ValueError) as e:
        vocab("bpe_32k_c4.model")
    text = str(e.value).replace(str(pathlib.Path(axlearn.__file__).parent), "PACKAGE")
    golden(f"errors/data/missing_tokenizer_{(data_dir or 'default').strip('/')}.txt", text + "\n")


def test_its_config_prints_as_in_the_reference_dumps():
    cfg = config_for_function(vocab).set(sentencepiece_model_name="bpe_32k_c4.model")
    assert cfg.debug_string().split("\n") == [
        "fn: 'axlearn.experiments.text.common.vocab'",
        "sentencepiece_model_name: 'bpe_32k_c4.model'",
    ]
