"""Starts the processes of a run: on this machine, or on the nodes of a SLURM cluster.

    axlearn launch local --num_processes=4 --devices_per_process=2 -- python -m axlearn.common.launch_trainer_main ...
    axlearn launch slurm --nodes=2 --gpus_per_node=8 -- python -m axlearn.common.launch_trainer_main ...

See docs/hosts.md.
"""

import argparse
from collections.abc import Sequence

from axlearn.launch.local import run_local
from axlearn.launch.slurm import SlurmJob, slurm_script, submit


def main(argv: Sequence[str]) -> int:
    """Runs the verb.

    Args:
        argv: The arguments behind the verb.

    Returns:
        The exit status: of `local`, that of the first process that failed.

    Raises:
        ValueError: If the numbers are illegal.
        OSError: If the command, or sbatch, cannot be started.
        RuntimeError: If sbatch refuses the job.
    """
    parser = _parser()
    own, command = _split(argv)
    args = parser.parse_args(own)
    if not command:
        parser.error("the command is missing. Expected it behind --, such as -- python -m my_program")
    if args.where == "local":
        return run_local(
            command, num_processes=args.num_processes, devices_per_process=args.devices_per_process
        )
    job = SlurmJob(
        nodes=args.nodes,
        gpus_per_node=args.gpus_per_node,
        processes_per_node=args.processes_per_node,
        name=args.name,
        time=args.time,
        partition=args.partition,
        save_seconds=args.save_seconds,
        options=args.sbatch,
    )
    script = slurm_script(command, job)
    print(script.rstrip("\n") if args.dry_run else submit(script))
    return 0


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns what stands before and behind the first --."""
    arguments = list(argv)
    if "--" not in arguments:
        return arguments, []
    i = arguments.index("--")
    return arguments[:i], arguments[i + 1 :]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="axlearn launch", description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    verbs = parser.add_subparsers(dest="where", required=True, metavar="local|slurm")
    local = verbs.add_parser(
        "local",
        help="processes on this machine",
        description="Runs a command in several processes of one run on this machine. Each line is printed with the "
        "number of its process in front. When one fails, all end, with its status.",
        usage="axlearn launch local --num_processes=N [--devices_per_process=N] -- COMMAND",
        allow_abbrev=False,
    )
    local.add_argument("--num_processes", required=True, type=int, help="how many processes")
    local.add_argument(
        "--devices_per_process",
        type=int,
        help="GPUs of each process where there are some, else CPU devices; by default an equal share of the GPUs",
    )
    slurm = verbs.add_parser(
        "slurm",
        help="a batch job of a SLURM cluster",
        description="Writes a batch script that runs a command on each node, and hands it to sbatch.",
        usage="axlearn launch slurm --nodes=N [OPTIONS] -- COMMAND",
        allow_abbrev=False,
    )
    slurm.add_argument("--nodes", required=True, type=int, help="how many nodes")
    slurm.add_argument("--gpus_per_node", type=int, help="GPUs of each node; by default none")
    slurm.add_argument(
        "--processes_per_node", type=int, default=1, help="processes of each node, which share its GPUs; 1"
    )
    slurm.add_argument("--name", default="axlearn", help="the name of the job")
    slurm.add_argument("--time", help="the longest time, such as 1-00:00:00")
    slurm.add_argument("--partition", help="the partition")
    slurm.add_argument(
        "--save_seconds",
        type=int,
        default=120,
        help="how long before the end of the time the processes are told to save and end; 120",
    )
    slurm.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="one more option of sbatch, such as --sbatch=--account=research; repeatable",
    )
    slurm.add_argument("--dry_run", action="store_true", help="print the script and submit nothing")
    return parser
