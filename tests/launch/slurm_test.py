"""The batch script of a SLURM job, which a shell must read as we mean it."""

import os
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


def test_values_are_quoted_where_sbatch_would_read_them_otherwise():
    options = ["--comment=a #1", "-A research", "--comment='b c'"]
    lines = slurm_script(["x"], SlurmJob(nodes=1, name="my #2 run", options=options)).splitlines()
    assert [line for line in lines if "my" in line] == [
        "#SBATCH '--job-name=my #2 run'",
        "#SBATCH '--output=my #2 run-%j.log'",
    ]
    assert lines[lines.index("") - 3 : lines.index("")] == [
        "#SBATCH '--comment=a #1'",
        "#SBATCH -A research",
        "#SBATCH --comment='b c'",
    ]


@pytest.mark.parametrize(("cpus", "expected"), [("6", "6"), (None, "")])
def test_srun_asks_for_the_cpus_that_sbatch_was_asked_for(tmp_path, cpus, expected):
    (tmp_path / "srun").write_text('#!/bin/sh\necho "$SRUN_CPUS_PER_TASK"\n', encoding="utf-8")
    (tmp_path / "srun").chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    if cpus is not None:
        env["SLURM_CPUS_PER_TASK"] = cpus
    script = slurm_script(["x"], SlurmJob(nodes=1))
    done = subprocess.run(["bash"], input=script, env=env, capture_output=True, text=True, check=True)
    assert done.stdout == f"{expected}\n"


def test_what_makes_no_job_is_refused(capsys):
    for job, where in (
        (SlurmJob(nodes=1, name="a\nb"), "--name"),
        (SlurmJob(nodes=1, name="a/b"), "--name"),
        (SlurmJob(nodes=1, partition="a\n#SBATCH --x"), "--partition"),
        (SlurmJob(nodes=1, options=["--a=b\nrm x"]), "--sbatch"),
    ):
        with pytest.raises(ValueError, match=f"{where}: "):
            slurm_script(["x"], job)
    with pytest.raises(ValueError, match=r"3 processes do not share 8 GPUs equally"):
        slurm_script(["x"], SlurmJob(nodes=1, gpus_per_node=8, processes_per_node=3))
    with pytest.raises(ValueError, match=r"--nodes: 0"):
        slurm_script(["x"], SlurmJob(nodes=0))
    with pytest.raises(SystemExit):
        main(["slurm", "--nodes=1"])
    assert "the command is missing. Expected it behind --" in capsys.readouterr().err
