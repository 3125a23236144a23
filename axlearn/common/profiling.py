"""Profiles for xprof: at most one is recorded at a time in a process, whoever asks for it."""

import contextlib
import os
from collections.abc import Iterator
from typing import Optional

import jax
from absl import logging

# The folder of the profile that is being recorded; None while none is.
_recording: Optional[str] = None


def start_profile(
    folder: str, *, session: str, options: Optional[jax.profiler.ProfileOptions] = None
) -> bool:
    """Begins to record, unless a profile is being recorded already.

    Args:
        folder: The folder of a summary writer; the profile goes below it to `plugins/profile/<session>`, where
            xprof and TensorBoard look for it.
        session: What the profile is called. Where there is one of that name a number is added, so that none is
            overwritten. All processes of a run name it alike: their files lie side by side.
        options: Levels of detail; None for the profiler's own defaults.

    Returns:
        Whether it began: whoever gets True has to call `stop_profile`. What happens while a profile of somebody
        else is being recorded is in that one.
    """
    global _recording
    if _recording is not None:
        return False
    options = jax.profiler.ProfileOptions() if options is None else options
    options.session_id = _free_name(folder, session)
    jax.profiler.start_trace(folder, profiler_options=options)
    _recording = os.path.join(_parent(folder), options.session_id)
    return True


def stop_profile() -> None:
    """Ends the profile that is being recorded, and writes it."""
    global _recording
    assert _recording is not None, "Only who began a profile ends it."
    folder, _recording = _recording, None
    jax.profiler.stop_trace()
    logging.info("Wrote a profile into %s.", folder)


@contextlib.contextmanager
def profile(folder: str, *, session: str) -> Iterator[None]:
    """A context that is recorded; see `start_profile`."""
    has_begun = start_profile(folder, session=session)
    try:
        yield
    finally:
        if has_begun:
            stop_profile()


def _parent(folder: str) -> str:
    return os.path.join(folder, "plugins", "profile")


def _free_name(folder: str, session: str) -> str:
    """Returns `session`, with a number behind it if there is a profile of that name."""
    name, number = session, 1
    while os.path.exists(os.path.join(_parent(folder), name)):
        number += 1
        name = f"{session}-{number}"
    return name
