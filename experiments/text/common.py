"""What the text recipes share: tokenizers by the name of their file, and the parts of a mixture of data."""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Optional

import axlearn
from axlearn.common.config import error_message
from axlearn.common.data_dir import FAKE, default_data_dir, get_data_dir
from axlearn.common.input_tf_data import (
    BuildDatasetFn,
    Dataset,
    DescribedSource,
    ShuffledExamples,
    load_grain,
    prepared_examples,
)
from axlearn.common.vocabulary import SentencePieceVocabulary, Vocabulary

# Below the data directory, and below the folder of files that come with this package.
_TOKENIZERS_FOLDER = pathlib.PurePath("tokenizers")
_TEXT_FIELD = "text"


@dataclasses.dataclass(frozen=True)
class DataMixtureComponent:
    """One dataset of a mixture.

    Attributes:
        name: The name of the dataset, such as `c4/en:3.0.1`.
        weight: Its part of the documents, positive; weights are divided by their sum.
        shuffle_buffer_size: Number of consecutive documents within which the order is drawn; 0: the order of the
            files (`input_tf_data.ShuffledExamples`).
        split: The split, or an expression such as `train[:50%]`.
        info: A note for people; nothing depends on it.
    """

    name: str
    weight: float
    shuffle_buffer_size: int = 8192
    split: str = "train"
    info: str = ""


def find_tokenizer(name: str, *, kind: str, where: str, expected: str, advice: str) -> pathlib.Path:
    """Finds a tokenizer in `DATA_DIR/tokenizers/KIND`, then among the files that come with this package.

    Args:
        name: The name of its file or folder.
        kind: The name of the folder.
        where: The field that names it, for the error.
        expected: What it should be, for the error.
        advice: What to do if it is not there; `{path}` in it is where it is looked for first.

    Raises:
        ValueError: If it is in neither place.
    """
    data_dir = get_data_dir()
    if data_dir in (None, FAKE):
        data_dir = default_data_dir()
    folder = _TOKENIZERS_FOLDER / kind
    places = [
        pathlib.Path(data_dir).expanduser() / folder,
        pathlib.Path(axlearn.__file__).parent / "data" / folder,
    ]
    for place in places:
        if name and (place / name).exists():
            return place / name
    raise ValueError(
        error_message(
            where=where,
            what=f"no tokenizer {name!r}",
            expected=f"{expected} at {places[0] / name} or in {places[1]}",
            advice=advice.format(path=places[0] / name),
        )
    )


def vocab(sentencepiece_model_name: str, num_extra_ids: Optional[int] = None) -> Vocabulary:
    """Loads a SentencePiece model by name.

    It is looked for in `DATA_DIR/tokenizers/sentencepiece`, then among the files that come with this package.

    Args:
        sentencepiece_model_name: Name of the model file, such as `bpe_32k_c4.model`.
        num_extra_ids: How many ids without text to add behind those of the model; None: none.

    Returns:
        The vocabulary.

    Raises:
        ValueError: If there is no such file in either place, or it is not a SentencePiece model.
    """
    path = find_tokenizer(
        sentencepiece_model_name,
        kind="sentencepiece",
        where="sentencepiece_model_name",
        expected="a SentencePiece model",
        advice="Put the file there, or train one: axlearn train_tokenizer --text=PATH "
        "--vocab_size=N --output={path}",
    )
    return SentencePieceVocabulary.from_file(path, num_extra_ids=num_extra_ids or 0)


def tfds_text_source(
    *,
    dataset_name: str,
    split: str,
    is_training: bool,
    train_shuffle_buffer_size: int = 1024 * 16,
    seed: Optional[Sequence[int]] = None,
) -> BuildDatasetFn:
    """Returns a source of the texts of a prepared dataset, as `{"text": bytes}`.

    For training they come epoch after epoch in a drawn order, for evaluation once in the order of the files.

    Args:
        dataset_name: As in `input_tf_data.tfds_dataset`, as for the other arguments.
        split: See there.
        is_training: See there.
        train_shuffle_buffer_size: See there.
        seed: Chooses the order, together with the epoch; several numbers for several sources of one run. None:
            (0,).
    """
    # Opened once: an evaluation is run many times.
    examples_fn = functools.lru_cache(maxsize=1)(
        functools.partial(
            prepared_examples, dataset_name, split=split, data_dir=get_data_dir(), field=_TEXT_FIELD
        )
    )

    def build() -> Dataset:
        source, examples = load_grain().MapDataset.source, examples_fn()
        if not is_training:
            return source(examples)
        return source(
            ShuffledExamples(
                examples, window_size=train_shuffle_buffer_size, seed=(0,) if seed is None else seed
            )
        )

    return DescribedSource(
        build, fingerprint=lambda: {f"number of documents in {dataset_name} {split}": len(examples_fn())}
    )
