"""SIGTERM and SIGINT ask the loop to stop after the step it is in; a second one ends the process at once."""

import signal
import threading
from types import FrameType
from typing import Any, Optional

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """A context in which the first SIGTERM or SIGINT sets `received` instead of ending the process.

    Python runs signal handlers in the main thread only, so in any other thread the context does nothing. A
    signal that the process was told to ignore (as a shell does for background jobs) stays ignored.
    """

    def __init__(self) -> None:
        # The signal that asked for the stop; None as long as nobody did.
        self.received: Optional[int] = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for signum in _STOP_SIGNALS:
                if signal.getsignal(signum) is not signal.SIG_IGN:
                    self._previous[signum] = signal.signal(signum, self._on_signal)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous.clear()

    def _on_signal(self, signum: int, frame: Optional[FrameType]) -> None:
        del frame
        if self.received is None:
            self.received = signum
            return
        signal.signal(signum, signal.SIG_DFL)
        signal.raise_signal(signum)
