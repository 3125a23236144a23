"""Says where a run hangs, and ends it when it hangs for good."""

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Optional

from absl import logging

# The longest pause between two looks at the step.
_MAX_CHECK_INTERVAL_SECONDS = 600.0


class Watchdog:
    """A context with a thread that writes all threads' stacks to standard error when the step has not moved.

    Args:
        get_step: Returns the last step that was dispatched.
        timeout_seconds: Seconds without a new step after which the stacks are written; None for no watchdog.
        crash_timeout_seconds: Seconds without a new step, once there was one, after which the process kills
            itself with SIGKILL so that whoever supervises it can start it again; None for never.
    """

    def __init__(
        self,
        get_step: Callable[[], Optional[int]],
        *,
        timeout_seconds: Optional[float],
        crash_timeout_seconds: Optional[float],
    ):
        self._get_step = get_step
        self._timeout = timeout_seconds
        self._crash_timeout = crash_timeout_seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._timeout is not None or self._crash_timeout is not None:
            self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        timeouts = [t for t in (self._timeout, self._crash_timeout) if t is not None]
        interval = min(_MAX_CHECK_INTERVAL_SECONDS, *timeouts)
        first_step = step = self._get_step()
        moved_at = time.monotonic()
        while not self._ended.wait(interval):
            now_at = self._get_step()
            if now_at != step:
                step, moved_at = now_at, time.monotonic()
                continue
            self._on_no_progress(step, seconds=time.monotonic() - moved_at, has_moved=step != first_step)

    def _on_no_progress(self, step: Optional[int], *, seconds: float, has_moved: bool) -> None:
        if self._timeout is not None and seconds >= self._timeout:
            logging.error("No new step for %.0f s, after step %s. The stacks of all threads:", seconds, step)
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        if self._crash_timeout is not None and seconds >= self._crash_timeout and has_moved:
            logging.error("No new step for %.0f s, after step %s: ending the process.", seconds, step)
            os.kill(os.getpid(), signal.SIGKILL)
