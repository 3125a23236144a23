"""Which process of a run this one is: from flags, from the environment, or from SLURM."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Optional

from axlearn.common.config import error_message, join_messages
from axlearn.common.distributed._slurm import SlurmTask, slurm_task

# How long processes wait for the last one: hosts of a cluster take minutes to start, and images to be fetched.
INITIALIZATION_TIMEOUT_SECONDS = 300
# After how long without a sign of life a process is taken for dead, and the others end. jax's own default is 100.
HEARTBEAT_TIMEOUT_SECONDS = 30
# Who starts processes sets these: `axlearn launch`, a pod's template. Flags say the same.
_VARIABLES = {
    "coordinator": "DISTRIBUTED_COORDINATOR",
    "num_processes": "NUM_PROCESSES",
    "process_id": "PROCESS_ID",
}
_FLAGS = {
    "coordinator": "--distributed_coordinator",
    "num_processes": "--num_processes",
    "process_id": "--process_id",
}
# What the runtime of Cloud TPUs calls the hosts of a slice, and the first host of several slices.
_TPU_HOSTS = ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")
_TPU_SLICES = "MEGASCALE_COORDINATOR_ADDRESS"
_MAX_PORT = 65535


@dataclasses.dataclass(frozen=True)
class Place:
    """One process among those of a run.

    Attributes:
        process_id: Its number, from 0 on. None: the TPU's runtime knows, and jax asks it.
        num_processes: How many there are. None likewise.
        coordinator: Host and port on which process 0 listens. None: there is one process, or the TPU's runtime
            knows.
        local_device_ids: The accelerators of the host that are this process'. None: all that it sees.
        origins: Where each of the first three was found, by name, for messages.
    """

    process_id: Optional[int] = 0
    num_processes: Optional[int] = 1
    coordinator: Optional[str] = None
    local_device_ids: Optional[tuple[int, ...]] = None
    origins: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def is_alone(self) -> bool:
        """Whether this is the only process."""
        return self.num_processes == 1

    @property
    def is_found_by_jax(self) -> bool:
        """Whether jax finds the others itself, as it does on TPUs."""
        return self.num_processes is None

    def __str__(self) -> str:
        if self.is_alone:
            return "the only process"
        if self.is_found_by_jax:
            return "a process of a TPU"
        sources = sorted(set(self.origins.values()))
        return (
            f"process {self.process_id} of {self.num_processes}, coordinator {self.coordinator} "
            f"(from {', '.join(sources)})"
        )


def find_place(
    env: Mapping[str, str],
    *,
    coordinator: Optional[str] = None,
    num_processes: Optional[int] = None,
    process_id: Optional[int] = None,
    jax_backend: Optional[str] = None,
) -> Place:
    """Finds out which process of a run this one is.

    Flags and `$DISTRIBUTED_COORDINATOR`, `$NUM_PROCESSES`, `$PROCESS_ID` say the same and must not contradict each
    other. What they leave open, SLURM fills in for what srun has started. A TPU knows its own hosts.

    Args:
        env: The environment.
        coordinator: The value of --distributed_coordinator; None where it is not given.
        num_processes: That of --num_processes, likewise.
        process_id: That of --process_id, likewise.
        jax_backend: That of --jax_backend, likewise.

    Returns:
        The place; that of the only process where nothing says otherwise.

    Raises:
        ValueError: If something is no number, is missing, out of range or a contradiction, with all that is wrong.
    """
    flags = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    given, origins = _given(env, flags=flags)
    if not given and _is_tpu_of_several_hosts(env, jax_backend=jax_backend):
        return Place(process_id=None, num_processes=None)
    if given.get("num_processes") == 1:
        _check(given, origins)
        return Place(origins=origins)
    local_device_ids = None
    if len(given) < len(_VARIABLES):
        task = _slurm_task(env)
        if task is not None and (given or task.num_processes > 1):
            _add_slurm(task, given=given, origins=origins)
            local_device_ids = task.local_device_ids
    if not given:
        return Place()
    _check(given, origins)
    return Place(**given, local_device_ids=local_device_ids, origins=origins)


def _given(env: Mapping[str, str], *, flags: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """What flags and environment say, and where each was found."""
    given: dict[str, Any] = {}
    origins: dict[str, str] = {}
    problems = []
    for name, variable in _VARIABLES.items():
        # As everywhere in shells, an empty variable is none.
        text = env.get(variable) or None
        value: Any = text
        if text is not None and name != "coordinator":
            if not text.strip().isdecimal():
                problems.append(
                    error_message(where=f"${variable}", what=f"{text!r} is not a number", expected="digits")
                )
                continue
            value = int(text)
        flag = flags[name]
        if flag is not None and value is not None and flag != value:
            problems.append(
                error_message(
                    where=_FLAGS[name],
                    what=f"{flag!r} contradicts ${variable}, which is {value!r}",
                    expected="the same in both, or one of them",
                )
            )
        if flag is not None or value is not None:
            given[name] = value if flag is None else flag
            origins[name] = f"${variable}" if flag is None else _FLAGS[name]
    _raise_all(problems)
    return given, origins


def _raise_all(problems: list[str]) -> None:
    if problems:
        raise ValueError(join_messages(problems, heading="This process does not know its place:"))


def _slurm_task(env: Mapping[str, str]) -> Optional[SlurmTask]:
    try:
        return slurm_task(env)
    except ValueError as e:
        raise ValueError(
            error_message(
                where="the environment of SLURM",
                what=str(e),
                expected="numbers as srun sets them, and as many GPUs for each task of a node",
            )
        ) from e


def _add_slurm(task: SlurmTask, *, given: dict[str, Any], origins: dict[str, str]) -> None:
    """Fills in what is open, and refuses a number of processes that is not that of the step."""
    if given.get("num_processes", task.num_processes) != task.num_processes:
        raise ValueError(
            error_message(
                where=origins["num_processes"],
                what=f"{given['num_processes']} contradicts SLURM, which started {task.num_processes} tasks",
                expected="the same, or all of --distributed_coordinator, --num_processes and --process_id",
            )
        )
    for name in _VARIABLES:
        if name not in given:
            given[name] = getattr(task, name)
            origins[name] = "SLURM"


def _is_tpu_of_several_hosts(env: Mapping[str, str], *, jax_backend: Optional[str]) -> bool:
    """On other backends than TPU nobody is asked; with none named, what GKE sets is believed."""
    platforms = env.get("JAX_PLATFORMS")
    if platforms and "tpu" not in platforms.split(","):
        return False
    if jax_backend is not None:
        return jax_backend == "tpu"
    return bool(env.get(_TPU_SLICES)) or any("," in env.get(name, "") for name in _TPU_HOSTS)


def _check(given: Mapping[str, Any], origins: Mapping[str, str]) -> None:
    """Refuses a place that is none."""
    missing = [_FLAGS[name] for name in _VARIABLES if name not in given]
    num_processes: Any = given.get("num_processes")
    process_id = given.get("process_id")
    problems = []
    if num_processes is not None and num_processes < 1:
        problems.append(
            error_message(
                where=origins["num_processes"], what=f"{num_processes} processes", expected="at least 1"
            )
        )
    elif missing and num_processes != 1:
        variables = ", ".join(f"${variable}" for variable in _VARIABLES.values())
        problems.append(
            error_message(
                where=", ".join(origins[name] for name in _VARIABLES if name in given),
                what=f"given, but {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing",
                expected=f"all of {', '.join(_FLAGS.values())}, as flags or as {variables}",
                advice="Leave all of them out for one process; --num_processes=1 needs no other.",
            )
        )
    elif process_id is not None and not 0 <= process_id < num_processes:
        problems.append(
            error_message(
                where=origins["process_id"],
                what=f"{process_id} is none of the {num_processes} processes that {origins['num_processes']} says",
                expected=f"0 to {num_processes - 1}",
            )
        )
    if "coordinator" in given and not _is_address(given["coordinator"]):
        problems.append(
            error_message(
                where=origins["coordinator"],
                what=f"{given['coordinator']!r} is no address",
                expected="HOST:PORT of process 0, such as node0:8476",
            )
        )
    _raise_all(problems)


def _is_address(text: str) -> bool:
    host, _, port = text.rpartition(":")
    return bool(host) and port.isdecimal() and 0 < int(port) <= _MAX_PORT
