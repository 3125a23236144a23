"""Writing to W&B: what its library is called with, in which order, and that its failures stop nothing.

The library is a stand-in that records its calls; where wandb is installed the last test runs it without a network.
"""

import importlib.machinery
import importlib.util
import logging
import os
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from axlearn.common.config import config_class
from axlearn.common.evaler import set_writer_fields
from axlearn.common.launch_trainer import LaunchOptions, get_trainer_config
from axlearn.common.metrics import WeightedSummary
from axlearn.common.summary import ImageSummary
from axlearn.common.summary_writer import (
    BaseWriter,
    CompositeWriter,
    NoOpWriter,
    SummaryWriter,
    WandBModifier,
    WandBWriter,
)
from tests.common.trainer.tiny_recipe import trainer_config

HAS_WANDB = importlib.util.find_spec("wandb") is not None


class _Error(Exception):
    """Stands for wandb.Error."""


class _Run:
    """Stands for a W&B run: notes each call, and fails from the call of a name on."""

    def __init__(self, library):
        self._library = library
        self.step = library.first_step
        self.config = types.SimpleNamespace(
            update=lambda values, **kwargs: self._note("config", values, kwargs)
        )

    def _note(self, name, *args):
        self._library.calls.append((name, *args))
        if name == self._library.failing_call:
            raise _Error(f"no {name}")

    def log(self, values, *, step):
        self._note("log", step, values)
        self.step = step

    def finish(self):
        self._note("finish")


class _Library(types.ModuleType):
    """Stands for the module."""

    Error = _Error

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.calls = []
        self.first_step = 0
        self.failing_call = None
        self.failing_modes = ()
        self.init_error = _Error

    def Settings(self, **kwargs):
        return kwargs

    def Image(self, image):
        return ("image", image.shape)

    def Histogram(self, *, np_histogram):
        return ("histogram", int(np_histogram[0].sum()))

    def init(self, **kwargs):
        self.calls.append(("init", kwargs))
        if kwargs["mode"] in self.failing_modes:
            raise self.init_error("no network")
        return _Run(self)

    def named(self, name):
        return [call[1:] for call in self.calls if call[0] == name]


