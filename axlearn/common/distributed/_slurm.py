"""What SLURM says about the processes of a job step, in the environment that srun gives them."""

import re
from collections.abc import Mapping
from typing import NamedTuple, Optional

# srun sets all of them. A batch script itself has no step, and is one process whatever the job was given.
_JOB_ID = "SLURM_JOB_ID"
_NODE_LIST = "SLURM_STEP_NODELIST"
_NUM_TASKS = "SLURM_STEP_NUM_TASKS"
_TASK_ID = "SLURM_PROCID"
_LOCAL_TASK_ID = "SLURM_LOCALID"
_STEP_VARIABLES = (_JOB_ID, _NODE_LIST, _NUM_TASKS, _TASK_ID, _LOCAL_TASK_ID)

# Jobs of one node take different ports of the 4096 highest, as jax.distributed chooses them.
_NUM_PORTS = 4096
_FIRST_PORT = 65536 - _NUM_PORTS


class SlurmTask(NamedTuple):
    """A task of a job step.

    Attributes:
        process_id: Its number among all tasks of the step.
        num_processes: How many these are.
        coordinator: Host and port on which task 0 can listen: the first node of the step.
        local_device_ids: The GPUs of the node that are this task's. None: all that it sees.
    """

    process_id: int
    num_processes: int
    coordinator: str
    local_device_ids: Optional[tuple[int, ...]]


def slurm_task(env: Mapping[str, str]) -> Optional[SlurmTask]:
    """Returns which task of a job step this process is; None if srun did not start it.

    Args:
        env: The environment.

    Raises:
        ValueError: If a variable of SLURM is no number, or the GPUs of the node do not divide over its tasks.
    """
    if not all(env.get(name) for name in _STEP_VARIABLES):
        return None
    port = _FIRST_PORT + int(env[_JOB_ID]) % _NUM_PORTS
    return SlurmTask(
        process_id=int(env[_TASK_ID]),
        num_processes=int(env[_NUM_TASKS]),
        coordinator=f"{first_host(env[_NODE_LIST])}:{port}",
        local_device_ids=_local_device_ids(env),
    )


def first_host(node_list: str) -> str:
    """Returns the first name of a list of SLURM's, such as "gpu[003-007,9],login": here "gpu003"."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", node_list)
    assert first is not None
    # Of each bracket the first alternative, and of a range its beginning.
    return re.sub(r"\[([^\]]*)\]", lambda match: re.split("[,-]", match.group(1))[0], first.group(0))


def _local_device_ids(env: Mapping[str, str]) -> Optional[tuple[int, ...]]:
    """An equal share of the node's GPUs for each of several tasks, unless SLURM has shared them out itself.

    Raises:
        ValueError: If there is no equal share.
    """
    num_local_tasks = _tasks_on_this_node(env)
    if num_local_tasks == 1 or _has_own_gpus(env) or env.get("JAX_PLATFORMS") == "cpu":
        return None
    local_task_id = int(env[_LOCAL_TASK_ID])
    visible = env.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return (local_task_id,)
    num_visible = len(visible.split(","))
    if num_visible < max(num_local_tasks, int(env.get("SLURM_GPUS_ON_NODE") or 0)):
        # Those of the node are more: these are the task's own.
        return None
    share, rest = divmod(num_visible, num_local_tasks)
    if rest:
        raise ValueError(f"{num_local_tasks} tasks on this node do not share {num_visible} GPUs equally")
    return tuple(range(local_task_id * share, (local_task_id + 1) * share))


def _has_own_gpus(env: Mapping[str, str]) -> bool:
    """Whether SLURM was asked to bind GPUs to tasks."""
    # Such as "verbose,map_gpu:0,1".
    binding = env.get("SLURM_GPU_BIND", "").rpartition(",")[2]
    if binding:
        return binding != "none"
    if env.get("SLURM_GPUS_PER_TASK") or env.get("SLURM_NTASKS_PER_GPU"):
        return True
    # Such as "cpu=4,gres/gpu=1"; --cpus-per-task alone sets it, too.
    return "gpu" in env.get("SLURM_TRES_PER_TASK", "")


def _tasks_on_this_node(env: Mapping[str, str]) -> int:
    """Reads "2(x3),1" at this node's place: two tasks on each of three nodes, one on the fourth."""
    counts: list[int] = []
    for item in env.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", item)
        if match:
            counts += [int(match.group(1))] * int(match.group(2) or 1)
    node = int(env.get("SLURM_NODEID", "0"))
    return counts[node] if node < len(counts) else 1
