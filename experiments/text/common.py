"""What the text recipes share: how a tokenizer is found by the name of its file."""

import pathlib
from typing import Optional

import axlearn
from axlearn.common.config import error_message
from axlearn.common.data_dir import FAKE, get_data_dir
from axlearn.common.vocabulary import SentencePieceVocabulary, Vocabulary

# Below the data directory, and below the folder of files that come with this package.
_SENTENCEPIECE_FOLDER = pathlib.PurePath("tokenizers", "sentencepiece")
# The data directory where none is set, as in TensorFlow Datasets.
_DEFAULT_DATA_DIR = "~/tensorflow_datasets"


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
    data_dir = get_data_dir()
    if data_dir in (None, FAKE):
        data_dir = _DEFAULT_DATA_DIR
    places = [
        pathlib.Path(data_dir).expanduser() / _SENTENCEPIECE_FOLDER,
        pathlib.Path(axlearn.__file__).parent / "data" / _SENTENCEPIECE_FOLDER,
    ]
    for place in places:
        path = place / sentencepiece_model_name
        if path.is_file():
            return SentencePieceVocabulary.from_file(path, num_extra_ids=num_extra_ids or 0)
    raise ValueError(
        error_message(
            where="sentencepiece_model_name",
            what=f"no tokenizer {sentencepiece_model_name!r}",
            expected=f"a SentencePiece model at {places[0] / sentencepiece_model_name} or in {places[1]}",
            advice=(
                "Put the file there, or train one: axlearn train_tokenizer --text=PATH "
                f"--vocab_size=N --output={places[0] / sentencepiece_model_name}"
            ),
        )
    )
