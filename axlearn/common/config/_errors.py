"""The errors of configs, and the one place that writes messages in the grammar of the house."""

from collections.abc import Sequence
from typing import Any, Optional


class MissingConfigClassDecoratorError(TypeError):
    """A subclass of a config class adds fields without `@config_class`."""


class InvalidConfigClassError(TypeError):
    """`@config_class` stands on something that is not a config."""


class InvalidConfigNameError(ValueError):
    """The name of a field is not one that configs can have."""


class InvalidConfigValueError(TypeError):
    """A field was given a value of the wrong type, or one that configs cannot hold."""


class NonConfigFieldError(ValueError):
    """The body of a config class holds an attribute that is neither an annotated field nor a method."""


class UnknownFieldError(AttributeError):
    """A config has no field of this name."""


class RequiredFieldMissingError(ValueError):
    """A config was to be instantiated while required fields had no value.

    Attributes:
        path: The dotted path of that config, empty where it is the root of its tree.
    """

    def __init__(self, message: str, *, path: str = "") -> None:
        super().__init__(message)
        self.path = path


class FrozenConfigError(RuntimeError):
    """A frozen config was to be changed."""


def _sentence(text: str) -> str:
    """Returns `text` ending in exactly one mark."""
    text = text.rstrip()
    return text if text.endswith((".", "?", "!")) else text + "."


def _alternatives(nearest: Any) -> str:
    if isinstance(nearest, list):
        names = [repr(x) for x in nearest]
        return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
    return repr(nearest)


def error_message(
    *,
    what: str,
    where: Optional[str] = None,
    expected: Optional[str] = None,
    nearest: Any = None,
    advice: Optional[str] = None,
) -> str:
    """Writes an error in the grammar of the house, over one or two lines.

    The first line says where and what: `where: what.`; the second, indented, what was expected, the nearest
    legal thing and what to do.

    Args:
        what: What was wrong, with the offending value.
        where: The dotted path, file or option that the error is about. None: the message starts with `what`.
        expected: What would have been legal, as the end of "Expected ...". None: left out.
        nearest: The legal thing nearest to what was given, or a list of such things, printed with `repr` in
            "Did you mean ...?". None or an empty list: left out.
        advice: What to do, as a sentence. None: left out.

    Returns:
        The message, without a final newline.
    """
    head = _sentence(f"{where}: {what}" if where else what)
    tail = []
    if expected:
        tail.append(_sentence(f"Expected {expected}"))
    if nearest is not None and nearest != []:
        tail.append(f"Did you mean {_alternatives(nearest)}?")
    if advice:
        tail.append(_sentence(advice))
    return head + ("\n  " + " ".join(tail) if tail else "")


def join_messages(messages: Sequence[str], *, heading: str) -> str:
    """Writes several messages as one: a single one as it is, more of them below a heading, indented.

    Args:
        messages: At least one message.
        heading: The first line where there is more than one message, such as "3 overrides cannot be
            applied:".

    Returns:
        One message.
    """
    if len(messages) == 1:
        return messages[0]
    return "\n".join([heading, *("  " + message.replace("\n", "\n  ") for message in messages)])
