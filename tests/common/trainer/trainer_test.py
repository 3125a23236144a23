"""Whole runs of a tiny trainer: resuming, saving, stopping, what is traced and what is waited for."""

import json
import math
import pathlib
import signal
import threading

import jax
import numpy as np
import pytest
from jax._src.array import ArrayImpl

from axlearn.common.checkpointer import CheckpointMismatchError, checkpoint_steps
from axlearn.common.config import config_for_function
from axlearn.common.measurement import EventLog
from axlearn.common.module import functional
from axlearn.common.optimizers import param_ema
from axlearn.common.trainer import SpmdTrainer, StoppedBySignal, UndefinedLossException, read_metrics
from axlearn.common.utils import host_to_global_array
from tests.common.trainer.tiny_recipe import VOCAB_SIZE, BigramModel, trainer_config

SHARED_DUMP = "golden/axlearn.experiments.text.gpt.c4_trainer/fuji-test-v1.txt"


def _run(cfg: SpmdTrainer.Config, *, seed: int = 0, **kwargs):
    trainer = cfg.instantiate(parent=None)
    return trainer, trainer.run(jax.random.PRNGKey(seed), **kwargs)


def _losses(run: pathlib.Path) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in read_metrics(str(run / "metrics.jsonl")) if "loss" in r}


def _content(run: pathlib.Path, step: int) -> dict[str, str]:
    """The digest of every file of a checkpoint."""
    manifest = json.loads((run / "checkpoints" / f"step_{step:08d}" / "MANIFEST.json").read_text())
    return {name: entry["sha256"] for name, entry in manifest["files"].items()}


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    """A run of eight steps that nothing disturbed: its folder, and what run() returned."""
    folder = tmp_path_factory.mktemp("truth")
    before = BigramModel.num_traces
    _, outputs = _run(trainer_config(dir=str(folder)), return_evaler_summaries=True)
    return folder, outputs, BigramModel.num_traces - before


def test_a_run_that_stopped_and_continued_equals_one_that_never_stopped(truth, tmp_path):
    folder, outputs, _ = truth
    # The policies know of step 4 and step 8 alone; the last step is evaluated and saved whatever they say.
    _run(trainer_config(dir=str(tmp_path)).set(max_step=6))
    assert checkpoint_steps(tmp_path / "checkpoints") == [4, 6]
    assert [r["step"] for r in read_metrics(str(tmp_path / "metrics.jsonl")) if "evaler" in r] == [4, 6]
    position = json.loads((tmp_path / "checkpoints/step_00000006/python_0/input_iter").read_text())
    assert position["next_step"] == 6
    trainer, resumed = _run(trainer_config(dir=str(tmp_path)))
    assert trainer.restored_step == 6
    assert float(resumed["loss"]) == float(outputs["loss"])
    assert _losses(tmp_path) == _losses(folder)
    assert _content(tmp_path, 8) == _content(folder, 8)
    assert _content(tmp_path, 4) == _content(folder, 4)


def test_the_step_and_the_evaluation_are_traced_once_each(truth):
    _, _, num_traces = truth
    assert num_traces == 2


def test_the_last_step_is_evaluated_and_logged(truth):
    folder, outputs, _ = truth
    evals = [r for r in read_metrics(str(folder / "metrics.jsonl")) if "evaler" in r]
    assert [(r["step"], r["evaler"]) for r in evals] == [(4, "heldout"), (8, "heldout")]
    loss = float(outputs["evaler_summaries"]["heldout"]["cross_entropy_loss"].value())
    assert evals[-1]["summaries"]["cross_entropy_loss"] == loss
    assert sorted(_losses(folder)) == list(range(1, 9))


def test_the_folder_of_a_run_holds_what_it_says(truth):
    folder, _, _ = truth
    assert "parameters: 272" in (folder / "trainer_state_tree.txt").read_text()
    assert "Memory per device" in (folder / "model_analysis.txt").read_text()
    assert list((folder / "summaries" / "heldout").glob("events*"))
    # Its text is in there as it is printed.
    (events,) = (folder / "summaries" / "train_train").glob("events*")
    assert b"checkpointer.save_policy.fn" in events.read_bytes()


def test_a_run_that_is_done_does_nothing_and_says_so(truth, capsys):
    folder, _, _ = truth
    before = _content(folder, 8)
    trainer, outputs = _run(trainer_config(dir=str(folder)))
    assert outputs is None
    assert trainer.step == 8
    assert "step 8 is max_step=8" in capsys.readouterr().out
    assert _content(folder, 8) == before