@pytest.fixture
def wandb(monkeypatch):
    library = _Library()
    monkeypatch.setitem(sys.modules, "wandb", library)
    for name in ("WANDB_RUN_ID", "WANDB_CONSOLE", "WANDB_FINISH_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    return library


def _writer(folder, **fields) -> WandBWriter:
    return WandBWriter.default_config().set(name="writer", dir=str(folder), **fields).instantiate(parent=None)


def test_values_of_every_kind_go_out_by_their_paths(wandb, tmp_path):
    writer = _writer(tmp_path, project="p", tags=["a"], write_every_n_steps=2)
    for step in (1, 2):
        writer(
            step,
            {
                "loss": jax.numpy.bfloat16(1.5),
                "model": {"accuracy": WeightedSummary(mean=np.float32(0.5), weight=8)},
                "histogram": np.array([1.0, np.nan, 2.0]),
                "note": "hello",
                "image": ImageSummary(np.zeros((2, 4, 5, 3), np.uint8)),
            },
        )
    writer.close()
    assert [call[0] for call in wandb.calls] == ["init", "log", "finish"]
    assert wandb.named("log") == [
        (
            2,
            {
                "loss": 1.5,
                "model/accuracy": 0.5,
                "histogram": ("histogram", 2),
                "note": "hello",
                "image": [("image", (4, 5, 3))] * 2,
            },
        )
    ]
    ((init,),) = wandb.named("init")
    assert (init["project"], init["tags"], init["entity"], init["mode"]) == ("p", ["a"], None, None)
    assert (init["dir"], init["resume"], init["reinit"]) == (str(tmp_path), "allow", "create_new")
    # Neither the screen nor the working tree is sent, which may hold anything.
    assert init["settings"]["console"] == "off"
    assert init["settings"]["disable_git"] is True
    assert init["settings"]["save_code"] is False


def test_what_the_environment_says_is_left_to_the_library(wandb, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_CONSOLE", "wrap")
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    _writer(tmp_path)(1, {"loss": 1.0})
    ((init,),) = wandb.named("init")
    assert "console" not in init["settings"]
    assert init["id"] == (tmp_path / "wandb_id").read_text() == "mine"


def test_a_run_that_continues_continues_its_wandb_run_where_it_was(wandb, tmp_path):
    for first_step in (1, 3):
        writer = _writer(tmp_path / "run")
        for step in range(first_step, first_step + 4):
            writer(step, {"loss": float(step)})
        writer.close()
        # What the service knows of a run that is resumed.
        wandb.first_step = 5
    first, second = wandb.named("init")
    assert first[0]["id"] == second[0]["id"] == (tmp_path / "run" / "wandb_id").read_text()
    assert [step for step, _ in wandb.named("log")] == [1, 2, 3, 4, 5, 6]
    _writer(tmp_path / "other")(5, {"loss": 1.0})
    assert wandb.named("init")[-1][0]["id"] != first[0]["id"]


def test_evalers_write_into_the_run_of_training_below_their_names(wandb, tmp_path):
    train = _writer(tmp_path / "train_train")
    heldout = _writer(tmp_path / "heldout", train_dir=str(tmp_path / "train_train"))
    heldout(0, {"loss": 3.0})
    train(1, {"loss": 2.0})
    heldout(1, {"loss": 2.5})
    heldout.close()
    train(2, {"loss": 1.0})
    train.close()
    assert [call[0] for call in wandb.calls] == ["init", "log", "log", "log", "log", "finish"]
    assert wandb.named("log") == [
        (0, {"heldout/loss": 3.0}),
        (1, {"loss": 2.0}),
        (1, {"heldout/loss": 2.5}),
        (2, {"loss": 1.0}),
    ]
    assert os.listdir(tmp_path) == ["train_train"]


class _WithSecrets(BaseWriter):
    @config_class
    class Config(BaseWriter.Config):
        api_key: str = "sesame"
        hub: str = "https://me:sesame@hub"
        max_tokens: int = 7
        rate: float = float("inf")


def test_the_config_is_written_without_secrets(wandb, tmp_path):
    writer = _writer(tmp_path)
    writer.log_config(_WithSecrets.default_config().set(dir="d"))
    ((values, kwargs),) = wandb.named("config")
    assert values == {
        "api_key": "<redacted>",
        "dir": "d",
        "hub": "<redacted>",
        "klass": "'tests.common.summary_writer.wandb_test._WithSecrets'",
        "max_tokens": 7,
        "rate": "inf",
    }
    assert kwargs == {"allow_val_change": True}


@pytest.mark.parametrize("error", [_Error, ConnectionRefusedError])
def test_without_a_network_the_run_is_recorded_offline(wandb, tmp_path, caplog, error):
    wandb.failing_modes = (None, "online")
    wandb.init_error = error
    writer = _writer(tmp_path)
    with caplog.at_level(logging.WARNING, logger="absl"):
        writer(1, {"loss": 1.0})
    assert [init["mode"] for (init,) in wandb.named("init")] == [None, "offline"]
    assert wandb.named("log") == [(1, {"loss": 1.0})]
    assert "records it offline" in caplog.text
    assert "no network" in caplog.text


@pytest.mark.parametrize("failing_call", ["init", "log", "config", "finish"])
def test_no_failure_of_the_library_stops_a_run(wandb, tmp_path, caplog, failing_call):
    wandb.failing_call = failing_call
    wandb.failing_modes = (None, "offline") if failing_call == "init" else ()
    writer = _writer(tmp_path)
    with caplog.at_level(logging.WARNING, logger="absl"):
        writer.log_config(NoOpWriter.default_config())
        for step in (1, 2):
            writer(step, {"loss": 1.0})
        writer.close()
    assert caplog.text.count("gets nothing more of this run") == 1
    num_logged = {"init": 0, "config": 0, "log": 1, "finish": 2}
    assert len(wandb.named("log")) == num_logged[failing_call]


def test_a_missing_package_is_an_error_before_anything_runs_that_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"writer: the package wandb is not installed.*\n?.*axlearn-spmd\[wandb\]"
    ):
        _writer(tmp_path)


def test_one_line_lets_a_trainer_and_its_evalers_write_to_wandb_besides(wandb, tmp_path):
    cfg = trainer_config(dir=str(tmp_path), max_step=4)
    cfg.summary_writer.write_every_n_steps = 2
    cfg = WandBModifier.default_config().set(project="p").instantiate()(cfg)
    trainer = cfg.instantiate(parent=None)
    trainer.run(jax.random.PRNGKey(0))
    ((init,),) = wandb.named("init")
    assert (init["project"], init["dir"]) == ("p", str(tmp_path / "summaries" / "train_train"))
    logged = wandb.named("log")
    assert [step for step, _ in logged] == [2, 4, 4]
    assert {"loss", "learner/optimizer/learning_rate"} <= set(logged[0][1])
    assert set(logged[2][1]) == {"heldout/cross_entropy_loss", "heldout/eval_time_secs"}
    assert wandb.named("config")[0][0]["learner.optimizer.learning_rate"] == 0.1
    assert [call[0] for call in wandb.calls][-1] == "finish"
    for name in ("train_train", "heldout"):
        assert list((tmp_path / "summaries" / name).glob("*events*"))
    with pytest.raises(ValueError, match=r"tiny\.summary_writer: there is a W&B writer already"):
        WandBModifier.default_config().instantiate()(cfg)


def test_the_command_line_adds_the_writer():
    options = LaunchOptions(config="tiny", module="tests.common.trainer.tiny_recipe", wandb_project="p")
    cfg = get_trainer_config(options).trainer_config
    for writer in (cfg.summary_writer, cfg.evalers["heldout"].summary_writer):
        assert writer.writers["wandb"].project == "p"
        assert writer.writers["tensorboard"].klass is SummaryWriter


def test_what_an_owner_knows_reaches_the_writers_inside_composites():
    inner = CompositeWriter.default_config().set(writers={"wandb": WandBWriter.default_config()})
    own = SummaryWriter.default_config().set(dir="own")
    cfg = CompositeWriter.default_config().set(writers={"inner": inner, "own": own})
    filled = set_writer_fields(cfg, dir="d", train_dir="t")
    assert filled.dir == filled.writers["inner"].dir == "d"
    assert filled.writers["own"].dir == "own"
    wandb_cfg = filled.writers["inner"].writers["wandb"]
    assert (wandb_cfg.dir, wandb_cfg.train_dir) == ("d", "t")
    assert set_writer_fields(cfg.set(dir="mine"), dir="d").writers["inner"].writers["wandb"].dir == "mine"


def test_importing_and_configuring_the_writer_does_not_load_wandb():
    code = (
        "import sys; from axlearn.common.summary_writer import WandBWriter; WandBWriter.default_config(); "
        "assert 'wandb' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


if HAS_WANDB:

    def test_the_library_itself_records_a_run_and_its_continuation_without_a_network(tmp_path, monkeypatch):
        monkeypatch.setenv("WANDB_MODE", "offline")
        for first_step in (1, 2):
            cfg = trainer_config(dir=str(tmp_path), max_step=2 * first_step, save_every_n_steps=2)
            cfg.summary_writer.write_every_n_steps = 1
            WandBModifier.default_config().set(project="p").instantiate()(cfg)
            cfg.instantiate(parent=None).run(jax.random.PRNGKey(first_step))
        folder = tmp_path / "summaries" / "train_train"
        run_id = (folder / "wandb_id").read_text()
        records = list(folder.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb"))
        assert len(records) == 2
        assert all(b"cross_entropy_loss" in path.read_bytes() for path in records)
