"""What a config.json says of texts: the ids of special tokens, and how long they may be."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Optional

from axlearn.common.config import error_message
from axlearn.common.hf._fields import Fields


class TextFields(NamedTuple):
    """The fields of a config.json that decide nothing of the model itself.

    Attributes:
        bos_id: The id that a text begins with; None: not said.
        eos_ids: The ids that end a text.
        pad_id: The id that fills a row; None: not said.
        max_len: The most tokens that the model was made for; None: not said.
    """

    bos_id: Optional[int]
    eos_ids: tuple[int, ...]
    pad_id: Optional[int]
    max_len: Optional[int]


def text_fields_from_hf(hf_config: Mapping[str, Any]) -> TextFields:
    """Reads the fields about texts from a config.json.

    Args:
        hf_config: Its contents.

    Raises:
        ValueError: An id is none of the model's vocabulary, or the length is none.
    """
    fields = Fields(hf_config)
    vocab_size = fields.integer("vocab_size")
    one = {
        role: next(iter(_ids(hf_config.get(f"{role}_token_id"), f"{role}_token_id", vocab_size)), None)
        for role in ("bos", "pad")
    }
    return TextFields(
        bos_id=one["bos"],
        eos_ids=_ids(hf_config.get("eos_token_id"), "eos_token_id", vocab_size),
        pad_id=one["pad"],
        max_len=fields.optional_integer("max_position_embeddings"),
    )


def _ids(value: Any, name: str, vocab_size: int) -> tuple[int, ...]:
    """Returns one id or several; none for null and for -1, which some Llamas write for it."""
    values = value if isinstance(value, list) else [value]
    for item in values:
        is_id = isinstance(item, int) and not isinstance(item, bool) and -1 <= item < vocab_size
        if item is not None and not is_id:
            raise ValueError(
                error_message(
                    where=f"config.json: {name}",
                    what=f"{item!r}",
                    expected=f"an id below {vocab_size}, the vocab_size",
                )
            )
    return tuple(item for item in values if item is not None and item >= 0)
