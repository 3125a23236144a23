"""Weights & Biases: one of its runs for each training run, which a run that continues continues too."""

import importlib.util
import math
import os
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Optional

import jax
import numpy as np
from absl import logging

from axlearn.common.config import ConfigBase, config_class, error_message
from axlearn.common.file_system import write_text_durably
from axlearn.common.module import Module
from axlearn.common.redaction import redact
from axlearn.common.summary_writer._periodic import Images, PeriodicWriter, Value

_ID_FILE = "wandb_id"
# W&B's own histograms have 64 bins by default.
_NUM_BINS = 64
# Seconds that the end of a run waits for the network. What is not uploaded by then lies on the disk, from where
# `wandb sync` takes it.
_FINISH_SECONDS = 60.0


def _load_wandb() -> Any:
    """The library; loaded when first needed, it takes a second and starts a process of its own."""
    import wandb

    return wandb


class WandBWriter(PeriodicWriter):
    """Writes to Weights & Biases, on the first process only.

    Numbers and texts are logged by their paths, such as `model/accuracy`, arrays as histograms, `ImageSummary`
    as images. Where nothing else is said the environment decides: WANDB_API_KEY, WANDB_PROJECT, WANDB_ENTITY,
    WANDB_MODE and all others that the library reads.

    The id of the W&B run is kept in the file `wandb_id` of the folder, so that a training run that continues
    continues its W&B run. Training never depends on the network: where the run cannot be started online it is
    recorded offline, and when the library fails later on, a warning is logged and nothing more is written.
    """

    @config_class
    class Config(PeriodicWriter.Config):
        """Configures WandBWriter."""

        # The project. None: WANDB_PROJECT.
        project: Optional[str] = None
        # The user or team that owns it. None: WANDB_ENTITY.
        entity: Optional[str] = None
        # The group of runs to which this one belongs. None: WANDB_RUN_GROUP.
        group: Optional[str] = None
        # How the run is shown. None: WANDB_NAME, or a name that W&B makes up.
        run_name: Optional[str] = None
        # Labels of the run. None: WANDB_TAGS.
        tags: Optional[Sequence[str]] = None
        # "offline" only records, for `wandb sync` to upload later; "disabled" does nothing. None: WANDB_MODE.
        mode: Optional[Literal["online", "offline", "disabled"]] = None
        # The folder of the writer of training; a trainer sets it for its evalers. They write into its W&B run,
        # below the name of their own folder. None: the W&B run is that of `dir`.
        train_dir: Optional[str] = None

    def __init__(self, cfg: Config, *, parent: Optional[Module]):
        """Touches neither the network nor a file.

        Raises:
            ValueError: If wandb is not installed.
        """
        super().__init__(cfg, parent=parent)
        if importlib.util.find_spec("wandb") is None:
            raise ValueError(
                error_message(
                    where=self.path(),
                    what="the package wandb is not installed",
                    advice="Install it with `pip install 'axlearn-spmd[wandb]'`, or choose another writer",
                )
            )
        self._run: Optional[_SharedRun] = None

    def _open_run(self) -> "_SharedRun":
        if self._run is None:
            cfg = self.config
            folder = os.path.abspath(cfg.train_dir or cfg.dir)
            self._run = _shared_runs.setdefault(folder, _SharedRun(folder))
            self._run.open(
                self,
                project=cfg.project,
                entity=cfg.entity,
                group=cfg.group,
                name=cfg.run_name,
                tags=None if cfg.tags is None else list(cfg.tags),
                mode=cfg.mode,
            )
        return self._run

    def _write(self, step: int, values: Mapping[str, Value]) -> None:
        cfg = self.config
        prefix = "" if cfg.train_dir is None else f"{os.path.basename(os.path.normpath(cfg.dir))}/"
        self._open_run().log(step, {f"{prefix}{path}": value for path, value in values.items()})

    def log_config(self, config: ConfigBase, step: int = 0) -> None:
        """Writes the fields by their paths, and of secrets only the path."""
        del step
        if jax.process_index() == 0:
            self._open_run().log_config(_config_values(config))

    def flush(self) -> None:
        """Does nothing: another process of the library writes, and tells nobody how far it is."""

    def close(self) -> None:
        """Ends the W&B run if no other writer writes into it; another value continues it."""
        if self._run is not None:
            self._run.close(self)
            self._run = None


