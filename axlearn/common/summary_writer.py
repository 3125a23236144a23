"""Where summaries go: TensorBoard files, several places at once, or nowhere."""

import abc
import itertools
import os
import re
import time
from collections.abc import Mapping
from typing import Any, Optional

import jax
import numpy as np

from axlearn.common.config import REQUIRED, ConfigBase, Required, config_class
from axlearn.common.module import Module
from axlearn.common.summary import ImageSummary, is_summary
from axlearn.common.utils import Nested, flatten_items

# Values that wait for the disk are written after this time, however few: what a killed run loses at most.
_FLUSH_SECONDS = 10.0
# Equal-width bins of a histogram; TensorBoard shows 30 by default.
_NUM_BINS = 60

_num_files = itertools.count()


def _load_tensorboardx() -> tuple[Any, Any, Any]:
    """The parts of tensorboardX that encode and write events, without TensorFlow; loaded when first needed."""
    from tensorboardX import event_file_writer, summary
    from tensorboardX.proto import event_pb2

    return event_file_writer, summary, event_pb2


class _EventFile:
    """A TensorBoard event file.

    Made of the parts of tensorboardX and not of its SummaryWriter, whose `flush` does not wait for its own
    queue.
    """

    def __init__(self, path: str, *, max_queue: int):
        event_file_writer, self._encode, self._proto = _load_tensorboardx()
        os.makedirs(path, exist_ok=True)
        # The library names files by the second, and overwrites: two writers of one second would share a file.
        suffix = f".{os.getpid()}.{next(_num_files)}"
        self._file = event_file_writer.EventsWriter(os.path.join(path, "events"), suffix)
        self._max_queue = max_queue
        self._num_pending = 0
        self._last_flush = time.monotonic()

    def _add(self, summary: Any, step: int) -> None:
        self._file.write_event(self._proto.Event(summary=summary, step=step, wall_time=time.time()))
        self._num_pending += 1
        if self._num_pending > self._max_queue or time.monotonic() - self._last_flush > _FLUSH_SECONDS:
            self.flush()

    def add_scalar(self, path: str, value: float, step: int) -> None:
        self._add(self._encode.scalar(path, value), step)

    def add_text(self, path: str, text: str, step: int) -> None:
        self._add(self._encode.text(path, text), step)

    def add_histogram(self, path: str, values: np.ndarray, step: int) -> None:
        # A histogram has no place for NaN and infinity.
        finite = values[np.isfinite(values)]
        if finite.size:
            self._add(self._encode.histogram(path, finite, bins=_NUM_BINS), step)

    def add_images(self, path: str, images: np.ndarray, step: int) -> None:
        for i, image in enumerate(images):
            name = path if len(images) == 1 else f"{path}/{i}"
            self._add(self._encode.image(name, image, dataformats="HWC"), step)

    def flush(self) -> None:
        self._file.flush()
        self._num_pending = 0
        self._last_flush = time.monotonic()

    def close(self) -> None:
        self._file.close()


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


class SummaryWriter(BaseWriter):
    """Writes TensorBoard event files, on the first process only.

    Numbers become scalars, arrays of any rank histograms, strings texts, `ImageSummary` images.
    """

    @config_class
    class Config(BaseWriter.Config):
        """Configures SummaryWriter."""

        # Steps that are multiples of this number are written.
        write_every_n_steps: int = 1
        # Numbers that replace it for summaries whose whole path matches a regular expression; the first one
        # wins. None: there are no exceptions.
        write_every_n_steps_map: Optional[dict[str, int]] = None
        # How many values may wait for the disk (for 10 seconds) before they are written. None: none, every
        # value is written at once.
        max_queue: Optional[int] = None

    def __init__(self, cfg: "SummaryWriter.Config", *, parent: Optional[Module]):
        super().__init__(cfg, parent=parent)
        numbers = {"write_every_n_steps": cfg.write_every_n_steps}
        for pattern, number in (cfg.write_every_n_steps_map or {}).items():
            numbers[f"write_every_n_steps_map[{pattern!r}]"] = number
        for field, number in numbers.items():
            if number < 1:
                raise ValueError(
                    f"{self.path()}.{field}={number} is not a number of steps. Expected at least 1."
                )
        self._file: Optional[_EventFile] = None

    def _open_file(self) -> _EventFile:
        if self._file is None:
            self._file = _EventFile(self.config.dir, max_queue=self.config.max_queue or 0)
        return self._file

    def _is_due(self, path: str, step: int) -> bool:
        cfg = self.config
        for pattern, number in (cfg.write_every_n_steps_map or {}).items():
            if re.fullmatch(pattern, path):
                return step % number == 0
        return step % cfg.write_every_n_steps == 0

    def __call__(self, step: int, values: Nested[Any]) -> None:
        if jax.process_index() != 0:
            return
        items = flatten_items(values, is_leaf=is_summary)
        due = {path: value for path, value in items if self._is_due(path, step)}
        # One fetch for all arrays: the copies from the device overlap.
        for path, value in jax.device_get(due).items():
            self._write(path, value, step=step)

    def _write(self, path: str, value: Any, *, step: int) -> None:
        file = self._open_file()
        if is_summary(value):
            value.validate()
        if isinstance(value, ImageSummary):
            file.add_images(path, np.asarray(value.value()), step)
            return
        if is_summary(value):
            # A summary may compute its value from fetched arrays with jax.
            value = jax.device_get(value.value())
        if isinstance(value, Mapping):
            for name, nested in flatten_items(value):
                self._write(f"{path}/{name}", nested, step=step)
        elif isinstance(value, str):
            file.add_text(path, value, step)
        elif isinstance(value, bool | int | float | np.ndarray | np.generic):
            # The library knows no bfloat16.
            array = np.asarray(value, dtype=np.float64)
            if array.ndim == 0:
                file.add_scalar(path, float(array), step)
            else:
                file.add_histogram(path, array, step)
        else:
            raise TypeError(
                f"{self.path()}: the summary {path!r} is of type {type(value).__name__}. Expected a "
                "Summary, an array, a number or a string."
            )

    def log_config(self, config: ConfigBase, step: int = 0) -> None:
        if jax.process_index() == 0:
            self._open_file().add_text("trainer_config", config.debug_string(), step)

    def flush(self) -> None:
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
