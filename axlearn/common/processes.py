"""Processes of one run tell each other short texts, through the service that started them together.

No device takes part, so that a background thread may talk while the devices compute, and a process that has died is
a time-out here and not a hang. Texts go through the memory of process 0: a few megabytes take well under a
second, 200 MB half a minute (two processes on one machine, jax 0.10.2).

**Tags.** A meeting has a tag, which every process says. A tag serves once: a second meeting under it would be mixed up
with the first, also where that one failed. So a tag is a purpose and a number that advances equally on all
processes, such as "checkpoint/save/3/manifest" for the third save of a run. Two objects that have the same purpose
in one process need different names in their tags.
"""

import logging
import math
from collections.abc import Callable
from typing import Optional, TypeVar

from axlearn.common.config import error_message
from axlearn.common.jax_compat import Coordination, coordination

_T = TypeVar("_T")

# Below this name in the store, which jax and its libraries use too.
_PREFIX = "axlearn/processes"


class PeerTimeoutError(RuntimeError):
    """Some processes did not come to a meeting: they died, hang, or went on to do something else."""


def all_gather_text(tag: str, text: str, *, timeout_seconds: float) -> list[str]:
    """Every process says a text and hears those of all.

    Args:
        tag: Which meeting it is; see the top of this file.
        text: What this process says.
        timeout_seconds: How long the first one that comes waits for the last one.

    Returns:
        The texts in the order of processes. With one process, `[text]`.

    Raises:
        PeerTimeoutError: If somebody does not come. Then it is raised in all processes that do.
    """
    peers = coordination()
    if peers is None:
        return [text]

    def hear_all(folder: str) -> list[str]:
        said = peers.client.key_value_dir_get_bytes(f"{folder}/text/")
        by_process = {_process_of(key): value for key, value in said}
        return [by_process[i].decode("utf-8") for i in range(peers.num_processes)]

    return _meet(peers, tag, text, hear=hear_all, timeout_seconds=timeout_seconds)


def gather_text(tag: str, text: str, *, timeout_seconds: float) -> Optional[list[str]]:
    """Like `all_gather_text`, but only process 0 hears something: for texts that are long.

    Returns:
        The texts in the order of processes; None on all but process 0.
    """
    peers = coordination()
    if peers is None:
        return [text]

    def hear_if_first(folder: str) -> Optional[list[str]]:
        if peers.process_index != 0:
            return None
        return [_get(peers, folder, i, timeout_seconds) for i in range(peers.num_processes)]

    return _meet(peers, tag, text, hear=hear_if_first, timeout_seconds=timeout_seconds)


def broadcast_text(tag: str, text: Optional[str], *, timeout_seconds: float) -> str:
    """Process 0 says a text, which all hear. The other arguments and the errors are those of `all_gather_text`.

    Args:
        text: What process 0 says; that of the others does not matter.

    Returns:
        The text of process 0.
    """
    peers = coordination()
    is_first = peers is None or peers.process_index == 0
    assert text is not None or not is_first, "Process 0 says a text."
    if peers is None:
        assert text is not None
        return text
    said = text if is_first and text is not None else ""

    def hear_first(folder: str) -> str:
        return _get(peers, folder, 0, timeout_seconds)

    return _meet(peers, tag, said, hear=hear_first, timeout_seconds=timeout_seconds)


def wait_for_all(tag: str, *, timeout_seconds: float) -> None:
    """Returns when every process has come. The arguments and the errors are those of `all_gather_text`."""
    peers = coordination()
    if peers is not None:
        _meet(peers, tag, "", hear=lambda folder: None, timeout_seconds=timeout_seconds)


def _meet(
    peers: Coordination, tag: str, text: str, *, hear: Callable[[str], _T], timeout_seconds: float
) -> _T:
    """Says `text`, and calls `hear` with the folder of all texts when everybody has said theirs."""
    folder = f"{_PREFIX}/{tag}"
    try:
        peers.client.key_value_set_bytes(f"{folder}/text/{peers.process_index}", text.encode("utf-8"))
        # The service decides for all at once whether everybody came in time.
        peers.client.wait_at_barrier(folder, _milliseconds(timeout_seconds))
        heard = hear(folder)
    except RuntimeError as e:
        if "ALREADY_EXISTS" in str(e):
            raise ValueError(
                error_message(
                    where="processes", what=f"There was a meeting {tag!r} before", expected="new tags"
                )
            ) from e
        raise _not_all_came(e, peers, tag=tag, folder=folder, timeout_seconds=timeout_seconds) from e
    _leave(peers, folder)
    return heard


def _get(peers: Coordination, folder: str, process_index: int, timeout_seconds: float) -> str:
    """What a process has said; it is there, so this waits for the store only."""
    key = f"{folder}/text/{process_index}"
    return peers.client.blocking_key_value_get_bytes(key, _milliseconds(timeout_seconds)).decode("utf-8")


def _process_of(key: str) -> int:
    return int(key.rpartition("/")[2])


def _milliseconds(timeout_seconds: float) -> int:
    return max(1, math.ceil(timeout_seconds * 1000))


def _not_all_came(
    error: RuntimeError, peers: Coordination, *, tag: str, folder: str, timeout_seconds: float
) -> PeerTimeoutError:
    """The error that says who is missing, as far as the service still answers."""
    try:
        present = peers.client.key_value_dir_get_bytes(f"{folder}/text/")
    except RuntimeError:
        missing = "process 0, which runs the service of this meeting, does not answer"
    else:
        absent = sorted({*range(peers.num_processes)} - {_process_of(key) for key, _ in present})
        if absent:
            missing = f"{_names(absent)} of {peers.num_processes} did not come within {timeout_seconds:g} s"
        else:
            missing = f"somebody came later than {timeout_seconds:g} s, or ended while others waited"
    return PeerTimeoutError(
        error_message(
            where=tag,
            what=f"Process {peers.process_index} waited for the others: {missing} ({str(error).splitlines()[0]})",
            advice="See their logs for why, and start all processes again",
        )
    )


# How many missing processes an error names.
_MAX_NAMED = 10


def _names(indices: list[int]) -> str:
    more = f" and {len(indices) - _MAX_NAMED} more" if len(indices) > _MAX_NAMED else ""
    word = "process" if len(indices) == 1 else "processes"
    return f"{word} {', '.join(map(str, indices[:_MAX_NAMED]))}{more}"


def _leave(peers: Coordination, folder: str) -> None:
    """Lets the last one who leaves remove what was said."""
    try:
        if peers.client.key_value_increment(f"{folder}/left", 1) == peers.num_processes:
            peers.client.key_value_delete(f"{folder}/")
    except RuntimeError as e:
        # Everybody has heard everything. If something is wrong, the next meeting says so.
        logging.debug("%s: what was said could not be removed: %s", folder, e)
