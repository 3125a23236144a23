"""A batch script that runs a command on the nodes of a SLURM cluster: `axlearn launch slurm`."""

import dataclasses
import re
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
        options: More options of sbatch, as they are written there, such as --account=research. One that is
            --NAME=VALUE without quotes stands for that value, spaces and all.
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
        ValueError: If a number is illegal, the GPUs of a node do not divide over its processes, or a text does not fit
            into a line of the script or into the name of a file.
    """
    _check_texts(job)
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
    named = [
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
    ]
    # sbatch reads quotes as a shell does, and takes # for the beginning of a comment.
    options = [*map(shlex.quote, named), *map(_quoted_value, job.options)]
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {option}" for option in options),
        "",
        "# Since SLURM 22.05 srun does not ask for the CPUs that sbatch was asked for.",
        '[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"',
        "# One that fails ends all; what it said stands above, with the number of its process in front.",
        f"exec srun --kill-on-bad-exit=1 --label {shlex.join(command)}",
    ]
    return "\n".join(lines) + "\n"


def _check_texts(job: SlurmJob) -> None:
    texts: dict[str, Sequence[Optional[str]]] = {
        "--name": [job.name],
        "--time": [job.time],
        "--partition": [job.partition],
        "--sbatch": job.options,
    }
    for where, values in texts.items():
        for value in values:
            if value is not None and "\n" in value:
                raise ValueError(error_message(where=where, what=f"{value!r}", expected="one line"))
    if "/" in job.name:
        raise ValueError(
            error_message(
                where="--name", what=f"{job.name!r}", expected="no /: the log file has this name, too"
            )
        )


def _quoted_value(option: str) -> str:
    """Quotes --NAME=VALUE where it must; leaves what has quotes already, or is -X VALUE, as it was written."""
    return shlex.quote(option) if re.fullmatch(r"--[\w-]+=[^'\"\\]*", option) else option


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
