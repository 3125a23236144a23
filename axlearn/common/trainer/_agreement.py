"""When one process is asked to stop, all stop after the same step: each step is a work of all."""

import itertools
import threading
from typing import Optional

from absl import logging

from axlearn.common import notices, processes
from axlearn.common.trainer._signals import StopSignals

# Between two looks for a request of another process. Process 0 answers them all, and a thousand in a second are nothing
# to it.
_LOOK_SECONDS = 0.5
_PROCESSES_PER_SECOND = 1000
# How long a process waits for the answers of the others, which a thread of each gives as soon as its loop is there.
# Much shorter than the time that `axlearn launch slurm` leaves for a save (120 s), so that they can ask again.
_ANSWER_SECONDS = 30.0
# How long the end of a run waits for the thread, which may be asking others whose run has ended already.
_END_SECONDS = 10.0
# A notice serves once, and a process may run several trainers one after another, equally in all processes.
_runs = itertools.count()


class StopAgreement:
    """A context in which a signal to any process reaches the loops of all, behind the same step.

    A request is put up for all to see. A thread of each process finds it, keeps its loop from beginning another step,
    says which step the loop has reached, and hears the same of all others: the step after the last of these is where
    all stop.

    Args:
        signals: The signals that this process gets.
        step: The step behind which the loop begins.
        num_processes: How many processes take part.
    """

    def __init__(self, signals: StopSignals, *, step: int, num_processes: int):
        self._signals = signals
        self._is_alone = num_processes == 1
        # The loop may be beginning the step after this one.
        self._step = step - 1
        # (The step behind which to stop, the signal), once all have agreed.
        self._agreed: Optional[tuple[int, int]] = None
        # Held while others are asked: what this process has told them must stay true.
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._look_seconds = max(_LOOK_SECONDS, num_processes / _PROCESSES_PER_SECOND)
        self._tag = f"trainer/stop/{next(_runs)}"
        # A meeting serves once, whether all came or not.
        self._meetings = itertools.count()
        self._thread = threading.Thread(target=self._watch, name="stop-agreement", daemon=True)

    def __enter__(self) -> "StopAgreement":
        if not self._is_alone:
            self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(timeout=_END_SECONDS)

    def signal_behind(self, step: int) -> Optional[int]:
        """Returns the signal for which to stop behind a step; None: the next step may begin.

        Args:
            step: The last step that was dispatched.
        """
        if self._is_alone:
            return self._signals.received
        with self._lock:
            self._step = step
            if self._agreed is None or step < self._agreed[0]:
                return None
            return self._agreed[1]

    def _watch(self) -> None:
        has_failed = False
        while not self._ended.wait(self._look_seconds):
            try:
                request = self._request()
                if request is not None:
                    self._agree(request)
                    return
            except RuntimeError as e:
                # Process 0 was too busy to answer, or somebody is late or gone. jax's heartbeats tell which: without
                # them no step ends either.
                if not has_failed:
                    logging.warning("The processes could not yet agree on a step to stop behind: %s", e)
                has_failed = True

    def _request(self) -> Optional[int]:
        """Returns the signal that any process got, after telling all of one that this process got."""
        if self._signals.received is not None:
            return int(notices.post_once(f"{self._tag}/request", str(self._signals.received)))
        text = notices.posted(f"{self._tag}/request")
        return None if text is None else int(text)

    def _agree(self, signum: int) -> None:
        with self._lock:
            steps = processes.all_gather_text(
                f"{self._tag}/steps/{next(self._meetings)}",
                str(self._step),
                timeout_seconds=_ANSWER_SECONDS,
            )
            self._agreed = (max(map(int, steps)) + 1, signum)
        logging.info("Signal %d: all processes stop behind step %d.", signum, self._agreed[0])
