"""One process of several fails: the others hear why, and end with it, instead of waiting for it in a collective.

A process that waits for the devices cannot raise an exception, so it is a thread that looks for the news and ends the
process. What dies without a word (SIGKILL, a host that loses power) is found out by the heartbeats of jax.distributed.
"""

import atexit
import json
import logging
import os
import sys
import threading
import time
from typing import Any, Optional

from axlearn.common import jax_compat, notices

_FAILURE = "launch/failure"
_LEFT = "launch/left"
# Between two looks. Process 0 answers them all, and a thousand in a second are nothing to it.
_LOOK_SECONDS = 0.5
_PROCESSES_PER_SECOND = 1000
# How long process 0, which keeps the news, stays after a failure for the others to hear of it.
_STAY_SECONDS = 15.0


# Taken for good by the thread that ends the process: each process is to be counted once.
_leaving = threading.Lock()
# The service over which this process watches its peers. None: it does not, or has none.
_peers: Optional[jax_compat.Coordination] = None


def watch_peers() -> None:
    """Starts the thread that ends this process when another one has failed; with one process, does nothing."""
    global _peers
    peers = jax_compat.coordination()
    if peers is None or _peers is not None:
        return
    _peers = peers
    interval = max(_LOOK_SECONDS, peers.num_processes / _PROCESSES_PER_SECOND)
    ended = threading.Event()
    thread = threading.Thread(target=_watch, args=(peers, ended, interval), name="peer-failures", daemon=True)
    thread.start()

    def stop() -> None:
        ended.set()
        thread.join(timeout=5)

    # Before jax says goodbye to the others, which it does at exit too.
    atexit.register(stop)


def end_with_peers(*, status: int, text: str) -> None:
    """Ends this process and all others because this one has failed; unless it watches peers, does nothing.

    Args:
        status: The exit status of all of them.
        text: Why, for those who look at the output of another process.
    """
    peers = _peers
    if peers is None:
        return
    word = json.dumps({"process": peers.process_index, "status": status, "text": text})
    try:
        first = json.loads(notices.post_once(_FAILURE, word))
    except RuntimeError as e:
        logging.warning("Process 0 cannot be told that this process failed: %s", str(e).splitlines()[0])
        first = json.loads(word)
    if first["process"] != peers.process_index and first["text"] != text:
        _print_failure(first, peers)
    _leave(peers, status=first["status"])


def _watch(peers: jax_compat.Coordination, ended: threading.Event, interval: float) -> None:
    while not ended.wait(interval):
        try:
            word = notices.posted(_FAILURE)
        except RuntimeError:
            # Process 0 is gone, or this process is about to leave. jax's own heartbeats tell which.
            continue
        if word is None:
            continue
        failure = json.loads(word)
        if failure["process"] == peers.process_index:
            return
        _print_failure(failure, peers)
        _leave(peers, status=failure["status"])


def _print_failure(failure: dict[str, Any], peers: jax_compat.Coordination) -> None:
    lines = [f"Process {failure['process']} of {peers.num_processes} failed, and all end with it. It said:"]
    lines += [f"  {line}" for line in failure["text"].splitlines()]
    print("\n".join(lines), file=sys.stderr, flush=True)


def _leave(peers: jax_compat.Coordination, *, status: int) -> None:
    """Ends the process without more ado: other threads of it may be waiting for those that are gone."""
    _leaving.acquire()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    try:
        num_left: Optional[int] = notices.count_up(_LEFT)
        deadline = time.monotonic() + _STAY_SECONDS
        while peers.process_index == 0 and num_left != peers.num_processes and time.monotonic() < deadline:
            time.sleep(0.1)
            num_left = notices.count_up(_LEFT, 0)
    except RuntimeError as e:
        logging.debug("The others could not be told: %s", e)
    os._exit(status)
