"""The files of a run that commands read."""

import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any, Optional

from axlearn.common.config import (
    ConfigBase,
    InstantiableConfig,
    Override,
    config_to_json,
    error_message,
)
from axlearn.common.file_system import write_text_durably
from axlearn.common.run_dir import CONFIG_FILE, read_run_config
from axlearn.common.run_record import append_start, override_record

# Of a run that was made from a Hugging Face model: that model's own files.
HF_DIR = "hf"
# What stands on a command line in the place of a tokenizer where there is none.
NO_TOKENIZER = "none"
# What inputs call the number of tokens of a row.
_ROW_LEN_FIELDS = ("max_sequence_length", "source_length")


def read_config(run: str) -> InstantiableConfig:
    """Returns the trainer config that a run wrote when it began; its paths are those of where it is now.

    Args:
        run: The run directory.

    Raises:
        ValueError: If there is none, or it is not one of this version.
    """
    path_of(run, CONFIG_FILE)
    cfg: InstantiableConfig = read_run_config(run)
    return cfg


def write_config_files(
    folder: pathlib.Path, cfg: InstantiableConfig, *, overrides: Sequence[Override]
) -> None:
    """Writes the config of a run that is being made, as text and as JSON, and what the command line changed in it.

    Args:
        folder: The run directory.
        cfg: The config of the trainer.
        overrides: The changes.
    """
    write_text_durably(folder / "trainer_config", cfg.debug_string())
    write_text_durably(folder / CONFIG_FILE, config_to_json(cfg) + "\n")
    changes = [override_record(override) for override in overrides]
    append_start(str(folder), config=None, mesh_rule=None, num_devices=None, overrides=changes)


def path_of(run: str, name: str) -> str:
    """Returns the path of a file of a run.

    Raises:
        ValueError: If there is no such file.
    """
    path = os.path.join(run, name)
    if not os.path.isfile(path):
        raise ValueError(
            error_message(
                where=run,
                what=f"there is no {name}" if os.path.isdir(run) else "there is no such folder",
                expected="the directory of a run that has begun",
                advice="Start one with `python -m axlearn.common.launch_trainer_main --config=NAME`.",
            )
        )
    return path


def checkpoints_dir(path: str) -> pathlib.Path:
    """Returns the folder of checkpoints below a run's directory; where there is none, what was given."""
    below = pathlib.Path(path) / "checkpoints"
    return below if below.is_dir() else pathlib.Path(path)


def context_len(input_cfg: ConfigBase) -> Optional[int]:
    """Returns the length of the rows that a model was trained on, in tokens; None if the input does not say."""
    lengths = []

    def visit(path: str, value: Any) -> None:
        if path.rpartition(".")[2] in _ROW_LEN_FIELDS and isinstance(value, int):
            lengths.append(value)

    input_cfg.visit(visit)
    return max(lengths, default=None)


def read_hf_file(run: str, name: str) -> dict[str, Any]:
    """Returns the contents of a JSON file of the Hugging Face model that a run was made from; empty without one.

    Args:
        run: The run directory.
        name: The file, such as "config.json".

    Raises:
        ValueError: If it is not a JSON object.
    """
    path = pathlib.Path(run) / HF_DIR / name
    return read_json_object(path) if path.is_file() else {}


def read_json_object(path: pathlib.Path) -> dict[str, Any]:
    """Returns the contents of a JSON file.

    Raises:
        ValueError: If it is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is not a JSON object")
    except (RecursionError, ValueError) as e:
        raise ValueError(error_message(where=str(path), what=f"it cannot be read ({e})")) from e
    return content
