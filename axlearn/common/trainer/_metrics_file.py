"""metrics.jsonl: the run's numbers, one JSON object a line, for programs."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any


class MetricsFile:
    """Appends records to a file of JSON lines.

    A run that is killed and continues writes the steps behind its last checkpoint a second time, with equal
    values: of several records of a step the last one counts. A last line that a kill left unfinished is
    removed when the file is opened. Each record is handed to the operating system at once, so a kill of the
    process loses none.

    Numbers are written with `repr`'s precision, so that reading them gives the same bits; those that JSON
    lacks are written as the strings "nan", "inf" and "-inf".

    Args:
        path: The file; created with the first record.
    """

    def __init__(self, path: str):
        self._path = path
        _remove_unfinished_line(path)

    def write(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Appends one line per record."""
        if not records:
            return
        text = "".join(json.dumps(_json_value(record), allow_nan=False) + "\n" for record in records)
        with open(self._path, "a", encoding="utf-8") as f:
            f.write(text)


def read_metrics(path: str) -> list[dict[str, Any]]:
    """Returns the records of a metrics file in the order of writing, without an unfinished last line."""
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f if line.endswith("\n")]


def _json_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _json_value(v) for k, v in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return value


def _remove_unfinished_line(path: str) -> None:
    if not os.path.exists(path):
        return
    with open(path, "r+b") as f:
        text = f.read()
        if text and not text.endswith(b"\n"):
            f.truncate(text.rfind(b"\n") + 1)
