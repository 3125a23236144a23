"""When what happened in a run, for those who account for its time."""

import contextlib
import enum
import json
import os
import time
from collections.abc import Iterator
from typing import Any, Optional

from axlearn.common.config import (
    REQUIRED,
    Configurable,
    InstantiableConfig,
    Required,
    config_class,
    maybe_instantiate,
)


class Event(enum.Enum):
    """A moment of a run."""

    START_JOB = "start_job"
    END_JOB = "end_job"
    START_STEP = "start_step"


class EventType(enum.Enum):
    """A part of a run that has a duration."""

    TRAINING_PREPARATION = "training_preparation"
    COMPILATION = "compilation"
    EVAL = "eval"
    CHECKPOINT_SAVE = "checkpoint_save"


class Recorder(Configurable):
    """Told about events; subclasses decide what becomes of them."""

    @config_class
    class Config(Configurable.Config):
        """Configures Recorder."""

        # The name of the job in the records. None: it has none.
        name: Optional[str] = None

    def record(self, event: Event, **facts: Any) -> None:
        """Records a moment.

        Args:
            event: What happened.
            **facts: More about it, JSON.
        """
        raise NotImplementedError(type(self))

    @contextlib.contextmanager
    def record_event(self, event: EventType, **facts: Any) -> Iterator[None]:
        """A context whose duration is recorded, also when it is left by an exception."""
        raise NotImplementedError(type(self))
        yield

    @contextlib.contextmanager
    def maybe_monitor_all(self) -> Iterator[None]:
        """A context around a whole run, for recorders that watch it in the background."""
        yield


class EventLog(Recorder):
    """Appends events to a file of JSON lines: `event`, `time` (since 1970), `seconds` for those that last."""

    @config_class
    class Config(Recorder.Config):
        """Configures EventLog."""

        # The file; its folder is made with the first event.
        path: Required[str] = REQUIRED

    def record(self, event: Event, **facts: Any) -> None:
        self._append(event=event.value, time=time.time(), **facts)

    @contextlib.contextmanager
    def record_event(self, event: EventType, **facts: Any) -> Iterator[None]:
        at, start = time.time(), time.perf_counter()
        try:
            yield
        finally:
            self._append(event=event.value, time=at, seconds=time.perf_counter() - start, **facts)

    def _append(self, **record: Any) -> None:
        path = self.config.path
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path, "a", encoding="utf-8") as f:
            f.write(
                json.dumps({**record, **({} if self.config.name is None else {"job": self.config.name})})
                + "\n"
            )


@contextlib.contextmanager
def maybe_record_event(recorder: Optional[Recorder], event: EventType, **facts: Any) -> Iterator[None]:
    """`recorder.record_event`, where there is a recorder."""
    with contextlib.nullcontext() if recorder is None else recorder.record_event(event, **facts):
        yield


def maybe_build_recorder(cfg: Optional[InstantiableConfig]) -> Optional[Recorder]:
    """Returns the recorder of a config, None for None."""
    return None if cfg is None else maybe_instantiate(cfg)
