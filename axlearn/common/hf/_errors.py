"""How this package refuses."""

from collections.abc import Sequence
from typing import Any, Optional

from axlearn.common.config import ConfigBase, error_message, public_name


def refusal(
    where: str, value: Any, *, expected: str, advice: Optional[str] = None, nearest: Optional[Sequence] = None
) -> ValueError:
    """Returns the error about a field that stands for something that does not translate.

    Args:
        where: The field, such as "config.json: hidden_act" or "decoder.output_norm.klass".
        value: Its value.
        expected: What would translate.
        advice: What to do. None: nothing to say.
        nearest: Legal values that are similar. None: none.

    Returns:
        The error, to be raised.
    """
    # Of a config, what it builds or calls.
    if isinstance(value, ConfigBase):
        value = getattr(value, "klass", getattr(value, "fn", value))
    text = public_name(value) if callable(value) else repr(value)
    return ValueError(
        error_message(
            where=where,
            what=f"{text} cannot be translated",
            expected=expected,
            advice=advice,
            nearest=nearest,
        )
    )
