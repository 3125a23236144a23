"""The two faces of progress: a line in place for people, lines with the time for files."""

import io
import math
import re

import pytest

from axlearn.common.progress import Progress, format_duration, progress_text


class _Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.4, "59s"), (59.6, "1m00s"), (187, "3m07s"), (18_120, "5h02m"), (190_800, "2d05h")],
)
def test_durations_read_like_a_clock(seconds, text):
    assert format_duration(seconds) == text


def test_all_that_is_known_stands_in_one_line():
    text = progress_text(
        step=20,
        max_step=400,
        loss=3.14159,
        tokens_per_second=2345.6,
        mfu_full=0.312,
        mfu_causal=0.301,
        seconds_left=187,
    )
    assert text == "step 20/400  loss 3.1416  2,346 tokens/s  MFU 31.2% (causal 30.1%)  ETA 3m07s"
    assert progress_text(step=1, max_step=math.inf, loss=1.0, seconds_left=math.inf) == "step 1  loss 1.0000"


def test_a_file_gets_lines_that_begin_with_the_time():
    stream = io.StringIO()
    progress = Progress(stream)
    progress.update("step 1")
    progress.message("saved")
    progress.close()
    time = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    assert re.fullmatch(f"{time} step 1\n{time} saved\n", stream.getvalue())


def test_a_terminal_gets_one_line_that_is_overwritten(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    stream = _Terminal()
    progress = Progress(stream)
    progress.update("step 10 of many")
    progress.update("step 11")
    progress.message("saved")
    progress.update("step 12")
    progress.close()
    assert stream.getvalue() == "\rstep 10 of many\rstep 11        \nsaved\n\rstep 12\n"


def test_a_narrow_terminal_gets_a_line_that_does_not_wrap(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "10")
    stream = _Terminal()
    Progress(stream).update("0123456789abc")
    assert stream.getvalue() == "\r012345678"
