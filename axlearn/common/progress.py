"""What a person sees of a run: a line that changes in place on a terminal, lines with the time in a log."""

import datetime
import math
import os
import shutil
import sys
from typing import Optional, TextIO


def format_duration(seconds: float) -> str:
    """Returns a duration as "42s", "3m07s", "5h02m" or "2d05h"."""
    total = round(seconds)
    minutes, hours, days = total // 60, total // 3600, total // 86400
    if days:
        return f"{days}d{hours % 24:02d}h"
    if hours:
        return f"{hours}h{minutes % 60:02d}m"
    if minutes:
        return f"{minutes}m{total % 60:02d}s"
    return f"{total}s"


def progress_text(
    *,
    step: int,
    max_step: float,
    loss: float,
    tokens_per_second: Optional[float] = None,
    mfu_full: Optional[float] = None,
    mfu_causal: Optional[float] = None,
    seconds_left: Optional[float] = None,
) -> str:
    """Returns one line about a step; what is None is left out.

    Args:
        step: The last step that was finished.
        max_step: Where the run ends; infinity for a run without an end.
        loss: The training loss of `step`.
        tokens_per_second: The pace since the last line.
        mfu_full: Model FLOPs utilisation counting full attention, as a fraction.
        mfu_causal: The same counting the attention that a causal mask leaves.
        seconds_left: The expected time to `max_step`.
    """
    end = "" if math.isinf(max_step) else f"/{max_step:.0f}"
    parts = [f"step {step}{end}", f"loss {loss:.4f}"]
    if tokens_per_second is not None:
        parts.append(f"{tokens_per_second:,.0f} tokens/s")
    if mfu_full is not None and mfu_causal is not None:
        parts.append(f"MFU {mfu_full:.1%} (causal {mfu_causal:.1%})")
    if seconds_left is not None and math.isfinite(seconds_left):
        parts.append(f"ETA {format_duration(seconds_left)}")
    return "  ".join(parts)


class Progress:
    """Writes progress and messages to a stream.

    On a terminal, progress overwrites itself and messages push it down; in a file or pipe each is a line that
    begins with the local time.

    Args:
        stream: Where to write; None for standard output.
        is_silent: Whether to write nothing, because another process of the run does.
    """

    def __init__(self, stream: Optional[TextIO] = None, *, is_silent: bool = False):
        self._stream = sys.stdout if stream is None else stream
        self._is_silent = is_silent
        self._is_terminal = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        # Characters of the progress line on which the cursor stands.
        self._line_len = 0

    def update(self, text: str) -> None:
        """Shows the state of the run, in place of the one shown before where that is possible."""
        if self._is_silent:
            return
        if not self._is_terminal:
            self._write_line(text)
            return
        # A line that wraps cannot be overwritten by "\r".
        text = text[: max(shutil.get_terminal_size().columns - 1, 1)]
        self._stream.write("\r" + text.ljust(self._line_len))
        self._stream.flush()
        self._line_len = len(text)

    def message(self, text: str) -> None:
        """Shows something that stays."""
        if self._is_silent:
            return
        if not self._is_terminal:
            self._write_line(text)
            return
        self.close()
        self._stream.write(text + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Ends the progress line, so that what others write begins on a line of its own."""
        if self._line_len:
            self._stream.write("\n")
            self._stream.flush()
            self._line_len = 0

    def _write_line(self, text: str) -> None:
        now = datetime.datetime.now().isoformat(sep=" ", timespec="seconds")
        self._stream.write(f"{now} {text}\n")
        self._stream.flush()