def test_the_host_waits_for_the_device_only_when_something_is_due(tmp_path, monkeypatch):
    cfg = trainer_config(
        dir=str(tmp_path), max_step=30, log_every_n_steps=12, save_every_n_steps=16, eval_every_n_steps=20
    )
    cfg.summary_writer.write_every_n_steps = 12
    trainer = cfg.instantiate(parent=None)
    waited_at = []

    def noted(original):
        def wait(array, *args, **kwargs):
            if threading.current_thread() is threading.main_thread():
                waited_at.append(trainer.step)
            return original(array, *args, **kwargs)

        return wait

    # All ways to the value of an array go through one of these two.
    monkeypatch.setattr(ArrayImpl, "_value", property(noted(ArrayImpl._value.fget)))
    monkeypatch.setattr(ArrayImpl, "block_until_ready", noted(ArrayImpl.block_until_ready))
    trainer.run(jax.random.PRNGKey(0))
    due = {*range(6), 12, 24, 16, 20, 30}
    assert set(waited_at) - {0} == due - {0}


def test_an_error_of_the_data_ends_the_run_and_what_was_saved_stays(tmp_path):
    cfg = trainer_config(dir=str(tmp_path))
    cfg.input.fail_step = 7
    with pytest.raises(OSError, match="cannot read the batch of step 7"):
        _run(cfg)
    assert checkpoint_steps(tmp_path / "checkpoints") == [4]
    assert sorted(_losses(tmp_path)) == list(range(1, 7))


