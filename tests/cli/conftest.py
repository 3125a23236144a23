"""A model of Hugging Face and the run that an import makes of it, once for all tests; they change copies."""

import json

import pytest

from axlearn.common.hf import tokenizer_files
from axlearn.common.vocabulary import SentencePieceVocabulary
from tests.cli.hf_harness import CONFIG, GENERATION_CONFIG, MODEL, TEXT, import_run, tensors_of, write_model


@pytest.fixture(scope="session")
def hf_dir(tmp_path_factory):
    """A Llama in several files, with a tokenizer and all that may lie beside it."""
    folder = write_model(tmp_path_factory.mktemp("hf") / "llama", CONFIG, tensors_of(CONFIG))
    for name, content in tokenizer_files(SentencePieceVocabulary(MODEL)).items():
        (folder / name).write_bytes(content)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION_CONFIG))
    (folder / "chat_template.jinja").write_text("{{ messages }}\n")
    (folder / "README.md").write_text("No part of the model.")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


@pytest.fixture(scope="session")
def text_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for i in range(20):
        (folder / f"{i}.txt").write_text("\n".join(TEXT[i:]))
    return folder


@pytest.fixture(scope="session")
def run(hf_dir, text_dir, tmp_path_factory):
    """What an import makes of it."""
    output = tmp_path_factory.mktemp("runs") / "run"
    import_run(hf_dir, output, f"--data_dir={text_dir}", "--set", "max_step=2")
    return output
