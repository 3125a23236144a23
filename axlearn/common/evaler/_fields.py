"""Filling in what only the owner of a part knows, such as the folder of the run."""

from typing import Any

from axlearn.common.config import REQUIRED, InstantiableConfig
from axlearn.common.summary_writer import CompositeWriter


def maybe_set_fields(cfg: InstantiableConfig, **fields: Any) -> Any:
    """Returns a copy of `cfg` with those of `fields` set that it has and leaves at None or REQUIRED.

    Args:
        cfg: A config; it stays as it is.
        **fields: What its owner knows, such as the folder of a writer.
    """
    is_open = lambda name: name in cfg and (getattr(cfg, name) is None or getattr(cfg, name) is REQUIRED)  # noqa: E731
    return cfg.clone(**{name: value for name, value in fields.items() if is_open(name)})


def set_writer_fields(cfg: InstantiableConfig, **fields: Any) -> Any:
    """Like `maybe_set_fields`, also for the writers inside a `CompositeWriter`.

    Those get the composite's folder where they have none of their own.

    Args:
        cfg: The config of a writer; it stays as it is.
        **fields: What its owner knows.
    """
    cfg = maybe_set_fields(cfg, **fields)
    if isinstance(cfg, CompositeWriter.Config) and cfg.writers is not REQUIRED:
        fields = {**fields, "dir": cfg.dir}
        cfg.writers = {name: set_writer_fields(writer, **fields) for name, writer in cfg.writers.items()}
    return cfg
