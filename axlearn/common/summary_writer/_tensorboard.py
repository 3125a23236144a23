"""TensorBoard event files, without TensorFlow."""

import itertools
import os
import time
from collections.abc import Mapping
from typing import Any, Optional

import jax
import numpy as np

from axlearn.common.config import ConfigBase, config_class
from axlearn.common.module import Module
from axlearn.common.summary_writer._periodic import Images, PeriodicWriter, Value

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


class SummaryWriter(PeriodicWriter):
    """Writes TensorBoard event files, on the first process only.

    Numbers become scalars, arrays of any rank histograms, strings texts, `ImageSummary` images.
    """

    @config_class
    class Config(PeriodicWriter.Config):
        """Configures SummaryWriter."""

        # How many values may wait for the disk (for 10 seconds) before they are written. None: none, every
        # value is written at once.
        max_queue: Optional[int] = None

    def __init__(self, cfg: Config, *, parent: Optional[Module]):
        super().__init__(cfg, parent=parent)
        self._file: Optional[_EventFile] = None

    def _open_file(self) -> _EventFile:
        if self._file is None:
            self._file = _EventFile(self.config.dir, max_queue=self.config.max_queue or 0)
        return self._file

    def _write(self, step: int, values: Mapping[str, Value]) -> None:
        for path, value in values.items():
            file = self._open_file()
            if isinstance(value, Images):
                file.add_images(path, value.images, step)
            elif isinstance(value, str):
                file.add_text(path, value, step)
            elif isinstance(value, float):
                file.add_scalar(path, value, step)
            else:
                file.add_histogram(path, value, step)

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
