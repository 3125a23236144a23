"""Datasets that TensorFlow Datasets has prepared, read without TensorFlow."""

import pathlib
import re
from collections.abc import Sequence
from typing import Any, Optional

from axlearn.common.config import error_message
from axlearn.common.data_dir import FAKE, default_data_dir, get_data_dir
from axlearn.common.input_tf_data._dataset import (
    BuildDatasetFn,
    Dataset,
    DescribedSource,
    ShuffledExamples,
    load_grain,
)

_INFO_FILE = "dataset_info.json"
# name[/config][:version]
_NAME_PATTERN = re.compile(r"(?P<builder>\w+(/[^/:]+)?)(:(?P<version>[^/:]+))?")


def _tfds() -> Any:
    """Loads tensorflow-datasets, which only inputs that read its datasets need."""
    import tensorflow_datasets as tfds

    return tfds


def tfds_dataset(
    dataset_name: str,
    *,
    split: str,
    is_training: bool,
    train_shuffle_buffer_size: int = 1024 * 16,
    seed: Optional[int] = None,
    data_dir: Optional[str] = None,
) -> BuildDatasetFn:
    """Returns a source of the examples of a prepared dataset, as dictionaries of numpy values; texts are bytes.

    For training the examples come epoch after epoch in a drawn order (`ShuffledExamples`), for evaluation once in
    the order of the files.

    Args:
        dataset_name: `name`, `name/config` or `name/config:version`. Without a version: the newest there is.
        split: A split, or an expression such as `train[:8192]` or `train[10%:20%]`.
        is_training: Whether the examples are for training.
        train_shuffle_buffer_size: Number of consecutive examples within which the order is drawn, for training;
            0: the order of the files.
        seed: Chooses the order, together with the epoch. None: 0.
        data_dir: Where datasets lie. None: `get_data_dir()` when the source is made, else TFDS' own default.

    Raises:
        ValueError: If a value is out of range. When the dataset is built: if it is not there, or not in a format
            that can be read without TensorFlow.
    """
    if train_shuffle_buffer_size < 0 or (seed or 0) < 0:
        raise ValueError(
            error_message(
                where="source",
                what=f"{train_shuffle_buffer_size=}, {seed=} cannot be used",
                expected="integers of at least 0",
            )
        )
    found_dir = get_data_dir() if data_dir is None else data_dir

    def build() -> Dataset:
        examples = prepared_examples(dataset_name, split=split, data_dir=found_dir)
        source = load_grain().MapDataset.source
        if not is_training:
            return source(examples)
        return source(ShuffledExamples(examples, window_size=train_shuffle_buffer_size, seed=(seed or 0,)))

    return DescribedSource(build)


def prepared_examples(
    dataset_name: str, *, split: str, data_dir: Optional[str], field: Optional[str] = None
) -> Sequence[Any]:
    """Opens a prepared dataset.

    Args:
        dataset_name: As in `tfds_dataset`.
        split: As in `tfds_dataset`.
        data_dir: Where datasets lie; None: TFDS' own default.
        field: The only entry of the examples that is kept. None: all are.

    Returns:
        Its examples by number.

    Raises:
        ValueError: If it is not there, has no such split or field, holds no example, or is in a format without
            random access.
    """
    if data_dir == FAKE:
        raise ValueError(
            error_message(
                where="source.dataset_name",
                what=f"{dataset_name!r} is to be read, but the data directory is {FAKE}",
                expected="a recipe that has made-up data in its place, or a directory",
                advice=f"Name the recipe with --config and --data_dir={FAKE}.",
            )
        )
    folder = _folder(dataset_name, root=pathlib.Path(data_dir or default_data_dir()).expanduser())
    builder = _tfds().builder_from_directory(folder)
    if field is not None and field not in builder.info.features:
        raise ValueError(
            error_message(
                where=str(folder),
                what=f"examples have no field {field!r}",
                expected="one of " + ", ".join(map(repr, sorted(builder.info.features))),
            )
        )
    try:
        examples: Sequence[Any] = builder.as_data_source(split=split)
    except NotImplementedError as e:
        raise ValueError(
            error_message(
                where=str(folder),
                what=f"the dataset is prepared as {builder.info.file_format.value}, which only TensorFlow reads",
                expected="array_record",
                advice="Add that format where TensorFlow is installed (pip install 'axlearn-spmd[tf]'): "
                f"tfds convert_format --dataset_version_dir={folder} --out_file_format=array_record",
            )
        ) from e
    except (ValueError, KeyError) as e:
        raise ValueError(
            error_message(
                where="source.split",
                what=f"{split!r} cannot be read from {folder} ({str(e).splitlines()[0].rstrip('.')})",
                expected="an expression over "
                + ", ".join(f"{name!r} ({s.num_examples})" for name, s in builder.info.splits.items()),
            )
        ) from e
    if not len(examples):
        raise ValueError(
            error_message(
                where="source.split", what=f"{split!r} of {folder} holds no example", expected="some"
            )
        )
    return examples if field is None else _OneField(examples, field)


class _OneField(Sequence[Any]):
    """Examples of which all but one entry is left out."""

    def __init__(self, examples: Sequence[Any], field: str):
        self._examples = examples
        self._field = field

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: Any) -> Any:
        return {self._field: self._examples[index][self._field]}


def _folder(dataset_name: str, *, root: pathlib.Path) -> pathlib.Path:
    """Returns the folder of a dataset's version."""
    match = _NAME_PATTERN.fullmatch(dataset_name)
    if match is None:
        raise ValueError(
            error_message(
                where="source.dataset_name",
                what=f"{dataset_name!r} is no name of a dataset",
                expected="name, name/config or name/config:version, such as c4/en:3.0.1",
            )
        )
    parent, version = root / match["builder"], match["version"]
    there = sorted((path.parent for path in parent.glob(f"*/{_INFO_FILE}")), key=_version_key)
    if version is None and there:
        return there[-1]
    if version is not None and parent / version in there:
        return parent / version
    raise ValueError(
        error_message(
            where="source.dataset_name",
            what=f"no dataset {dataset_name!r}"
            + (f" (there is version {', '.join(path.name for path in there)})" if there else ""),
            expected=f"a prepared one in {parent / (version or 'VERSION')}",
            advice=f"Say where datasets lie with --data_dir, or do without any with --data_dir={FAKE}. To prepare it "
            "(needs TensorFlow: pip install 'axlearn-spmd[tf]'): "
            f"tfds build {dataset_name} --data_dir={root} --file_format=array_record",
        )
    )


def _version_key(folder: pathlib.Path) -> tuple[list[int], str]:
    return [int(part) for part in re.findall(r"\d+", folder.name)], folder.name
