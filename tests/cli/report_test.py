"""The report of a run: held-out losses beside those of models that only count."""

import math
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


def test_of_several_held_out_sets_at_one_step_the_first_of_the_config_counts(text_config):
    cfg = text_config.clone()
    cfg.evalers["other"] = cfg.evalers["heldout"].clone()
    cfg.evalers["counts"] = cfg.evalers["heldout"].clone()
    other = {"step": 8, "evaler": "other", "summaries": {"loss": "nan"}}
    no_loss = {"step": 12, "evaler": "counts", "summaries": {"area": 0.5}}
    assert report.last_held_out_eval([*_records(1.25), other, no_loss], cfg=cfg).name == "heldout"
    # A later one of the other set alone; it is a number that JSON lacks.
    evaluation = report.last_held_out_eval([*_records(1.25), {**other, "step": 9}], cfg=cfg)
    assert (evaluation.name, evaluation.step) == ("other", 9)
    assert math.isnan(evaluation.nats_per_token)


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
    (tmp_path / "checkpoints" / "step_00000008" / "index").write_text('[["step", 8]]')
    text = report.report(str(tmp_path), cfg=text_config)
    assert "  50.0% below the unigram model in nats per byte" in text
    ratio = abs(1 - baselines.unigram_nats_per_byte / 2 / baselines.bigram_nats_per_byte)
    assert f"{ratio:.1%} " in text
    assert re.search(r"this model +2\.5000 ", text)
    assert f"tensorboard --logdir {tmp_path}/summaries" in text
    assert f"{tmp_path}/checkpoints    (steps 8)" in text


def test_every_evaluation_set_is_shown_at_every_step(text_config, monkeypatch, tmp_path):
    def record(name, step, loss, **more):
        summaries = {"cross_entropy_loss": loss, "perplexity": math.exp(loss), "accuracy": 0.125}
        return {"evaler": name, "step": step, "summaries": summaries, **more}

    records = [
        record("heldout", 4, 9.0),
        record("train", 4, 2.0, weights="ema"),
        {"step": 5, "loss": 1.0},
        # A run that was killed and continued writes a step again.
        record("heldout", 4, 3.0),
        record("heldout", 8, 2.5),
        record("train", 8, 1.0, weights="ema"),
    ]
    records[-2]["summaries"]["bits_per_byte"] = 1.75
    monkeypatch.setattr(report, "read_metrics", lambda path: records)
    monkeypatch.setattr(report, "compute_baselines", lambda cfg, evaler: None)
    (tmp_path / "metrics.jsonl").write_text("")
    cfg = text_config.clone()
    cfg.evalers["late"] = cfg.evalers["heldout"].clone()
    text = report.report(str(tmp_path), cfg=cfg)
    lines = text[text.index("Evaluations") : text.index("\n\nRun ")].splitlines()
    assert [line.split() for line in lines] == [
        ["Evaluations", "cross", "entropy", "perplexity", "bits/byte", "accuracy"],
        ["train", "(of", "the", "training", "text,", "averaged", "weights)"],
        ["step", "4", "2.0000", "7.39", "-", "12.5%"],
        ["step", "8", "1.0000", "2.72", "-", "12.5%"],
        ["heldout"],
        ["step", "4", "3.0000", "20.09", "-", "12.5%"],
        ["step", "8", "2.5000", "12.18", "1.7500", "12.5%"],
        ["late", "(not", "evaluated", "yet)"],
    ]


def test_evaluations_of_averages_are_marked_one_by_one_where_there_are_others(text_config):
    records = [
        {"evaler": "heldout", "step": 0, "summaries": {"loss": 3.0}},
        {"evaler": "heldout", "step": 4, "summaries": {"loss": 2.0}, "weights": "ema"},
    ]
    lines = [line.split() for line in report._evaluations(records, cfg=text_config)]
    assert lines[2:] == [
        ["heldout"],
        ["step", "0", "3.0000", "-", "-", "-"],
        ["step", "4", "2.0000", "-", "-", "-", "(averaged", "weights)"],
    ]


def test_a_run_that_was_not_evaluated_yet_is_told_so(text_config):
    with pytest.raises(ValueError, match="has not been evaluated on held-out text"):
        report.last_held_out_eval([{"step": 1, "loss": 2.0}], cfg=text_config)


def test_a_directory_that_is_no_run_is_refused_by_the_command(tmp_path, capsys):
    assert axlearn(["report", str(tmp_path)]) == 2
    assert "there is no trainer_config.json" in capsys.readouterr().err
