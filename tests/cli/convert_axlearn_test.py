"""`axlearn convert axlearn import`: a run of AXLearn becomes a run of ours that goes on where it was."""

import pathlib
import shutil

import numpy as np
import pytest
import sentencepiece

from axlearn.cli._run_files import read_config
from axlearn.cli.main import main as axlearn
from axlearn.common.checkpointer import open_checkpoint
from axlearn.common.vocabulary import load_vocabulary, train_sentencepiece
from tests.fixtures_reference import ReferenceRun

TEXT = ["def read_lines(path):", "    with open(path) as f:", "        return f.read().splitlines()"] * 20


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> ReferenceRun:
    return ReferenceRun.unpack(tmp_path_factory.mktemp("reference"))


@pytest.fixture
def theirs(reference, tmp_path) -> pathlib.Path:
    """The directory of a run of AXLearn, with the names that it uses."""
    folder = tmp_path / "theirs"
    shutil.copytree(reference.folder / "checkpoints", folder / "checkpoints")
    shutil.copy(reference.folder / "config.txt", folder / "trainer_config")
    return folder


def _import(source, output, *more: str) -> int:
    arguments = ["--tokenizer", "none", "--data_dir", "FAKE", *more]
    return axlearn(["convert", "axlearn", "import", str(source), "--output", str(output), *arguments])


def _part(text: str, part: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(f"{part}.")]


def test_config_and_arrays_are_those_of_the_run(reference, theirs, tmp_path, capsys):
    assert _import(theirs, tmp_path / "ours") == 0
    assert "step 3, 31 arrays" in capsys.readouterr().out
    dump, cfg = (theirs / "trainer_config").read_text(), read_config(str(tmp_path / "ours"))
    # The one field that the version of the fixture no longer has, whose default is another one here.
    ours = cfg.debug_string().replace("model.decoder.attention_mask: None\n", "")
    for part in ("model", "learner"):
        assert _part(ours, part) == _part(dump, part)
    assert cfg.max_step == 3
    reader = open_checkpoint(tmp_path / "ours" / "checkpoints")
    arrays = reference.arrays(step=3)
    assert set(reader.arrays) == set(arrays)
    for path, value in arrays.items():
        np.testing.assert_array_equal(reader.read(path), value, err_msg=path)


def test_an_earlier_step_and_a_tokenizer_can_be_chosen(theirs, tmp_path):
    (tmp_path / "bpe.model").write_bytes(train_sentencepiece(TEXT, vocab_size=300))
    run = tmp_path / "ours"
    assert (
        _import(theirs, run, "--step", "0", "--tokenizer", str(tmp_path / "bpe.model"), "--set", "max_step=9")
        == 0
    )
    assert open_checkpoint(run / "checkpoints").step == 0
    assert load_vocabulary(run / "tokenizer").vocab_size == 300
    assert read_config(str(run)).max_step == 9


def test_the_config_may_come_from_another_machine_and_the_tokenizer_without_a_padding(theirs, tmp_path):
    dump = (theirs / "trainer_config").read_text()
    (theirs / "trainer_config").write_bytes(("\ufeff" + dump.replace("\n", "\r\n")).encode())
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_prefix=str(tmp_path / "tokenizer"), vocab_size=30, minloglevel=2
    )
    # As a file, and as Hugging Face keeps it; the padding is that of the model.
    for i, tokenizer in enumerate((tmp_path / "tokenizer.model", tmp_path)):
        run = tmp_path / f"ours{i}"
        assert _import(theirs, run, "--tokenizer", str(tokenizer)) == 0
        assert read_config(str(run)).model.decoder.pad_token_id == 0
        assert load_vocabulary(run / "tokenizer").pad_id == 0
    # And as a run of ours keeps it.
    assert _import(theirs, tmp_path / "ours", "--tokenizer", str(tmp_path / "ours0" / "tokenizer")) == 0


def _change(path: pathlib.Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


MISTAKES = {
    "no config": lambda theirs: (theirs / "trainer_config").unlink(),
    "another width": lambda theirs: _change(theirs / "trainer_config", "decoder.dim: 64", "decoder.dim: 32"),
    "another type": lambda theirs: _change(
        theirs / "trainer_config", "model.dtype: 'jax.numpy.float32'", "model.dtype: 'jax.numpy.bfloat16'"
    ),
    "a config that is no text": lambda theirs: (theirs / "trainer_config").write_bytes(b"klass: '\xff'"),
    "another optimizer": lambda theirs: _change(
        theirs / "trainer_config", "adamw_decoupled_optimizer", "adamw_optimizer"
    ),
    "a class that is not here": lambda theirs: _change(
        theirs / "trainer_config", "attention.GroupedQueryAttention", "attention.DisentangledSelfAttention"
    ),
    "no checkpoint": lambda theirs: shutil.rmtree(theirs / "checkpoints"),
    "a chunk is missing": lambda theirs: (
        theirs / "checkpoints/step_00000003/gda/model/decoder/output_norm/scale/0"
    ).unlink(),
}


def test_what_does_not_fit_is_refused_and_leaves_nothing(theirs, tmp_path, capsys, golden):
    lines = []
    for name, spoil in MISTAKES.items():
        source = tmp_path / "spoilt"
        shutil.copytree(theirs, source)
        spoil(source)
        before = sorted(tmp_path.iterdir())
        status = _import(source, tmp_path / "ours")
        message = capsys.readouterr().err.replace(str(tmp_path), "TMP")
        lines += [f"## {name}: status {status}", message]
        assert status in (1, 2)
        assert sorted(tmp_path.iterdir()) == before
        shutil.rmtree(source)
    assert _import(theirs, tmp_path / "ours", "--tokenizer", "nowhere.model") == 2
    lines += ["## no such tokenizer: status 2", capsys.readouterr().err.replace(str(tmp_path), "TMP")]
    golden("errors/convert_axlearn.txt", "\n".join(lines))
