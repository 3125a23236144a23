"""Several processes of one run on this machine, as on as many hosts: `axlearn launch local`.

Each gets its place in the environment (`DISTRIBUTED_COORDINATOR`, `NUM_PROCESSES`, `PROCESS_ID`) and its devices, its
lines are printed with its number in front, and no process stays behind when one has failed.
"""

import collections
import contextlib
import itertools
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import Optional, TextIO

from axlearn.common.config import error_message

# How long the others may take to hear of a failure and to end by themselves, and then to end on SIGTERM.
_PATIENCE_SECONDS = 5.0
_POLL_SECONDS = 0.1
# Of a run that saved and ended because SIGTERM or SIGINT asked it to, whoever sent that.
_STOPPED_STATUSES = (143, 130)
# How much of a failed process is shown again at the end, below what the others said meanwhile.
_NUM_LAST_LINES = 15
# Two busy cores can keep a collective waiting for longer than XLA's default of 40 s (measured, November 2026).
_COLLECTIVE_TIMEOUT = "--xla_cpu_collective_call_terminate_timeout_seconds"
_NUM_CPU_DEVICES = "--xla_force_host_platform_device_count"


def run_local(
    command: Sequence[str],
    *,
    num_processes: int,
    devices_per_process: Optional[int] = None,
    out: Optional[TextIO] = None,
) -> int:
    """Runs a command in several processes of one run, and waits for all of them.

    SIGTERM and SIGINT are passed on to all; for SIGHUP, and when nobody reads their lines any more, they get SIGTERM.
    When one fails, the others have some seconds to end by themselves; then they are ended.

    Args:
        command: The command line of each.
        num_processes: How many.
        devices_per_process: GPUs of each where the machine has some, else CPU devices of each. None: an equal share
            of the GPUs; CPU devices as the environment says.
        out: Where their lines go; None: standard output.

    Returns:
        The exit status of the first that failed, 128 + n for one that signal n ended; 0 if all went well.

    Raises:
        ValueError: If the numbers are illegal, or there are too few GPUs.
        OSError: If the command cannot be started.
        Exception: What writing to `out` raises, once all have ended.
    """
    environments = child_environments(
        os.environ,
        num_processes=num_processes,
        devices_per_process=devices_per_process,
        gpus=gpu_ids(os.environ),
    )
    with _Children(command, environments=environments, out=sys.stdout if out is None else out) as children:
        first_failed = children.wait()
    if children.output_error is not None:
        raise children.output_error
    if first_failed is None:
        return 0
    status = children.status(first_failed)
    if not children.was_asked and status not in _STOPPED_STATUSES:
        print(children.report(first_failed), file=sys.stderr, flush=True)
    return status


