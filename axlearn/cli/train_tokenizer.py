"""Trains a SentencePiece tokenizer on files of text.

    axlearn train_tokenizer --text=PATH --vocab_size=N --output=FILE

Recipes that name a tokenizer find it by its file name if it lies in DATA_DIR/tokenizers/sentencepiece.
"""

import argparse
import hashlib
import pathlib
from collections.abc import Sequence

from axlearn.common import file_system
from axlearn.common.text_corpus import Split, text_files
from axlearn.common.vocabulary import train_sentencepiece


def main(argv: Sequence[str]) -> int:
    """Runs the verb.

    Args:
        argv: The arguments behind the verb.

    Returns:
        The exit status, 0.

    Raises:
        ValueError: If there is no text, or too little of it for the size.
        OSError: If the model cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="axlearn train_tokenizer", description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--text", required=True, help="a file, a folder, or a glob pattern of text files")
    parser.add_argument("--vocab_size", required=True, type=int, help="number of token ids, at least 300")
    parser.add_argument("--output", required=True, type=pathlib.Path, help="where to write the model file")
    args = parser.parse_args(argv)
    texts = text_files(args.text, heldout_percent=0).texts(split=Split.TRAIN)
    model = train_sentencepiece(
        (line for text in texts for line in text.split("\n")), vocab_size=args.vocab_size
    )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    file_system.write_bytes_durably(args.output, model)
    print(f"{args.output}: {args.vocab_size} pieces, SHA-256 {hashlib.sha256(model).hexdigest()}")
    return 0
