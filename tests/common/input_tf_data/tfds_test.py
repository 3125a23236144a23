"""Prepared datasets, read without TensorFlow, and what is said where there is none."""

import json

import pytest

from axlearn.common.data_dir import FAKE, set_data_dir
from axlearn.common.input_tf_data import prepared_examples, tfds_dataset
from tests.tfds_files import write_text_dataset

TEXTS = [f"text {i}" for i in range(50)]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_text_dataset(root, {"train": TEXTS, "validation": TEXTS[:5]})
    write_text_dataset(root, {"train": TEXTS[:7]}, version="2.10.0")
    write_text_dataset(root, {"train": TEXTS[:8]}, version="2.9.0")
    return root


def texts(data_dir, *, name="c4/en:3.0.1", split="train", is_training=False, n=None, **kwargs):
    dataset = tfds_dataset(name, split=split, is_training=is_training, data_dir=str(data_dir), **kwargs)()
    return [dataset[i]["text"].decode() for i in range(len(dataset) if n is None else n)]


def test_for_evaluation_every_example_comes_once_in_the_order_of_the_files(data_dir):
    seen = texts(data_dir)
    assert sorted(seen) == sorted(TEXTS)
    assert texts(data_dir) == seen
    assert texts(data_dir, split="train[:8]") == seen[:8]
    assert texts(data_dir, split="train[50%:60%]") == seen[25:30]
    assert sorted(texts(data_dir, split="validation")) == sorted(TEXTS[:5])


def test_for_training_every_epoch_has_an_order_of_its_own(data_dir):
    seen = texts(data_dir, is_training=True, n=100)
    assert sorted(seen[:50]) == sorted(seen[50:]) == sorted(TEXTS)
    assert seen[:50] != seen[50:]
    assert texts(data_dir, is_training=True, n=100, seed=1) != seen
    assert texts(data_dir, is_training=True, n=50, train_shuffle_buffer_size=0) == texts(data_dir)


def test_without_a_version_the_newest_is_read(data_dir):
    assert len(texts(data_dir, name="c4/en")) == 50
    assert len(texts(data_dir, name="c4/en:2.10.0")) == 7


def test_the_data_directory_is_that_of_the_thread_when_the_source_is_made(data_dir):
    with set_data_dir(str(data_dir)):
        source = tfds_dataset("c4/en:3.0.1", split="validation", is_training=False)
    with set_data_dir("/elsewhere"):
        assert len(source()) == 5


def _as_tfrecord(folder):
    info = json.loads((folder / "dataset_info.json").read_text())
    info["fileFormat"] = "tfrecord"
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def test_what_cannot_be_read_is_said_with_what_to_do(data_dir, golden, tmp_path):
    _as_tfrecord(write_text_dataset(tmp_path, {"train": TEXTS[:2]}, builder="old"))
    cases = {
        "no dataset": ("/nowhere", "c4/en:3.0.1", "train"),
        "no version": (data_dir, "c4/en:1.0.0", "train"),
        "no name": (data_dir, "c4/en/3.0.1/", "train"),
        "no split": (data_dir, "c4/en:3.0.1", "test"),
        "no expression": (data_dir, "c4/en:3.0.1", "train[:"),
        "no example": (data_dir, "c4/en:3.0.1", "train[:0]"),
        "made-up data": (FAKE, "c4/en:3.0.1", "train"),
        "another format": (tmp_path, "old/en:3.0.1", "train"),
    }
    lines = []
    for title, (root, name, split) in cases.items():
        with pytest.raises(ValueError) as e:
            texts(root, name=name, split=split)
        lines.append(f"{title}: {e.value}".replace(str(data_dir), "DATA").replace(str(tmp_path), "OTHER"))
    with pytest.raises(ValueError) as e:
        prepared_examples("c4/en:3.0.1", split="train", data_dir=str(data_dir), field="txt")
    lines.append(f"no field: {e.value}".replace(str(data_dir), "DATA"))
    golden("errors/data/tfds.txt", "\n".join(lines) + "\n")


def test_numbers_out_of_range_are_refused_before_anything_is_read():
    with pytest.raises(ValueError, match="train_shuffle_buffer_size=-1"):
        tfds_dataset("c4/en", split="train", is_training=True, train_shuffle_buffer_size=-1)