def gpu_ids(env: Mapping[str, str], *, root: pathlib.Path = pathlib.Path("/")) -> list[str]:
    """Returns the ids of the GPUs that a process of this environment may use; none if it is to use its CPU.

    Args:
        env: The environment.
        root: The root of the file system; tests have their own.
    """
    if env.get("JAX_PLATFORMS") == "cpu":
        return []
    visible = env.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        # As CUDA reads it: what is no device, such as -1 or NoDevFiles, hides itself and all behind it.
        return list(itertools.takewhile(_is_gpu_id, (gpu.strip() for gpu in visible.split(","))))
    names = [path.name for path in (root / "dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)]
    return sorted((name.removeprefix("nvidia") for name in names), key=int)


def _is_gpu_id(text: str) -> bool:
    return text.isdecimal() or text.startswith(("GPU-", "MIG-"))


def child_environments(
    env: Mapping[str, str],
    *,
    num_processes: int,
    devices_per_process: Optional[int],
    gpus: Sequence[str],
    port: Optional[int] = None,
) -> list[dict[str, str]]:
    """Returns the environment of each process: this one's, with its place and its devices.

    Args:
        env: The environment of this process.
        num_processes: How many there are.
        devices_per_process: As in `run_local`.
        gpus: The GPUs of this machine.
        port: On which process 0 listens. None: one that is free.

    Raises:
        ValueError: If the numbers are illegal, or there are too few GPUs.
    """
    for flag, number in (("--num_processes", num_processes), ("--devices_per_process", devices_per_process)):
        if number is not None and number < 1:
            raise ValueError(error_message(where=flag, what=f"{number}", expected="at least 1"))
    share = devices_per_process or len(gpus) // num_processes
    if gpus and (share == 0 or share * num_processes > len(gpus)):
        raise ValueError(
            error_message(
                where="--num_processes",
                what=f"{num_processes} processes of {max(share, 1)} need more than the {len(gpus)} GPUs here",
                expected="as many GPUs as they use",
                advice="JAX_PLATFORMS=cpu in the environment runs them on CPU devices.",
            )
        )
    port = _free_port() if port is None else port
    common = {**env, "DISTRIBUTED_COORDINATOR": f"localhost:{port}", "NUM_PROCESSES": str(num_processes)}
    if not gpus:
        common["XLA_FLAGS"] = _cpu_flags(env.get("XLA_FLAGS", ""), num_devices=devices_per_process)
    environments = []
    for i in range(num_processes):
        own = {"PROCESS_ID": str(i)}
        if gpus:
            own["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[i * share : (i + 1) * share])
        environments.append({**common, **own})
    return environments


def _cpu_flags(flags: str, *, num_devices: Optional[int]) -> str:
    if num_devices is not None:
        flags = re.sub(rf"{_NUM_CPU_DEVICES}=\S*", "", flags) + f" {_NUM_CPU_DEVICES}={num_devices}"
    if _COLLECTIVE_TIMEOUT not in flags:
        flags += f" {_COLLECTIVE_TIMEOUT}=600"
    return " ".join(flags.split())


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port: int = s.getsockname()[1]
        return port


class _Children:
    """The processes; when the context ends, none of them is left."""

    def __init__(self, command: Sequence[str], *, environments: Sequence[Mapping[str, str]], out: TextIO):
        # Whether they have been sent a signal on which they end well.
        self.was_asked = False
        # Why their lines cannot be written any more.
        self.output_error: Optional[Exception] = None
        self._command = list(command)
        self._environments = environments
        self._out = out
        self._lock = threading.Lock()
        self._popens: list[subprocess.Popen[str]] = []
        self._readers: list[threading.Thread] = []
        self._last_lines: list[collections.deque[str]] = []
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "_Children":
        self._stack.callback(self._end_all)
        try:
            self._stack.enter_context(self._signals_passed_on())
            for i, env in enumerate(self._environments):
                self._start(i, env)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def _start(self, i: int, env: Mapping[str, str]) -> None:
        popen = subprocess.Popen(
            self._command,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            # The terminal's Ctrl-C is for this process, which passes it on, once.
            start_new_session=True,
        )
        self._popens.append(popen)
        self._last_lines.append(collections.deque(maxlen=_NUM_LAST_LINES))
        self._readers.append(threading.Thread(target=self._read, args=(i,), daemon=True))
        self._readers[-1].start()

    def _read(self, i: int) -> None:
        stream = self._popens[i].stdout
        assert stream is not None
        for line in stream:
            self._last_lines[i].append(line.rstrip("\n"))
            with self._lock:
                # Read on in any case: a process whose pipe is full waits for ever.
                if self.output_error is None:
                    self._write(f"[{i}] {line if line.endswith(chr(10)) else line + chr(10)}")

    def _write(self, line: str) -> None:
        try:
            self._out.write(line)
            self._out.flush()
        except Exception as e:
            self.output_error = e

    @contextlib.contextmanager
    def _signals_passed_on(self) -> Iterator[None]:
        def pass_on(signum: int, frame: Optional[FrameType]) -> None:
            del frame
            if signum == signal.SIGHUP:
                # Of a terminal whose end also breaks their output.
                self._ask()
            else:
                self.was_asked = True
                self._send(signum)

        signums = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            # Else it is nohup that started this.
            signums.append(signal.SIGHUP)
        previous = {s: signal.signal(s, pass_on) for s in signums}
        try:
            yield
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)

    def _send(self, signum: int) -> None:
        """Sends a signal to each; SIGKILL to all that they have started, too, which may have outlived them."""
        for popen in self._popens:
            with contextlib.suppress(ProcessLookupError):
                if signum == signal.SIGKILL:
                    os.killpg(popen.pid, signum)
                elif popen.poll() is None:
                    os.kill(popen.pid, signum)

    def _ask(self) -> None:
        """Asks all to save and end, unless they were asked: a second SIGTERM ends a process at once."""
        if not self.was_asked:
            self.was_asked = True
            self._send(signal.SIGTERM)

    def wait(self) -> Optional[int]:
        """Waits for all, or for the first that fails; returns which one that is, None if none does.

        Where their lines cannot be written any more, asks them to end. Of those that were asked, none fails by ending
        for it: others may still be saving.
        """
        while True:
            if self.output_error is not None:
                self._ask()
            statuses = [popen.poll() for popen in self._popens]
            ended = [i for i, status in enumerate(statuses) if status]
            failed = [i for i in ended if not (self.was_asked and statuses[i] in _STOPPED_STATUSES)]
            if failed:
                return failed[0]
            if None not in statuses:
                return ended[0] if ended else None
            time.sleep(_POLL_SECONDS)

    def _end_all(self) -> None:
        """Lets those that are left end by themselves, on SIGTERM, on SIGKILL."""
        for signum in (None, signal.SIGTERM, signal.SIGKILL):
            if signum is not None:
                self._send(signum)
            deadline = time.monotonic() + _PATIENCE_SECONDS
            while time.monotonic() < deadline and any(popen.poll() is None for popen in self._popens):
                time.sleep(_POLL_SECONDS)
        for reader in self._readers:
            # What has left their process groups may keep their output open.
            reader.join(timeout=1.0)

    def status(self, i: int) -> int:
        """Returns the exit status of a process as a shell does."""
        code: int = self._popens[i].returncode
        return code if code >= 0 else 128 - code

    def report(self, i: int) -> str:
        """Returns what a person should know of the process that failed first."""
        code = self._popens[i].returncode
        how = f"status {code}" if code >= 0 else f"signal {-code} ({signal.Signals(-code).name})"
        lines = [f"Process {i} of {len(self._popens)} ended first, with {how}. Its last lines:"]
        return "\n".join([*lines, *(f"  {line}" for line in self._last_lines[i] or ["(none)"])])
