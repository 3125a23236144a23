"""A batch script that runs a command on the nodes of a SLURM cluster: `axlearn launch slurm`."""

import dataclasses
import shlex
import subprocess
from collections.abc import Sequence
from typing import Optional

from axlearn.common.config import error_message


@dataclasses.dataclass(frozen=True)
class SlurmJob:
    """What a job asks of a cluster.

    Attributes:
        nodes: How many nodes.
        gpus_per_node: GPUs of each; None: none.
        processes_per_node: Processes on each, which share its GPUs out equally.
        name: The name of the job.
        time: The longest time, as SLURM writes it, such as 1-00:00:00. None: as the partition says.
        partition: Where to run; None: where the cluster does by default.
        save_seconds: How long before the end of the time the processes get SIGTERM, on which they save and end.
        options: More options of sbatch, as they are written there, such as --account=research.
    """

    nodes: int
    gpus_per_node: Optional[int] = None
    processes_per_node: int = 1
    name: str = "axlearn"
    time: Optional[str] = None
    partition: Optional[str] = None
    save_seconds: int = 120
    options: Sequence[str] = ()


def slurm_script(command: Sequence[str], job: SlurmJob) -> str:
    """Returns the batch script of a job.

    Processes find each other by what srun tells them. When one fails, srun ends the others; a job that is preempted is
    queued again and goes on from its last save.

    Args:
        command: The command line of each process.
        job: What the job asks for.

    Raises:
        ValueError: If a number is illegal, or the GPUs of a node do not divide over its processes.
    """
    for name in ("nodes", "gpus_per_node", "processes_per_node", "save_seconds"):
        number = getattr(job, name)
        if number is not None and number < 1:
            raise ValueError(error_message(where=f"--{name}", what=f"{number}", expected="at least 1"))
    if job.gpus_per_node is not None and job.gpus_per_node % job.processes_per_node:
        raise ValueError(
            error_message(
                where="--processes_per_node",
                what=f"{job.processes_per_node} processes do not share {job.gpus_per_node} GPUs equally",
                expected=f"a divisor of {job.gpus_per_node}",
            )
        )
    options = [
        f"--job-name={job.name}",
        f"--nodes={job.nodes}",
        f"--ntasks-per-node={job.processes_per_node}",
        *([] if job.gpus_per_node is None else [f"--gpus-per-node={job.gpus_per_node}"]),
        *([] if job.time is None else [f"--time={job.time}"]),
        *([] if job.partition is None else [f"--partition={job.partition}"]),
        f"--signal=TERM@{job.save_seconds}",
        "--requeue",
        "--open-mode=append",
        f"--output={job.name}-%j.log",
        *job.options,
    ]
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {option}" for option in options),
        "",
        "# One that fails ends all; what it said stands above, with the number of its process in front.",
        f"exec srun --kill-on-bad-exit=1 --label {shlex.join(command)}",
    ]
    return "\n".join(lines) + "\n"


def submit(script: str) -> str:
    """Hands a script to sbatch, and returns what sbatch says.

    Raises:
        RuntimeError: If sbatch refuses it.
        OSError: If there is no sbatch.
    """
    done = subprocess.run(["sbatch"], input=script, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            error_message(where="sbatch", what=done.stderr.strip() or f"status {done.returncode}")
        )
    return done.stdout.strip()
