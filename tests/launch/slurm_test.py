"""The batch script of a SLURM job, which a shell must read as we mean it."""

import shlex
import subprocess

import pytest

from axlearn.cli.launch import main
from axlearn.launch.slurm import SlurmJob, slurm_script


def test_the_script_says_what_was_asked_for(capsys):
    arguments = "slurm --nodes=2 --gpus_per_node=8 --time=1-00:00:00 --sbatch=--account=research --dry_run"
    assert main([*arguments.split(), "--", "python", "-m", "x", "--set=a='b c'"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "#!/bin/bash"
    assert lines[1:12] == [
        "#SBATCH --job-name=axlearn",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --time=1-00:00:00",
        "#SBATCH --signal=TERM@120",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        "#SBATCH --output=axlearn-%j.log",
        "#SBATCH --account=research",
        "",
    ]
    assert shlex.split(lines[-1])[-4:] == ["python", "-m", "x", "--set=a='b c'"]


def test_a_shell_can_read_it():
    script = slurm_script(["echo", "it's"], SlurmJob(nodes=1))
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def test_what_makes_no_job_is_refused(capsys):
    with pytest.raises(ValueError, match=r"3 processes do not share 8 GPUs equally"):
        slurm_script(["x"], SlurmJob(nodes=1, gpus_per_node=8, processes_per_node=3))
    with pytest.raises(ValueError, match=r"--nodes: 0"):
        slurm_script(["x"], SlurmJob(nodes=0))
    with pytest.raises(SystemExit):
        main(["slurm", "--nodes=1"])
    assert "the command is missing. Expected it behind --" in capsys.readouterr().err
