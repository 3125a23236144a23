"""Writers: what TensorBoard's own reader finds in the files."""

import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from axlearn.common.metrics import WeightedSummary
from axlearn.common.summary import ImageSummary
from axlearn.common.summary_writer import CompositeWriter, NoOpWriter, SummaryWriter


def make(klass=SummaryWriter, **kwargs):
    return klass.default_config().set(name="writer", **kwargs).instantiate(parent=None)


def read(path):
    events = EventAccumulator(
        str(path), size_guidance={"tensors": 0, "scalars": 0, "images": 0, "histograms": 0}
    )
    events.Reload()
    return events


def scalars(path, tag):
    return [(event.step, event.value) for event in read(path).Scalars(tag)]


def text(path, tag):
    return read(path).Tensors(f"{tag}/text_summary")[0].tensor_proto.string_val[0].decode()


def test_values_of_every_kind_are_read_back(tmp_path):
    writer = make(dir=str(tmp_path))
    writer(
        3,
        {
            "loss": jnp.float32(2.5),
            "model": {"accuracy": WeightedSummary(mean=jnp.float32(0.5), weight=jnp.float32(8)), "count": 7},
            "half": jnp.bfloat16(1.5),
            "histogram": np.arange(10.0),
            "diverged": np.array([1.0, np.nan, np.inf]),
            "all_nan": np.array([np.nan]),
            "note": "hello",
            "image": ImageSummary(np.zeros((1, 4, 5, 3), np.uint8)),
        },
    )
    writer.flush()
    assert scalars(tmp_path, "loss") == [(3, 2.5)]
    assert scalars(tmp_path, "model/accuracy") == [(3, 0.5)]
    assert scalars(tmp_path, "model/count") == [(3, 7.0)]
    assert scalars(tmp_path, "half") == [(3, 1.5)]
    events = read(tmp_path)
    assert events.Histograms("histogram")[0].histogram_value.num == 10
    assert events.Histograms("diverged")[0].histogram_value.num == 1
    assert "all_nan" not in events.Tags()["histograms"]
    image = events.Images("image")[0]
    assert (image.width, image.height) == (5, 4)
    assert text(tmp_path, "note") == "hello"
    writer.close()


def test_only_multiples_of_the_interval_are_written(tmp_path):
    writer = make(
        dir=str(tmp_path), write_every_n_steps=10, write_every_n_steps_map={"slow/.*": 20}, max_queue=1000
    )
    for step in range(0, 41, 5):
        writer(step, {"loss": float(step), "slow": {"x": 1.0}})
    writer.close()
    assert [step for step, _ in scalars(tmp_path, "loss")] == [0, 10, 20, 30, 40]
    assert [step for step, _ in scalars(tmp_path, "slow/x")] == [0, 20, 40]


def test_a_step_that_is_not_written_is_not_fetched(tmp_path):
    class Untouchable:
        """Stands for an array that is not ready."""

        def __array__(self, *_, **__):
            raise AssertionError("fetched")

    writer = make(dir=str(tmp_path / "run"), write_every_n_steps=2)
    writer(1, {"loss": Untouchable()})
    assert not (tmp_path / "run").exists()
    with pytest.raises(AssertionError, match="fetched"):
        writer(2, {"loss": Untouchable()})


def test_the_config_is_written_as_text(tmp_path):
    writer = make(dir=str(tmp_path))
    config = SummaryWriter.default_config().set(max_queue=1000, write_every_n_steps=100)
    writer.log_config(config)
    writer.close()
    assert text(tmp_path, "trainer_config") == (
        "klass: 'axlearn.common.summary_writer.SummaryWriter'\nmax_queue: 1000\nwrite_every_n_steps: 100"
    )


def test_values_wait_for_the_disk_no_longer_than_configured(tmp_path, monkeypatch):
    for max_queue, expected in ((None, 3), (1, 2)):
        path = tmp_path / str(max_queue)
        writer = make(dir=str(path), max_queue=max_queue)
        for step in range(3):
            writer(step, {"loss": 1.0})
        assert len(scalars(path, "loss")) == expected
        writer.flush()
        assert len(scalars(path, "loss")) == 3
        writer.close()
    writer = make(dir=str(tmp_path / "late"), max_queue=1000)
    monkeypatch.setattr("axlearn.common.summary_writer._tensorboard._FLUSH_SECONDS", -1.0)
    writer(1, {"loss": 1.0})
    assert scalars(tmp_path / "late", "loss") == [(1, 1.0)]
    writer.close()


def test_a_closed_writer_opens_again(tmp_path):
    writer = make(dir=str(tmp_path))
    writer.close()
    writer(1, {"loss": 1.0})
    writer.close()
    writer(2, {"loss": 2.0})
    writer.close()
    # Two files of one second, whose names are in no order.
    assert sorted(scalars(tmp_path, "loss")) == [(1, 1.0), (2, 2.0)]


def test_a_value_that_cannot_be_written_is_refused_by_path(tmp_path):
    writer = make(dir=str(tmp_path))
    with pytest.raises(TypeError, match=r"writer: the summary 'a/b' is of type object"):
        writer(1, {"a": {"b": object()}})
    writer.close()
    with pytest.raises(ValueError, match=r"writer.write_every_n_steps=0 is not a number of steps"):
        make(dir=str(tmp_path), write_every_n_steps=0)


def test_a_composite_writes_everywhere(tmp_path):
    writer = make(
        CompositeWriter,
        dir=str(tmp_path / "first"),
        writers={
            "first": SummaryWriter.default_config(),
            "second": SummaryWriter.default_config().set(dir=str(tmp_path / "second"), write_every_n_steps=2),
            "none": NoOpWriter.default_config(),
        },
    )
    for step in (1, 2):
        writer(step, {"loss": float(step)})
    writer.log_config(SummaryWriter.default_config())
    writer.flush()
    assert scalars(tmp_path / "first", "loss") == [(1, 1.0), (2, 2.0)]
    assert scalars(tmp_path / "second", "loss") == [(2, 2.0)]
    writer.close()


def test_importing_the_writer_loads_neither_tensorboardx_nor_tensorflow():
    code = (
        "import sys, axlearn.common.summary_writer; "
        "assert not {'tensorboardX', 'tensorflow'} & set(sys.modules), sorted(sys.modules)"
    )
    root = pathlib.Path(__file__).resolve().parents[3]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
