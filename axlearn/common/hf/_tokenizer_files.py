"""The files of a tokenizer that transformers reads, made from a SentencePiece model."""

import json
from typing import Any, NamedTuple, Optional

from axlearn.common.config import error_message
from axlearn.common.vocabulary import SentencePieceVocabulary

# SentencePiece writes a space inside a piece as this character (U+2581).
_SPACE_MARK = "\u2581"


class _Pieces(NamedTuple):
    # Text of each piece, by id.
    texts: list[str]
    # Score of each piece that text can be made of, by its text; the higher, the earlier it is put together.
    scores: dict[str, float]
    # Pieces that are matched before any others are put together, such as a newline.
    user_defined: list[str]
    # Names of the ids that stand for no text.
    control: list[str]
    unknown: str


def _model_format() -> Any:
    """Loads the description of SentencePiece's files, which only exports need."""
    from sentencepiece import sentencepiece_model_pb2

    return sentencepiece_model_pb2


def _tokenizers() -> Any:
    """Loads tokenizers, which only exports need here."""
    import tokenizers

    return tokenizers


def tokenizer_files(
    vocab: SentencePieceVocabulary, *, max_len: Optional[int] = None, where: str = "tokenizer"
) -> dict[str, bytes]:
    """Returns the files of a tokenizer that gives every text the ids that `vocab` gives it.

    Its pieces have spaces in them rather than SentencePiece's mark for a space, so that a text is not changed
    before it is cut, and a literal mark falls back to its bytes.

    Args:
        vocab: A tokenizer by byte pair encoding that changes nothing in a text, as `train_sentencepiece` makes it.
        max_len: The most tokens of a text that the model was made for; None: not said.
        where: What errors call the tokenizer.

    Returns:
        The content of tokenizer.json, tokenizer_config.json and special_tokens_map.json, by name, and of
        tokenizer.model, for programs that read SentencePiece models.

    Raises:
        ValueError: If the model is of another kind or normalises text.
    """
    model = _model_format().ModelProto.FromString(vocab.model_proto)
    _check(model, where=where)
    pieces = _pieces(model)
    special = {
        "bos_token": pieces.texts[vocab.bos_id],
        "eos_token": pieces.texts[vocab.eos_id],
        "pad_token": pieces.texts[vocab.pad_id],
        "unk_token": pieces.unknown,
    }
    config = {
        # The class that takes tokenizer.json as it is.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "clean_up_tokenization_spaces": False,
        # The name of a special token inside of a text is text, as in training.
        "split_special_tokens": True,
        **({"model_max_length": max_len} if max_len else {}),
    }
    tokenizer = _tokenizer(pieces, bos_token=special["bos_token"], bos_id=vocab.bos_id)
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True).encode("utf-8"),
        "tokenizer_config.json": _json(config),
        "special_tokens_map.json": _json(special),
        "tokenizer.model": vocab.model_proto,
    }


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def _check(model: Any, *, where: str) -> None:
    """Refuses models that do more to a text than to cut it."""
    normalizer, kinds = model.normalizer_spec, model.SentencePiece
    for is_problem, what in (
        (model.trainer_spec.model_type != model.trainer_spec.BPE, "it is not made by byte pair encoding"),
        (not model.trainer_spec.byte_fallback, "unknown characters do not fall back to bytes"),
        (bool(normalizer.precompiled_charsmap), f"it normalises text ({normalizer.name})"),
        (normalizer.add_dummy_prefix, "it puts a space before every text"),
        (normalizer.remove_extra_whitespaces, "it removes spaces"),
        (model.trainer_spec.treat_whitespace_as_suffix, "it puts spaces behind words"),
        (any(piece.type == kinds.UNUSED for piece in model.pieces), "it has unused pieces"),
    ):
        if is_problem:
            raise ValueError(
                error_message(
                    where=where,
                    what=f"this SentencePiece model cannot be written as a tokenizer.json: {what}",
                    expected="a model as `axlearn train_tokenizer` makes it",
                )
            )


def _pieces(model: Any) -> _Pieces:
    kinds = model.SentencePiece
    texts = [
        piece.piece if piece.type in (kinds.CONTROL, kinds.UNKNOWN) else piece.piece.replace(_SPACE_MARK, " ")
        for piece in model.pieces
    ]

    def of_type(*types: int) -> list[tuple[str, float]]:
        return [(text, p.score) for text, p in zip(texts, model.pieces, strict=True) if p.type in types]

    return _Pieces(
        texts=texts,
        scores=dict(of_type(kinds.NORMAL)),
        user_defined=[text for text, _ in of_type(kinds.USER_DEFINED)],
        control=[text for text, _ in of_type(kinds.CONTROL)],
        unknown=of_type(kinds.UNKNOWN)[0][0],
    )


def _tokenizer(pieces: _Pieces, *, bos_token: str, bos_id: int) -> Any:
    library = _tokenizers()
    tokenizer = library.Tokenizer(
        library.models.BPE(
            vocab={text: i for i, text in enumerate(pieces.texts)},
            merges=_merges(pieces.scores),
            byte_fallback=True,
            unk_token=pieces.unknown,
        )
    )
    tokenizer.decoder = library.decoders.Sequence([library.decoders.ByteFallback(), library.decoders.Fuse()])
    tokenizer.post_processor = library.processors.TemplateProcessing(
        single=f"{bos_token} $A", pair=f"{bos_token} $A {bos_token} $B", special_tokens=[(bos_token, bos_id)]
    )
    added = library.AddedToken
    tokenizer.add_special_tokens([added(text, special=True) for text in [*pieces.control, pieces.unknown]])
    # A single character that no larger piece begins or ends with needs no matching before the others.
    is_apart = {text: not any(text in larger for larger in pieces.scores) for text in pieces.user_defined}
    tokenizer.add_tokens(
        [added(text, normalized=False) for text, apart in is_apart.items() if len(text) > 1 or not apart]
    )
    return tokenizer


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Returns the pairs that are put together, the earliest first.

    SentencePiece puts two neighbours together if they make a piece, that of the highest score first; here the
    rank of a pair decides. Every way to make a piece of two gets a rank by the piece's score.
    """
    merges: list[tuple[str, str]] = []
    for piece in sorted((text for text in scores if len(text) > 1), key=lambda text: -scores[text]):
        for i in range(len(piece) - 1, 0, -1):
            left, right = piece[:i], piece[i:]
            if left in scores and right in scores:
                merges.append((left, right))
    return merges
