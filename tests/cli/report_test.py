"""The report of a run: held-out losses beside those of models that only count."""

import re

import pytest

from axlearn.cli import report
from axlearn.cli.main import main as axlearn
from axlearn.common.config import config_for_function
from axlearn.common.evaler import SpmdEvaler
from axlearn.common.input_grain import Input
from axlearn.common.input_grain_lm import PackedTextSource
from axlearn.common.ngram_baseline import unigram_bigram_baselines
from axlearn.common.text_corpus import text_files, trained_sentencepiece
from axlearn.common.trainer import SpmdTrainer


def _input(folder, *, split):
    corpus = config_for_function(text_files).set(path=str(folder), heldout_percent=40)
    return Input.default_config().set(
        is_training=split == "train",
        global_batch_size=2,
        source=PackedTextSource.default_config().set(
            corpus=corpus,
            vocab_cfg=config_for_function(trained_sentencepiece).set(corpus=corpus, vocab_size=320),
            max_sequence_length=32,
            split=split,
        ),
    )


@pytest.fixture(scope="module")
def text_config(tmp_path_factory):
    """The config of a run on twelve small files of text."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(12):
        (folder / f"doc_{i}.txt").write_text(f"the number {i} is followed by the number {i + 1}\n" * 20)
    return SpmdTrainer.default_config().set(
        input=_input(folder, split="train"),
        evalers={
            "train": SpmdEvaler.default_config().set(input=_input(folder, split="train")),
            "heldout": SpmdEvaler.default_config().set(input=_input(folder, split="heldout")),
        },
    )


def _records(nats_per_byte):
    summaries = {"cross_entropy_loss": 2.5, "lm/nats_per_byte": nats_per_byte}
    return [
        {"step": 4, "loss": 9.0},
        {"step": 4, "evaler": "heldout", "summaries": {**summaries, "cross_entropy_loss": 7.0}},
        {"step": 8, "evaler": "heldout", "summaries": summaries},
        {"step": 8, "evaler": "train", "summaries": summaries},
    ]


def test_the_last_evaluation_on_text_that_was_held_out_counts(text_config):
    evaluation = report.last_held_out_eval(_records(1.25), cfg=text_config)
    assert evaluation == report.HeldOutEval("heldout", 8, nats_per_token=2.5, nats_per_byte=1.25)


def test_the_baselines_are_those_of_the_runs_own_text(text_config):
    baselines = report.compute_baselines(text_config, evaler="heldout")
    train = text_config.input.clone(name="a").instantiate(parent=None)
    heldout = text_config.evalers["heldout"].input.clone(name="b").instantiate(parent=None)
    expected = unigram_bigram_baselines(train.source.document_token_ids(), heldout.batches(), vocab_size=320)
    assert baselines == expected
    assert baselines.bigram_nats_per_byte < baselines.unigram_nats_per_byte


def test_the_percentages_are_of_the_losses_per_byte(text_config, monkeypatch, tmp_path):
    baselines = report.compute_baselines(text_config, evaler="heldout")
    monkeypatch.setattr(report, "read_metrics", lambda path: _records(baselines.unigram_nats_per_byte / 2))
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "checkpoints" / "step_00000008" / "gda").mkdir(parents=True)
    text = report.report(str(tmp_path), cfg=text_config)
    assert "  50.0% below the unigram model in nats per byte" in text
    ratio = abs(1 - baselines.unigram_nats_per_byte / 2 / baselines.bigram_nats_per_byte)
    assert f"{ratio:.1%} " in text
    assert re.search(r"this model +2\.5000 ", text)
    assert f"tensorboard --logdir {tmp_path}/summaries" in text
    assert f"{tmp_path}/checkpoints    (steps 8)" in text


def test_a_run_that_was_not_evaluated_yet_is_told_so(text_config):
    with pytest.raises(ValueError, match="has not been evaluated on held-out text"):
        report.last_held_out_eval([{"step": 1, "loss": 2.0}], cfg=text_config)


def test_a_directory_that_is_no_run_is_refused_by_the_command(tmp_path, capsys):
    assert axlearn(["report", str(tmp_path)]) == 2
    assert "there is no trainer_config.json" in capsys.readouterr().err
