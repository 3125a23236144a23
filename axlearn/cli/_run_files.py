"""The files of a run that commands read."""

import os

from axlearn.common.config import InstantiableConfig, config_from_json, error_message

_CONFIG = "trainer_config.json"


def read_config(run: str) -> InstantiableConfig:
    """Returns the trainer config that a run wrote when it began.

    Args:
        run: The run directory.

    Raises:
        ValueError: If there is none, or it is not one of this version.
    """
    with open(path_of(run, _CONFIG), encoding="utf-8") as f:
        return config_from_json(f.read())


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
