"""Several real processes of one jax run on this machine, each with a few CPU devices.

A test names a function, which every process calls; what it returns in each of them comes back:

    outcomes = run_processes("tests.common.processes_test:say_hello", num_processes=2, arguments={"name": "x"})
    assert [outcome.result for outcome in outcomes] == ["hello x from 0", "hello x from 1"]

Functions and results go through JSON. `start_processes` is for tests that kill some of them, and `start_commands`
for those that run a command line of their own in each process.
"""

import contextlib
import importlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Optional

ROOT = pathlib.Path(__file__).resolve().parents[1]


class Outcome(NamedTuple):
    """How a process ended.

    Attributes:
        status: Its exit status; negative: the signal that ended it.
        result: What its function returned; None where it did not return.
        output: Its standard output and standard error.
    """

    status: int
    result: Any
    output: str


class Processes:
    """Processes that were started together.

    Attributes:
        popens: The processes, in their order.
        folder: Where their outputs and results are.
    """

    def __init__(self, popens: Sequence[subprocess.Popen[bytes]], *, folder: pathlib.Path):
        self.popens = list(popens)
        self.folder = folder

    def wait(self, *, timeout_seconds: float) -> list[Outcome]:
        """Waits for all of them; those that are still there at the end of the time are killed, and the test fails."""
        deadline = time.monotonic() + timeout_seconds
        late = []
        for i, popen in enumerate(self.popens):
            try:
                popen.wait(timeout=max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                late.append(i)
        self.kill()
        outcomes = [self._outcome(i) for i in range(len(self.popens))]
        report = "\n".join(f"--- process {i}\n{outcome.output}" for i, outcome in enumerate(outcomes))
        assert not late, f"Processes {late} did not end within {timeout_seconds} s.\n{report}"
        return outcomes

    def kill(self) -> None:
        """Ends those that have not ended by themselves."""
        for popen in self.popens:
            popen.kill()
            popen.wait()

    def output(self, process_index: int) -> str:
        """What a process has printed so far."""
        return (self.folder / f"output-{process_index}").read_text(encoding="utf-8", errors="replace")

    def _outcome(self, process_index: int) -> Outcome:
        result_file = self.folder / f"result-{process_index}"
        result = json.loads(result_file.read_text(encoding="utf-8")) if result_file.exists() else None
        return Outcome(self.popens[process_index].returncode, result, self.output(process_index))


def free_port() -> int:
    """A port of this machine that nobody listens at just now."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def environment(*, num_devices: int = 1, **more: str) -> dict[str, str]:
    """This process's environment, but for the number of CPU devices and what belongs to the test process."""
    flags = (
        f"--xla_force_host_platform_device_count={num_devices}",
        "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    )
    return {
        **os.environ,
        "XLA_FLAGS": " ".join(flags),
        "JAX_PLATFORMS": "cpu",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "PYTHONPATH": str(ROOT),
        **more,
    }


@contextlib.contextmanager
def start_commands(
    commands: Sequence[Sequence[str]], *, env: Mapping[str, str], cwd: Optional[pathlib.Path] = None
) -> Iterator[Processes]:
    """Starts command lines at the same time; those that are left at the end of the block are killed.

    Args:
        commands: One for each process.
        env: The environment of all of them.
        cwd: Where they start. None: in the root of the checkout.

    Yields:
        The processes.
    """
    with tempfile.TemporaryDirectory(prefix="processes-") as name:
        folder = pathlib.Path(name)
        popens: list[subprocess.Popen[bytes]] = []
        processes = Processes(popens, folder=folder)
        try:
            for i, command in enumerate(commands):
                with open(folder / f"output-{i}", "wb") as f:
                    child_env = {**env, "PROCESSES_RESULT": str(folder / f"result-{i}")}
                    processes.popens.append(
                        subprocess.Popen(
                            list(command), cwd=cwd or ROOT, env=child_env, stdout=f, stderr=subprocess.STDOUT
                        )
                    )
            yield processes
        finally:
            processes.kill()


@contextlib.contextmanager
def start_processes(
    function: str, *, num_processes: int, num_devices: int = 1, arguments: Optional[Mapping[str, Any]] = None
) -> Iterator[Processes]:
    """Starts processes of one jax run that all call a function.

    Args:
        function: Its module and name, as "tests.common.processes_test:say_hello".
        num_processes: How many.
        num_devices: How many CPU devices each of them has.
        arguments: What to call it with, by name; as JSON.

    Yields:
        The processes.
    """
    port = free_port()
    commands = [
        [
            sys.executable,
            __file__,
            function,
            str(port),
            str(num_processes),
            str(i),
            json.dumps(arguments or {}),
        ]
        for i in range(num_processes)
    ]
    with start_commands(commands, env=environment(num_devices=num_devices)) as processes:
        yield processes


def run_processes(
    function: str,
    *,
    num_processes: int,
    num_devices: int = 1,
    arguments: Optional[Mapping[str, Any]] = None,
    timeout_seconds: float = 120,
) -> list[Outcome]:
    """Starts processes as `start_processes`, and waits for all of them, which must end well.

    Returns:
        How they ended.
    """
    with start_processes(
        function, num_processes=num_processes, num_devices=num_devices, arguments=arguments
    ) as processes:
        outcomes = processes.wait(timeout_seconds=timeout_seconds)
    report = "\n".join(f"--- process {i}\n{outcome.output}" for i, outcome in enumerate(outcomes))
    assert all(outcome.status == 0 for outcome in outcomes), report
    return outcomes


def _main(function: str, port: str, num_processes: str, process_id: str, arguments: str) -> None:
    """What each process does."""
    import jax

    if int(num_processes) > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            coordinator_address=f"localhost:{port}",
            num_processes=int(num_processes),
            process_id=int(process_id),
            initialization_timeout=60,
            # A test that kills a process does not want to wait for the farewells of the others.
            shutdown_timeout_seconds=5,
        )
    module, _, name = function.partition(":")
    result = getattr(importlib.import_module(module), name)(**json.loads(arguments))
    pathlib.Path(os.environ["PROCESSES_RESULT"]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    _main(*sys.argv[1:])
