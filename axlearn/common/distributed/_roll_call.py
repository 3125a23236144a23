"""All processes of a run report to process 0 before jax.distributed starts, or everybody hears who is missing.

`jax.distributed.initialize` ends a process from C++ when a peer does not come, with a stack trace and without a name
(jax 0.10.2 to 0.12). So process 0 first listens on the very port that jax will use, counts who comes, and tells all
that came how it ended; then the port is free for jax. What travels are two lines of JSON per process.
"""

import contextlib
import errno
import json
import logging
import os
import selectors
import socket
import time
from collections.abc import Iterator
from typing import Any, Optional

from axlearn.common.config import error_message
from axlearn.common.distributed._place import Place

_GREETING = "axlearn-roll-call-1"
# A port that an earlier attempt of the same run still holds is free when that one has ended.
_PORT_WAIT_SECONDS = 20.0
_RETRY_SECONDS = 0.5
_CONNECT_SECONDS = 5.0
# How much longer others wait for the word of process 0, which may have begun to wait after them.
_GRACE_SECONDS = 10.0
# Nobody who takes part says more than this.
_MAX_LINE_BYTES = 4096
# How many processes a message names.
_MAX_NAMED = 10


class PeersMissingError(RuntimeError):
    """Not all processes of a run came together; starting all of them again may help."""


def hold_roll_call(place: Place, *, timeout_seconds: float) -> None:
    """Returns when all processes of the run are there.

    Args:
        place: The place of this process, with a coordinator.
        timeout_seconds: How long to wait for the last one.

    Raises:
        PeersMissingError: If somebody does not come, or two say that they are the same process, or they do not
            agree on how many they are. All that came raise it.
    """
    assert not place.is_alone
    if place.process_id == 0:
        _call_the_roll(place, timeout_seconds=timeout_seconds)
    else:
        _report(place, timeout_seconds=timeout_seconds)


# Process 0.


def _call_the_roll(place: Place, *, timeout_seconds: float) -> None:
    deadline = time.monotonic() + timeout_seconds
    with _listen(place) as server:
        roll = _Roll(place, server)
        try:
            while len(roll.present) < roll.num_processes - 1:
                left = deadline - time.monotonic()
                if left <= 0:
                    roll.fail(roll.missing_text(timeout_seconds))
                roll.receive(timeout_seconds=min(left, 1.0))
            roll.answer({"ok": True})
        finally:
            roll.close()


@contextlib.contextmanager
def _listen(place: Place) -> Iterator[socket.socket]:
    """Opens the port of the coordinator on all addresses of this machine, as jax does."""
    assert place.coordinator is not None
    port = int(place.coordinator.rpartition(":")[2])
    deadline = time.monotonic() + _PORT_WAIT_SECONDS
    while True:
        try:
            server = _open(port)
            break
        except OSError as e:
            if e.errno == errno.EADDRINUSE and time.monotonic() < deadline:
                time.sleep(_RETRY_SECONDS)
                continue
            raise PeersMissingError(
                error_message(
                    where=f"coordinator {place.coordinator}",
                    what=f"process 0 cannot listen on port {port} of {socket.gethostname()}: {e.strerror or e}",
                    expected="a port that is free",
                    advice="Another run may be using it; choose another port, the same for all processes.",
                )
            ) from e
    with server:
        yield server


def _open(port: int) -> socket.socket:
    backlog = 1024
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(
                ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=backlog
            )
    return socket.create_server(("", port), backlog=backlog)


