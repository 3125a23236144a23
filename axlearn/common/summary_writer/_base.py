"""What a writer is, and the two that need no library: nowhere, and several places at once."""

import abc
from typing import Any, Optional

from axlearn.common.config import REQUIRED, ConfigBase, Required, config_class
from axlearn.common.module import Module
from axlearn.common.utils import Nested


class BaseWriter(Module):
    """Writes the summaries of steps."""

    @config_class
    class Config(Module.Config):
        """Configures BaseWriter."""

        # The folder to write into; made when first needed.
        dir: Required[str] = REQUIRED

    @abc.abstractmethod
    def __call__(self, step: int, values: Nested[Any]) -> None:
        """Writes the summaries of a step.

        Args:
            step: The step.
            values: Nested dicts of Summary, arrays, numbers and strings. Arrays may still be in the making on
                the device: a writer waits for them only if it writes this step.

        Raises:
            TypeError: If a value is of another kind.
        """

    @abc.abstractmethod
    def log_config(self, config: ConfigBase, step: int = 0) -> None:
        """Writes the config of the run, as text, under `trainer_config`."""

    @abc.abstractmethod
    def flush(self) -> None:
        """Returns when everything so far is written."""

    @abc.abstractmethod
    def close(self) -> None:
        """Flushes and closes; another value opens the writer again."""


class NoOpWriter(BaseWriter):
    """Writes nothing."""

    def __call__(self, step: int, values: Nested[Any]) -> None:
        del step, values

    def log_config(self, config: ConfigBase, step: int = 0) -> None:
        del config, step

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


class CompositeWriter(BaseWriter):
    """Writes to several writers."""

    @config_class
    class Config(BaseWriter.Config):
        """Configures CompositeWriter."""

        # The writers by name. One whose dir is not set gets that of the composite.
        writers: Required[dict[str, BaseWriter.Config]] = REQUIRED

    def __init__(self, cfg: "CompositeWriter.Config", *, parent: Optional[Module]):
        super().__init__(cfg, parent=parent)
        self._writers: list[BaseWriter] = []
        for name, writer_cfg in cfg.writers.items():
            if writer_cfg.dir is REQUIRED:
                writer_cfg = writer_cfg.clone(dir=cfg.dir)
            self._writers.append(self._add_child(name, writer_cfg))

    def __call__(self, step: int, values: Nested[Any]) -> None:
        for writer in self._writers:
            writer(step, values)

    def log_config(self, config: ConfigBase, step: int = 0) -> None:
        for writer in self._writers:
            writer.log_config(config, step)

    def flush(self) -> None:
        for writer in self._writers:
            writer.flush()

    def close(self) -> None:
        for writer in self._writers:
            writer.close()
