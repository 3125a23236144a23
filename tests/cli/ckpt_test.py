"""`axlearn ckpt`: what it lists, what it finds damaged, what it converts, and its errors."""

import re

import pytest

from axlearn.cli.main import main
from axlearn.common.checkpointer import open_checkpoint
from axlearn.common.checkpointer._lease import WriterLease
from tests.common.checkpointer.axlearn_harness import save_axlearn_steps
from tests.common.checkpointer.harness import all_files, save_steps


@pytest.fixture
def run(tmp_path):
    """A run with one checkpoint of ours and one of AXLearn's."""
    save_steps(tmp_path / "run/checkpoints", 5)
    save_axlearn_steps(tmp_path / "run/checkpoints", 3, documents={"input_iter": "<class 'tf.Iterator'>"})
    return tmp_path / "run"


@pytest.fixture
def ckpt(tmp_path, capsys):
    """Runs the verb; returns what it printed, without the path of the test."""

    def call(*argv, status: int = 0) -> str:
        assert main(["ckpt", *map(str, argv)]) == status
        captured = capsys.readouterr()
        assert not (captured.out and captured.err)
        return (captured.out + captured.err).replace(str(tmp_path), "TMP")

    return call


def test_what_is_there_is_listed(run, ckpt):
    text = ckpt("list", run)
    assert text == (
        "      step  layout    arrays      parameters      size  beside arrays\n"
        "         3  AXLearn's      4              24 120 bytes  input_iter\n"
        "         5  ours           4              24 120 bytes  input_iter\n"
    )
    assert ckpt("list", run / "checkpoints") == text
    lines = ckpt("list", run / "checkpoints/step_00000003", "--arrays").splitlines()
    assert lines[-4:] == [
        "learner/count  int32 ()",
        "learner/mu  bfloat16 (6,)",
        "model/w  float32 (4, 6)",
        "prng_key  uint32 (2,)",
    ]


def test_verify_says_how_far_it_can_tell(run, ckpt):
    assert ckpt("verify", run) == (
        "TMP/run/checkpoints/step_00000003: whole (every chunk is there and decodes; this layout has no hashes to "
        "compare)\n"
        "TMP/run/checkpoints/step_00000005: whole (every byte is what was written)\n"
    )


def test_verify_names_damage_and_fails(run, ckpt):
    (run / "checkpoints/step_00000003/gda/model/w/0.0").unlink()
    chunk = run / "checkpoints/step_00000005/gda/model/w/c/0/0"
    chunk.write_bytes(chunk.read_bytes()[::-1])
    before = [(path, path.read_bytes()) for path in all_files(run)]
    text = ckpt("verify", run, status=1)
    assert "step_00000003: damaged: TMP/run/checkpoints/step_00000003/gda/model/w/0.0: is missing." in text
    assert (
        "step_00000005: damaged: TMP/run/checkpoints/step_00000005/gda/model/w/c/0/0: does not hold" in text
    )
    assert ckpt("verify", run, "--step=5", status=1).count("\n") == 1
    assert [(path, path.read_bytes()) for path in all_files(run)] == before
    (run / "checkpoints/step_00000005/MANIFEST.json").unlink()
    assert "         5  damaged: " in ckpt("list", run)


def test_export_to_axlearn_says_what_it_wrote_and_what_it_left_out(run, tmp_path, ckpt):
    text = ckpt("export", run, "--format=axlearn", "--output", tmp_path / "theirs")
    size = sum(path.stat().st_size for path in all_files(tmp_path / "theirs/step_00000005"))
    kind = open_checkpoint(run / "checkpoints").documents["input_iter"]
    assert kind.endswith("harness.Position'>")
    assert text == (
        f"TMP/theirs/step_00000005: step 5, 4 arrays, {size / 1000:.1f} kB\n"
        f"Left out: input_iter ({kind}), which the other layout cannot hold. AXLearn begins its data anew.\n"
        "prng_key is one of threefry, of two words: restore it with jax_default_prng_impl=threefry2x32, which is not "
        "AXLearn's default (rbg, of four).\n"
    )
    assert open_checkpoint(tmp_path / "theirs").writer == "AXLearn's"


def test_export_to_ours_takes_the_step_that_is_asked_for(run, tmp_path, ckpt):
    text = ckpt("export", run, "--format=native", "--step=3", "--output", tmp_path / "ours")
    assert "Left out: input_iter" in text
    assert "goes on behind the batch of this step" in text
    assert ckpt("verify", tmp_path / "ours").endswith(
        "step_00000003: whole (every byte is what was written)\n"
    )


def test_errors_say_what_to_do(run, tmp_path, ckpt, golden):
    save_axlearn_steps(tmp_path / "taken", 5)
    (tmp_path / "empty").mkdir()
    axlearn = "--format=axlearn"
    errors = {
        "no such folder": ckpt("list", tmp_path / "nowhere", status=2),
        "no checkpoint": ckpt("verify", tmp_path / "empty", status=2),
        "no such step": ckpt("verify", run, "--step=4", status=2),
        "no such step to export": ckpt("export", run, axlearn, "--step=4", "--output=x", status=2),
        "a step that is taken": ckpt("export", run, axlearn, "--output", tmp_path / "taken", status=2),
        "ours already": ckpt("export", run, "--format=native", "--output=x", status=2),
    }
    lease = WriterLease(tmp_path / "busy")
    lease.acquire()
    busy = ckpt("export", run, "--format=native", "--step=3", "--output", tmp_path / "busy", status=1)
    lease.release()
    errors["somebody writes there"] = re.sub(r"process \d+", "process 1", busy)
    golden("errors/ckpt.txt", "".join(f"# {name}\n{text}\n" for name, text in errors.items()))
