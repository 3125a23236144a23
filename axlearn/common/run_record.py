"""`overrides.json` of a run: every start of it, and what the command line changed at each; loads nothing heavy."""

import datetime
import json
import logging
import os
from collections.abc import Sequence
from math import isfinite
from typing import Any, Optional

from axlearn.common.config import Override, override_lines, split_assignment, value_text
from axlearn.common.file_system import write_text_durably
from axlearn.common.redaction import redact

RECORD_FILE = "overrides.json"
_UNREADABLE_SUFFIX = ".unreadable"


def override_record(override: Override) -> dict[str, Any]:
    """Returns an override as a JSON object: numbers and strings as they are, anything else as text."""
    return {
        "path": override.path,
        "old": _json_value(override.old),
        "new": _json_value(override.new),
        "text": override.text,
        "dropped": list(override.dropped),
    }


def _json_value(value: Any) -> Any:
    is_json = (
        value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and isfinite(value))
    )
    return value if is_json else value_text(value)


def redacted_overrides(overrides: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns override records with values replaced that look like secrets."""
    return [
        {key: _redacted(override["path"], key, value) for key, value in override.items()}
        for override in overrides
    ]


def _redacted(path: str, key: str, value: Any) -> Any:
    """Returns an entry of an override's record without secrets."""
    if key == "dropped":
        return _redacted_lines(value)
    return value if key == "path" else redact(path, value)


def _redacted_text(override: Override) -> str:
    """Returns what was typed, with the value left out where it is a secret."""
    typed, value = split_assignment(override.text)
    return f"{typed}={redact(override.path, value)}"


def _redacted_lines(lines: Sequence[str]) -> list[str]:
    """Returns lines of `path: value` without secrets: what was dropped is called otherwise than what replaced it."""
    parts = [line.partition(": ") for line in lines]
    return [f"{path}{colon}{redact(path, value)}" for path, colon, value in parts]


def log_overrides(overrides: Sequence[Override]) -> None:
    """Logs what overrides did that their texts do not say; see `override_lines`. Secrets are left out."""
    shown = [
        override._replace(
            old=redact(override.path, override.old) if isinstance(override.old, str) else override.old,
            new=redact(override.path, override.new) if isinstance(override.new, str) else override.new,
            text=_redacted_text(override),
            dropped=tuple(_redacted_lines(override.dropped)),
        )
        for override in overrides
    ]
    for line in override_lines(shown):
        logging.warning("%s", line)


def append_start(
    run_dir: str,
    *,
    config: Optional[str],
    mesh_rule: Optional[str],
    num_devices: Optional[int],
    overrides: Sequence[dict[str, Any]],
) -> None:
    """Adds a start to the record of a run.

    The record is a JSON list, the first start first; `trainer_config` beside it is always that of the last. A file
    that cannot be read is set aside: a run does not stop because of what somebody wrote into its record.

    Args:
        run_dir: The run directory.
        config: The name of the recipe; None where the run's own config was continued.
        mesh_rule: The rule that the mesh selector chose; None where there was no selector.
        num_devices: The devices of all processes; None where a run was prepared and not started.
        overrides: What was changed, from `override_record`.
    """
    path = os.path.join(run_dir, RECORD_FILE)
    start = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "config": config,
        "mesh_rule": mesh_rule,
        "num_devices": num_devices,
        "overrides": redacted_overrides(overrides),
    }
    write_text_durably(path, json.dumps([*_starts(path), start], indent=2) + "\n")


def applied_mesh_rule(run_dir: str) -> Optional[str]:
    """Returns the mesh rule whose changes are in the config that a run has in its directory, in words.

    Args:
        run_dir: The run directory; nothing in it is changed.

    Returns:
        What `append_start` was told; None where there was no rule, or the record says nothing of one.
    """
    try:
        starts = _read(os.path.join(run_dir, RECORD_FILE))
    except (OSError, RecursionError, ValueError):
        return None
    for start in reversed(starts):
        if not isinstance(start, dict):
            continue
        if start.get("mesh_rule") is not None:
            return str(start["mesh_rule"])
        if start.get("config") is not None:
            # The recipe was asked again, and no rule.
            return None
    return None


def _read(path: str) -> list[Any]:
    with open(path, encoding="utf-8") as f:
        starts = json.load(f)
    if not isinstance(starts, list):
        raise ValueError("it is no list")
    return starts


def _starts(path: str) -> list[Any]:
    """Returns the starts so far."""
    if not os.path.exists(path):
        return []
    try:
        starts = _read(path)
    except (RecursionError, ValueError) as e:
        os.replace(path, path + _UNREADABLE_SUFFIX)
        logging.warning("%s cannot be read (%s); it is now called %s.", path, e, path + _UNREADABLE_SUFFIX)
        return []
    is_old_form = any(isinstance(entry, dict) and "path" in entry for entry in starts)
    # Runs that began before 2026-11-21 hold the overrides of their last start alone.
    return [{"time": None, "overrides": starts}] if is_old_form else starts
