"""Keeping secrets out of what others read: files of a run, and services that runs report to."""

import re
from typing import Any

# Not every "token": those of a vocabulary are no secret.
_SECRET_NAME = re.compile(
    r"(?i)((auth|access|api|bearer|hf|refresh|session)_?token|secret|passw(or)?d|credential|(api|access|private)_?key)"
)
_SECRET_VALUE = re.compile(
    r"(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|AKIA[0-9A-Z]{16}|ya29\.[\w-]{10,}"
    r"|eyJ[\w-]{10,}\.[\w-]{10,}|://[^/\s:@]+:[^/\s@]+@)"
)
_REDACTED = "<redacted>"


def redact(name: str, value: Any) -> Any:
    """Returns a value, or "<redacted>" in its place if its name or its form is that of a secret.

    Args:
        name: What the value is called, such as the path of a config field.
        value: The value. Items of a list are looked at one by one; of "name=value" the name counts too.
    """
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, (list, tuple)):
        return [redact(name, item) for item in value]
    text = str(value)
    if "=" in text:
        name = f"{name} {text.partition('=')[0]}"
    return _REDACTED if _SECRET_NAME.search(name) or _SECRET_VALUE.search(text) else value
