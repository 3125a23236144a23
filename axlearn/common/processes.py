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
from typing import Optional

from axlearn.common.jax_compat import Coordination, coordination

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
    folder = _meet(peers, tag, text, timeout_seconds=timeout_seconds)
    prefix = f"{folder}/text/"
    values = {
        int(key.rpartition("/")[2]): value for key, value in peers.client.key_value_dir_get_bytes(prefix)
    }
    texts = [values[i].decode("utf-8") for i in range(peers.num_processes)]
    _leave(peers, folder)
    return texts


def gather_text(tag: str, text: str, *, timeout_seconds: float) -> Optional[list[str]]:
    """Like `all_gather_text`, but only process 0 hears something: for texts that are long.

    Returns:
        The texts in the order of processes; None on all but process 0.
    """
    peers = coordination()
    if peers is None:
        return [text]
    folder = _meet(peers, tag, text, timeout_seconds=timeout_seconds)
    texts = None
    if peers.process_index == 0:
        keys = [_key(folder, i) for i in range(peers.num_processes)]
        texts = [_get(peers, key, timeout_seconds=timeout_seconds) for key in keys]
    _leave(peers, folder)
    return texts


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
    folder = _meet(peers, tag, said, timeout_seconds=timeout_seconds)
    heard = _get(peers, _key(folder, 0), timeout_seconds=timeout_seconds)
    _leave(peers, folder)
    return heard


def wait_for_all(tag: str, *, timeout_seconds: float) -> None:
    """Returns when every process has come. The arguments and the errors are those of `all_gather_text`."""
    peers = coordination()
    if peers is not None:
        _leave(peers, _meet(peers, tag, "", timeout_seconds=timeout_seconds))


def post_once(tag: str, text: str) -> str:
    """Puts up a text for all to see, unless somebody was faster; waits for nobody.

    Args:
        tag: Which notice it is. It serves once, as those of meetings do.
        text: What it says.

    Returns:
        What stands there now: `text`, or that of whoever was faster.
    """
    peers = coordination()
    if peers is None:
        return text
    key = f"{_PREFIX}/notice/{tag}"
    try:
        peers.client.key_value_set_bytes(key, text.encode("utf-8"))
    except RuntimeError as e:
        if "ALREADY_EXISTS" not in str(e):
            raise
        return posted(tag) or text
    return text


def posted(tag: str) -> Optional[str]:
    """Returns what `post_once` put up in any process; None as long as there is nothing, or nobody who could."""
    peers = coordination()
    if peers is None:
        return None
    try:
        text: str = peers.client.key_value_try_get_bytes(f"{_PREFIX}/notice/{tag}").decode("utf-8")
    except RuntimeError as e:
        if "NOT_FOUND" not in str(e):
            raise
        return None
    return text


def count_up(tag: str, amount: int = 1) -> int:
    """Adds to a number that all processes share, 0 at first, and returns it."""
    peers = coordination()
    if peers is None:
        return amount
    return int(peers.client.key_value_increment(f"{_PREFIX}/count/{tag}", amount))


def _key(folder: str, process_index: int) -> str:
    return f"{folder}/text/{process_index}"


def _get(peers: Coordination, key: str, *, timeout_seconds: float) -> str:
    """What was said under a key; it is there, so this waits for the store only."""
    return peers.client.blocking_key_value_get_bytes(key, _milliseconds(timeout_seconds)).decode("utf-8")


def _meet(peers: Coordination, tag: str, text: str, *, timeout_seconds: float) -> str:
    """Says `text`, and returns the folder of all texts when everybody has said theirs."""
    folder = f"{_PREFIX}/{tag}"
    try:
        peers.client.key_value_set_bytes(_key(folder, peers.process_index), text.encode("utf-8"))
        # The service decides for all at once whether everybody came in time.
        peers.client.wait_at_barrier(folder, _milliseconds(timeout_seconds))
    except RuntimeError as e:
        if "ALREADY_EXISTS" in str(e):
            raise ValueError(
                f"processes: there was a meeting {tag!r} before. Expected a new tag each time."
            ) from e
        raise _nobody_came(e, peers, tag=tag, folder=folder, timeout_seconds=timeout_seconds) from e
    return folder


def _milliseconds(timeout_seconds: float) -> int:
    return max(1, math.ceil(timeout_seconds * 1000))


def _nobody_came(
    error: RuntimeError, peers: Coordination, *, tag: str, folder: str, timeout_seconds: float
) -> PeerTimeoutError:
    """The error that says who is missing, as far as the service still answers."""
    try:
        present = peers.client.key_value_dir_get_bytes(f"{folder}/text/")
    except RuntimeError:
        missing = "process 0, which runs the service of this meeting, does not answer"
    else:
        came = {int(key.rpartition("/")[2]) for key, _ in present}
        absent = [i for i in range(peers.num_processes) if i not in came]
        if absent:
            missing = f"{_names(absent)} of {peers.num_processes} did not come within {timeout_seconds:g} s"
        else:
            missing = f"somebody came later than {timeout_seconds:g} s, or ended while others waited"
    detail = str(error).splitlines()[0]
    return PeerTimeoutError(
        f"{tag}: process {peers.process_index} waited for the others: {missing}. Expected all of them. See the "
        f"logs of those for why; then start all of them again. (jax says: {detail})"
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