# The W&B runs of this process by their folder: the writers of a trainer and of its evalers share one.
_shared_runs: dict[str, "_SharedRun"] = {}


class _SharedRun:
    """A W&B run that several writers write into.

    Args:
        folder: Its folder.
    """

    def __init__(self, folder: str):
        self._folder = folder
        self._users: set[int] = set()
        # The library's run; None before the first value, and for good when the library has failed.
        self._run: Any = None
        # The last step that it has.
        self._step = 0

    def open(self, user: WandBWriter, **kwargs: Any) -> None:
        """Starts or continues the W&B run, unless another writer has."""
        if not self._users:
            self._run = self._start(**kwargs)
            if self._run is not None:
                self._step = self._run.step
        self._users.add(id(user))

    def _start(self, *, mode: Optional[str], **kwargs: Any) -> Any:
        wandb = _load_wandb()
        os.makedirs(self._folder, exist_ok=True)
        settings: dict[str, Any] = {"disable_git": True, "save_code": False}
        for name, value in (("console", "off"), ("finish_timeout", _FINISH_SECONDS)):
            # What is on the screen and in the working tree may hold anything; it is for the user to send it.
            if f"WANDB_{name.upper()}" not in os.environ:
                settings[name] = value
        kwargs = {
            **kwargs,
            "id": self._run_id(),
            "resume": "allow",
            "dir": self._folder,
            "reinit": "create_new",
            "settings": wandb.Settings(**settings),
        }
        try:
            return wandb.init(mode=mode, **kwargs)
        except (wandb.Error, OSError) as e:
            logging.warning(
                "W&B could not start the run online, and records it offline: upload it later with `wandb sync` "
                "from %s. The reason: %s",
                self._folder,
                e,
            )
        try:
            return wandb.init(mode="offline", **kwargs)
        except (wandb.Error, OSError) as e:
            self._fail(e)
            return None

    def _run_id(self) -> str:
        """Returns the id of the run of this folder, and keeps it in a file there."""
        path = os.path.join(self._folder, _ID_FILE)
        if os.path.exists(path):
            with open(path, encoding="utf-8") as f:
                return f.read().strip()
        run_id = os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
        write_text_durably(path, run_id)
        return run_id

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        """Logs values of a step.

        W&B takes the values of a step together, and none of a step before the last one. A training run that
        was killed and continues does some steps again, with equal values; those are left out.
        """
        if self._run is not None and step >= self._step:
            self._step = step
            self._call(lambda: self._run.log({k: _as_logged(v) for k, v in values.items()}, step=step))

    def log_config(self, values: Mapping[str, Any]) -> None:
        """Logs the config."""
        if self._run is not None:
            self._call(lambda: self._run.config.update(values, allow_val_change=True))

    def close(self, user: WandBWriter) -> None:
        """Ends the W&B run behind its last writer."""
        self._users.discard(id(user))
        if not self._users:
            del _shared_runs[self._folder]
            if self._run is not None:
                self._call(self._run.finish)

    def _call(self, fn: Any) -> None:
        """Calls the library; its failures, or those of the process that it talks to, do not stop a training run."""
        try:
            fn()
        except (_load_wandb().Error, OSError) as e:
            self._fail(e)

    def _fail(self, e: Exception) -> None:
        self._run = None
        logging.warning(
            "W&B failed, and gets nothing more of this run: %s: %s. metrics.jsonl has all numbers.",
            type(e).__name__,
            e,
        )


def _as_logged(value: Value) -> Any:
    wandb = _load_wandb()
    if isinstance(value, Images):
        return [wandb.Image(image) for image in value.images]
    if isinstance(value, np.ndarray):
        # A histogram has no place for NaN and infinity.
        return wandb.Histogram(np_histogram=np.histogram(value[np.isfinite(value)], bins=_NUM_BINS))
    return value


def _config_values(config: ConfigBase) -> dict[str, Any]:
    """Returns the leaves of a config by path: JSON values as they are, anything else as the dump prints it."""
    # Separators that no text has.
    lines = config.debug_string(kv_separator="\x1f", field_separator="\x1e").split("\x1e")
    printed = dict(line.split("\x1f", 1) for line in lines)
    values: dict[str, Any] = {}
    for path, value in config.to_flat_dict().items():
        is_plain = isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value))
        values[path] = redact(path, value if is_plain else printed[path])
    return values