@pytest.fixture
def listens_to_interrupts():
    """A shell lets its background jobs ignore SIGINT, the tests among them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("listens_to_interrupts")
def test_a_signal_before_the_first_step_saves_nothing(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    cfg = trainer_config(dir=str(tmp_path))
    with pytest.raises(StoppedBySignal, match="Stopped by SIGINT before the first step") as e:
        _run(cfg, on_ready=lambda: signal.raise_signal(signal.SIGINT))
    assert e.value.code == 130
    assert checkpoint_steps(tmp_path / "checkpoints") == []
    assert signal.getsignal(signal.SIGINT) is before


def test_an_id_outside_the_vocabulary_is_refused_on_the_host(tmp_path):
    cfg = trainer_config(dir=str(tmp_path))
    cfg.input.vocab_size = VOCAB_SIZE + 5
    with pytest.raises(ValueError, match=r"input_ids: id \d+ is outside the vocabulary of 16"):
        _run(cfg)


def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_step(tmp_path):
    cfg = trainer_config(dir=str(tmp_path))
    cfg.input.bad_step = 6
    with pytest.raises(UndefinedLossException, match="The loss of step 6 is nan") as e:
        _run(cfg)
    assert e.value.step == 6
    assert checkpoint_steps(tmp_path / "checkpoints") == [4]
    assert _losses(tmp_path)[6] == "nan"


def test_a_loss_that_nobody_logs_is_seen_within_a_few_steps(tmp_path):
    cfg = trainer_config(
        dir=str(tmp_path),
        max_step=1000,
        log_every_n_steps=1000,
        save_every_n_steps=1000,
        eval_every_n_steps=1000,
    )
    cfg.input.bad_step = 11
    trainer = cfg.instantiate(parent=None)
    with pytest.raises(UndefinedLossException, match="The loss of step 11 is nan"):
        trainer.run(jax.random.PRNGKey(0))
    assert 11 <= trainer.step <= 11 + 4
    assert sorted(_losses(tmp_path)) == list(range(1, 12))
    assert checkpoint_steps(tmp_path / "checkpoints") == []


def test_a_state_that_is_not_finite_is_never_saved(tmp_path):
    cfg = trainer_config(dir=str(tmp_path))
    cfg.learner.ignore_undefined_loss = True
    cfg.input.bad_step = 6
    with pytest.raises(UndefinedLossException, match=r"The state after step 8 is not finite: .* and 5 more"):
        _run(cfg)
    assert checkpoint_steps(tmp_path / "checkpoints") == [4]


def test_other_data_than_before_are_refused(truth, tmp_path):
    folder, _, _ = truth
    with pytest.raises(ValueError, match="seed was 0, is 3"):
        _run(trainer_config(dir=str(folder), max_step=9, seed=3))


def test_another_model_than_before_is_refused_before_anything_is_written(truth):
    folder, _, _ = truth
    called = []
    cfg = trainer_config(dir=str(folder), max_step=9)
    cfg.model.vocab_size = 2 * VOCAB_SIZE
    with pytest.raises(CheckpointMismatchError):
        _run(cfg, on_ready=lambda: called.append(1))
    assert not called


def test_checkpoints_that_cannot_be_read_never_lead_to_a_run_from_scratch(tmp_path):
    _run(trainer_config(dir=str(tmp_path), max_step=1))
    (tmp_path / "checkpoints/step_00000001/MANIFEST.json").write_text("{}")
    with pytest.raises(RuntimeError, match="There are checkpoints, but none can be used"):
        _run(trainer_config(dir=str(tmp_path)))


def test_an_input_that_cannot_tell_its_position_is_refused_if_the_config_asks_for_it(tmp_path, monkeypatch):
    cfg = trainer_config(dir=str(tmp_path), max_step=2).set(save_input_iterator=True)
    trainer = cfg.instantiate(parent=None)
    monkeypatch.setattr(type(trainer.input), "batches", lambda self: iter([]))
    with pytest.raises(ValueError, match="cannot tell its position"):
        trainer.run(jax.random.PRNGKey(0))


def test_a_run_ends_where_its_data_end(tmp_path):
    cfg = trainer_config(dir=str(tmp_path))
    cfg.input.total_num_batches = 3
    trainer, outputs = _run(cfg)
    assert trainer.step == 3
    assert math.isfinite(float(outputs["loss"]))
    assert checkpoint_steps(tmp_path / "checkpoints") == [3]


def test_evaluation_uses_the_averaged_parameters_where_there_are_any(tmp_path):
    cfg = trainer_config(dir=str(tmp_path), max_step=3)
    cfg.learner.ema = config_for_function(param_ema).set(decay=0.5)
    trainer, outputs = _run(cfg, return_evaler_summaries=True)
    evaluated = float(outputs["evaler_summaries"]["heldout"]["cross_entropy_loss"].value())
    losses = {}
    for name, params in (
        ("ema", trainer.trainer_state.learner["ema"].ema),
        ("model", trainer.trainer_state.model),
    ):
        with trainer.mesh():
            per_batch = [
                float(
                    functional(
                        trainer.model,
                        None,
                        params,
                        {"input_batch": host_to_global_array(batch, partition=trainer.input.partition_spec)},
                        is_training=False,
                    )[0][0]
                )
                for batch in trainer.evalers["heldout"].input.batches()
            ]
        losses[name] = np.mean(per_batch)
    assert evaluated == pytest.approx(losses["ema"], rel=1e-6)
    assert evaluated != pytest.approx(losses["model"], rel=1e-4)


def test_profiles_events_and_the_context_of_the_user_are_made(tmp_path):
    entered = []

    class _Context:
        def __enter__(self):
            entered.append("in")

        def __exit__(self, *exc_info):
            entered.append("out")

    cfg = trainer_config(dir=str(tmp_path / "run"), max_step=3).set(
        start_trace_steps=[2],
        n_steps_for_each_trace=1,
        context_manager=_make_context(_Context),
        recorder=EventLog.default_config().set(path=str(tmp_path / "events.jsonl")),
    )
    _run(cfg)
    assert list((tmp_path / "run").glob("summaries/train_train/plugins/profile/*/*.xplane.pb"))
    assert entered == ["in", "out"]
    events = [json.loads(line)["event"] for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    steps = ["start_step"] * 3
    assert events == [
        *("start_job", "training_preparation", "compilation", *steps, "eval", "checkpoint_save", "end_job")
    ]


def _make_context(context_class):
    def make():
        return context_class()

    return make


def test_the_defaults_print_the_lines_of_the_reference(reference_dump, shared_dir):
    top = ("klass", "prune", "save_input", "start_trace", "summary_writer.klass", "checkpointer.klass")
    ours = SpmdTrainer.default_config().debug_string().splitlines()
    assert [line for line in ours if line.startswith(top)] == [
        line for line in reference_dump if line.startswith(top)
    ]
    cfg = trainer_config(dir="x").evalers["heldout"]
    evaler_lines = [
        line for line in cfg.debug_string().splitlines() if line.startswith(("metric", "summary", "klass"))
    ]
    # Those of the reference's evalers; compared with its text where that is at hand.
    assert evaler_lines == [
        "klass: 'axlearn.common.evaler.SpmdEvaler'",
        "metric_calculator.klass: 'axlearn.common.evaler.ModelSummaryAccumulator'",
        "metric_calculator.metric_accumulator.klass: 'axlearn.common.metrics.MetricAccumulator'",
        "metric_calculator.model_method: 'forward'",
        "summary_writer.klass: 'axlearn.common.summary_writer.SummaryWriter'",
        "summary_writer.write_every_n_steps: 1",
    ]
    if shared_dir is None:
        return
    assert evaler_lines == [
        line.partition("'validation'].")[2]
        for line in (shared_dir / SHARED_DUMP).read_text().splitlines()
        if line.startswith(
            ("evalers['validation'].metric", "evalers['validation'].summary", "evalers['validation'].klass")
        )
    ]