class _Roll:
    """Who has come, on the side of process 0."""

    def __init__(self, place: Place, server: socket.socket):
        assert place.num_processes is not None
        self.num_processes = place.num_processes
        # Connection and name by process.
        self.present: dict[int, tuple[socket.socket, str]] = {}
        self._place = place
        self._server = server
        self._unread: dict[socket.socket, bytes] = {}
        self._selector = selectors.DefaultSelector()
        server.setblocking(False)
        self._selector.register(server, selectors.EVENT_READ)

    def receive(self, *, timeout_seconds: float) -> None:
        """Takes in what comes within a time: new processes, their words, and that some have gone again."""
        for key, _ in self._selector.select(timeout_seconds):
            if key.fileobj is self._server:
                with contextlib.suppress(OSError):
                    connection, _ = self._server.accept()
                    connection.setblocking(False)
                    self._selector.register(connection, selectors.EVENT_READ)
                    self._unread[connection] = b""
            else:
                assert isinstance(key.fileobj, socket.socket)
                self._read(key.fileobj)

    def _read(self, connection: socket.socket) -> None:
        try:
            data = connection.recv(_MAX_LINE_BYTES)
        except OSError:
            data = b""
        line = self._unread[connection] + data
        if not data or len(line) > _MAX_LINE_BYTES:
            self._forget(connection)
            return
        self._unread[connection] = line
        if line.endswith(b"\n"):
            hello = _parsed(line)
            if not _is_hello(hello):
                # Somebody else's: a port scanner, a health check.
                self._forget(connection)
            else:
                assert hello is not None
                self._note(connection, hello)

    def _note(self, connection: socket.socket, hello: dict[str, Any]) -> None:
        process_id, name = hello["process_id"], str(hello["name"])
        if hello["num_processes"] != self.num_processes:
            self.fail(
                f"process {process_id} ({name}) says that there are {hello['num_processes']} processes, and process "
                f"0 ({_own_name()}) that there are {self.num_processes}",
                also=connection,
            )
        if not 0 <= process_id < self.num_processes:
            self._forget(connection)
            return
        if process_id in self.present or process_id == 0:
            other = _own_name() if process_id == 0 else self.present[process_id][1]
            self.fail(
                f"two processes say that they are number {process_id}: {other} and {name}", also=connection
            )
        self.present[process_id] = (connection, name)

    def _forget(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        self._unread.pop(connection)
        connection.close()
        self.present = {i: entry for i, entry in self.present.items() if entry[0] is not connection}

    def missing_text(self, timeout_seconds: float) -> str:
        missing = [i for i in range(1, self.num_processes) if i not in self.present]
        came = [f"0 ({_own_name()})", *(f"{i} ({name})" for i, (_, name) in sorted(self.present.items()))]
        return (
            f"{len(came)} of {self.num_processes} processes came within {timeout_seconds:g} s; missing: "
            f"{_listed(list(map(str, missing)))}; there: {_listed(came)}"
        )

    def fail(self, what: str, *, also: Optional[socket.socket] = None) -> None:
        """Tells all that have come what is wrong, and raises it."""
        message = error_message(
            where=f"coordinator {self._place.coordinator}",
            what=what,
            expected=f"processes 0 to {self.num_processes - 1}, once each",
            advice="Look at the output of those that are missing, and whether they can reach the coordinator.",
        )
        self.answer({"error": message}, also=also)
        raise PeersMissingError(message)

    def answer(self, word: dict[str, Any], *, also: Optional[socket.socket] = None) -> None:
        connections = [connection for connection, _ in self.present.values()]
        for connection in [*connections, *([] if also is None else [also])]:
            with contextlib.suppress(OSError):
                connection.setblocking(True)
                connection.settimeout(_CONNECT_SECONDS)
                connection.sendall(_line(word))
        # They close first, so that the port is not held for the connections' sake.
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.recv(1)

    def close(self) -> None:
        for connection in list(self._unread):
            self._forget(connection)
        self._selector.close()


# The others.


def _report(place: Place, *, timeout_seconds: float) -> None:
    """Reports to process 0 again and again until it answers."""
    assert place.coordinator is not None
    deadline = time.monotonic() + timeout_seconds
    problem = "nobody listens there"
    has_said_so = False
    while time.monotonic() < deadline:
        try:
            word = _ask(place, deadline=deadline + _GRACE_SECONDS)
        except (OSError, ValueError) as e:
            problem = str(e)
            if not has_said_so:
                logging.info("%s: waiting for process 0 at %s.", place, place.coordinator)
                has_said_so = True
            time.sleep(_RETRY_SECONDS)
            continue
        if "error" in word:
            raise PeersMissingError(str(word["error"]))
        return
    raise PeersMissingError(
        error_message(
            where=f"coordinator {place.coordinator}",
            what=f"process {place.process_id} of {place.num_processes} ({_own_name()}) did not reach process 0 within "
            f"{timeout_seconds:g} s: {problem}",
            expected=f"process 0 to listen there, which {place.origins.get('coordinator', 'the coordinator')} says",
            advice="Check that process 0 runs and on which host, and that nothing between the two blocks the port.",
        )
    )


def _ask(place: Place, *, deadline: float) -> dict[str, Any]:
    """Reports once, and waits for the answer.

    Raises:
        OSError: If there is nobody.
        ValueError: If it is somebody else.
    """
    assert place.coordinator is not None
    host, _, port = place.coordinator.rpartition(":")
    hello = {
        "greeting": _GREETING,
        "process_id": place.process_id,
        "num_processes": place.num_processes,
        "name": _own_name(),
    }
    with socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS) as connection:
        connection.sendall(_line(hello))
        connection.settimeout(max(deadline - time.monotonic(), _CONNECT_SECONDS))
        answer = connection.makefile("rb").readline(1 << 20)
    if not answer:
        raise ConnectionError("process 0 hung up without an answer")
    word = _parsed(answer)
    if word is None or not {"ok", "error"} & word.keys():
        raise ValueError(
            "what answers there is no run that is starting; another run may use the port, or this one began without us"
        )
    return word


def _line(word: dict[str, Any]) -> bytes:
    return json.dumps(word).encode() + b"\n"


def _parsed(line: bytes) -> Optional[dict[str, Any]]:
    try:
        word = json.loads(line)
    except (ValueError, RecursionError):
        # The second for thousands of brackets.
        return None
    return word if isinstance(word, dict) else None


def _is_hello(word: Optional[dict[str, Any]]) -> bool:
    return (
        word is not None
        and word.get("greeting") == _GREETING
        and all(isinstance(word.get(name), int) for name in ("process_id", "num_processes"))
        and "name" in word
    )


def _own_name() -> str:
    return f"{socket.gethostname()}, pid {os.getpid()}"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + more
