"""The roll call before jax.distributed: everybody comes, somebody is missing, twice there, or somebody else."""

import concurrent.futures
import socket
import threading
import time

from axlearn.common.distributed import PeersMissingError, Place, hold_roll_call
from tests.launcher import command, environment
from tests.processes_harness import free_port, start_commands


def _place(process_id: int, *, port: int, num_processes: int = 3) -> Place:
    return Place(
        process_id=process_id,
        num_processes=num_processes,
        coordinator=f"localhost:{port}",
        origins={"coordinator": "--distributed_coordinator"},
    )


def _hold(places: list[Place], *, timeout_seconds: float = 20) -> list[str]:
    """Holds it in a thread for each, and returns what was raised, "" where nothing was."""

    def hold(place: Place) -> str:
        try:
            hold_roll_call(place, timeout_seconds=timeout_seconds)
        except PeersMissingError as e:
            return str(e)
        return ""

    with concurrent.futures.ThreadPoolExecutor(len(places)) as pool:
        return list(pool.map(hold, places))


def test_it_ends_when_all_are_there_and_leaves_the_port_free():
    port = free_port()
    for _ in range(2):
        assert _hold([_place(i, port=port) for i in (2, 1, 0)]) == ["", "", ""]
    with socket.create_server(("", port)):
        pass


def test_who_is_missing_is_told_to_all_that_came():
    port = free_port()
    said = _hold([_place(0, port=port), _place(2, port=port)], timeout_seconds=1)
    assert said[0] == said[1]
    assert (
        f"coordinator localhost:{port}: 2 of 3 processes came within 1 s; missing: 1; there: 0 (" in said[0]
    )
    assert "Look at the output of those that are missing" in said[0]


def test_who_left_again_is_missing():
    port = free_port()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(_hold, [_place(0, port=port)], timeout_seconds=1.5)
        hello = '{"greeting": "axlearn-roll-call-1", "process_id": 1, "num_processes": 3, "name": "n"}\n'
        time.sleep(0.3)
        with socket.create_connection(("localhost", port)) as connection:
            connection.sendall(hello.encode())
            time.sleep(0.2)
        assert "1 of 3 processes came within 1.5 s; missing: 1, 2; there: 0 (" in waiting.result()[0]


def test_without_process_0_the_others_say_where_they_looked():
    port = free_port()
    (said,) = _hold([_place(1, port=port)], timeout_seconds=0.2)
    assert f"coordinator localhost:{port}: process 1 of 3 (" in said
    assert "did not reach process 0 within 0.2 s: [Errno 111] Connection refused" in said
    assert "Expected process 0 to listen there, which --distributed_coordinator says" in said
    unknown = Place(process_id=1, num_processes=2, coordinator="no-such-host.invalid:1")
    (said,) = _hold([unknown], timeout_seconds=0.2)
    assert "no-such-host.invalid" in said


def test_two_that_are_the_same_and_two_numbers_of_processes_end_it_at_once():
    port = free_port()
    said = _hold([_place(0, port=port), _place(1, port=port), _place(1, port=port)])
    assert all("two processes say that they are number 1: " in text for text in said)
    said = _hold([_place(0, port=port), _place(1, port=port, num_processes=4)])
    assert all("says that there are 4 processes, and process 0 (" in text for text in said)


def test_strangers_are_not_counted():
    port = free_port()

    def be_strange() -> None:
        hello = b'{"greeting": "axlearn-roll-call-1", "process_id": 7, "num_processes": 2, "name": "n"}\n'
        strange = (
            b"GET / HTTP/1.1\r\n\r\n",
            b'{"greeting": 3}\n',
            b"[]\n",
            b"[" * 4000 + b"\n",
            b"x" * 10_000,
            b"",
        )
        for words in (*strange, hello):
            for _ in range(100):
                try:
                    with socket.create_connection(("localhost", port), timeout=1) as connection:
                        connection.sendall(words)
                    break
                except ConnectionRefusedError:
                    time.sleep(0.02)
                except OSError:
                    break

    stranger = threading.Thread(target=be_strange)
    stranger.start()
    said = _hold([_place(0, port=port, num_processes=2)], timeout_seconds=1.5)
    stranger.join()
    assert "1 of 2 processes came" in said[0]


def test_a_server_that_is_no_process_0_is_named_as_such():
    with socket.create_server(("localhost", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        (said,) = _hold([_place(1, port=server.getsockname()[1])], timeout_seconds=0.2)
    assert "what answers there is no run that is starting" in said


def test_the_command_names_the_missing_process_instead_of_aborting():
    """`jax.distributed.initialize` alone aborts the process from C++ (status 134)."""
    arguments = ("--config=fuji-tiny", "--trainer_dir=/nonexistent-but-never-made/x", "--dry_run")
    env = environment(DISTRIBUTED_COORDINATOR=f"localhost:{free_port()}", NUM_PROCESSES="2", PROCESS_ID="0")
    with start_commands([command(*arguments, "--initialization_timeout=1")], env=env) as one:
        (outcome,) = one.wait(timeout_seconds=120)
    assert outcome.status == 1, outcome.output
    assert "1 of 2 processes came within 1 s; missing: 1; there: 0 (" in outcome.output
    assert "Traceback" not in outcome.output
