"""Checkpoints written and read array by array: what converters use, and the exports from one layout to the other."""

import contextlib
import errno
import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap

import ml_dtypes
import numpy as np
import pytest

from axlearn.common.checkpointer import (
    CheckpointWriter,
    CorruptCheckpointError,
    DirectoryInUseError,
    checkpoint_steps,
    export_axlearn,
    export_native,
    load_checkpoint,
    open_checkpoint,
    verify_checkpoint,
)
from axlearn.common.checkpointer._stored import tiles
from axlearn.common.utils import TensorSpec
from tests.common.checkpointer.axlearn_harness import save_axlearn_steps, write_checkpoint
from tests.common.checkpointer.harness import (
    Hooked,
    all_files,
    assert_same,
    make_state,
    one_device,
    opened,
    save_steps,
    specs_of,
)
from tests.fixtures_reference import ReferenceRun

_ARRAYS = {
    "model/layers/w": np.arange(4 * 6 * 2, dtype=np.float32).reshape(4, 6, 2),
    "model/emb": np.arange(24).astype(ml_dtypes.bfloat16).reshape(8, 3),
    "model/scalar": np.array(7, np.int32),
    "model/empty": np.zeros((0, 3), np.float32),
}


def _layers(value: np.ndarray):
    """One part per index of the leading dimension, the last one first."""
    for i in reversed(range(len(value))):
        yield (slice(i, i + 1), *[slice(None)] * (value.ndim - 1)), value[i : i + 1]


def _add_all(writer: CheckpointWriter) -> None:
    for path, value in _ARRAYS.items():
        parts = _layers(value) if value.ndim > 1 else [((slice(None),) * value.ndim, value)]
        writer.add_array(path, shape=value.shape, dtype=value.dtype, parts=parts)


def test_what_is_written_in_parts_is_an_ordinary_checkpoint(tmp_path):
    with CheckpointWriter(tmp_path / "checkpoints", step=0) as writer:
        _add_all(writer)
    verify_checkpoint(tmp_path / "checkpoints" / "step_00000000")
    specs = {path: TensorSpec(value.shape, value.dtype) for path, value in _ARRAYS.items()}
    with one_device():
        restored = load_checkpoint(tmp_path / "checkpoints", state=specs).state
    for path, value in _ARRAYS.items():
        assert np.asarray(restored[path]).tobytes() == value.tobytes()
    index = json.loads((tmp_path / "checkpoints/step_00000000/index").read_text())
    assert index[0] == ["step", 0]
    assert [path for path, _ in index[1:]] == sorted(_ARRAYS)
    chunks = all_files(tmp_path / "checkpoints/step_00000000/gda/model/layers/w/c")
    assert [path.stat().st_size for path in chunks] == [6 * 2 * 4 + 4] * 4


def test_the_reader_gives_arrays_and_parts_of_them(tmp_path):
    with CheckpointWriter(tmp_path, step=3) as writer:
        _add_all(writer)
    for path in (tmp_path, tmp_path / "step_00000003"):
        reader = open_checkpoint(path)
        assert (reader.step, reader.writer, dict(reader.documents)) == (3, "ours", {})
        assert {name: tuple(entry) for name, entry in reader.arrays.items()} == {
            name: (value.shape, value.dtype) for name, value in _ARRAYS.items()
        }
    w = _ARRAYS["model/layers/w"]
    for index in [None, (), (slice(1, 2),), (slice(-3, None), slice(2, 4)), (slice(3, 2),)]:
        np.testing.assert_array_equal(reader.read("model/layers/w", index), w[index or ()])
    for name, value in _ARRAYS.items():
        parts = list(reader.parts(name))
        assert sum(part.size for _, part in parts) == value.size
        for index, part in parts:
            np.testing.assert_array_equal(part, value[index])
    with pytest.raises(ValueError, match="no part of an array of shape"):
        reader.read("model/layers/w", (slice(None, None, 2),))
    with pytest.raises(ValueError, match=r"There is no array model/layer/w(.|\n)*model/layers/w"):
        reader.read("model/layer/w")


def test_what_is_read_was_verified(tmp_path):
    save_steps(tmp_path, 1)
    chunk = tmp_path / "step_00000001/gda/learner/mu/c/0"
    data = bytearray(chunk.read_bytes())
    data[3] ^= 1
    chunk.write_bytes(data)
    reader = open_checkpoint(tmp_path)
    np.testing.assert_array_equal(reader.read("model/w"), make_state(1)["model"]["w"])
    with pytest.raises(CorruptCheckpointError, match="gda/learner/mu/c/0: does not hold what was written"):
        reader.read("learner/mu", (slice(4, 5),))


def test_the_newest_that_can_be_opened_is_opened(tmp_path):
    save_steps(tmp_path, 1, 2)
    (tmp_path / "step_00000002/index").write_text("[]")
    assert open_checkpoint(tmp_path).step == 1
    with pytest.raises(CorruptCheckpointError):
        open_checkpoint(tmp_path, step=2)
    with pytest.raises(ValueError, match="There is no checkpoint here"):
        open_checkpoint(tmp_path / "none")
    with pytest.raises(ValueError, match="no checkpoint of step 5"):
        open_checkpoint(tmp_path, step=5)


# What does not become a checkpoint.

_WHOLE = (slice(0, 4), slice(0, 6))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "24 of 24 elements are in no part"),
        ([((slice(0, 2), slice(0, 6)), (2, 6))], "12 of 24 elements are in no part"),
        ([((slice(0, 2), slice(0, 6)), (2, 6))] * 2, "there are two parts at"),
        ([(_WHOLE, (4, 5))], r"a part of shape \(4, 5\)"),
        ([((slice(0, 4),), (4, 6))], r"a part of shape \(4, 6\) at"),
        ([((slice(0, 3), slice(0, 6)), (3, 6)), ((slice(3, 4), slice(0, 6)), (1, 6))], r"has shape \(3, 6\)"),
        ([((slice(1, 3), slice(0, 6)), (2, 6))], r"at \(slice\(1, 3"),
        ([((slice(0, 4, 2), slice(0, 6)), (2, 6))], r"a part of shape \(2, 6\)"),
    ],
)
def test_parts_that_do_not_tile_the_array_are_refused(tmp_path, parts, message):
    values = ((index, np.zeros(shape, np.float32)) for index, shape in parts)
    with pytest.raises(ValueError, match=message), CheckpointWriter(tmp_path, step=1) as writer:
        writer.add_array("w", shape=(4, 6), dtype=np.float32, parts=values)
    assert [path.name for path in tmp_path.iterdir()] == [".writer"]


def test_other_mistakes_are_refused(tmp_path):
    part = [(_WHOLE, np.zeros((4, 6), np.float32))]

    def write(*adds) -> None:
        with CheckpointWriter(tmp_path, step=1) as writer:
            for path, dtype in adds:
                writer.add_array(path, shape=(4, 6), dtype=dtype, parts=part)

    def refused(message: str, *adds) -> None:
        with pytest.raises(ValueError, match=message):
            write(*adds)

    refused("has dtype float32", ("w", np.float64))
    refused("dtype str32", ("w", "U1"))
    refused("This array was written before", ("w", np.float32), ("w", np.float32))
    refused("cannot be the path of a leaf", ("../w", np.float32))
    refused("has a path below that of the leaf", ("a", np.float32), ("a/b", np.float32))
    refused("There are no arrays")
    with pytest.raises(ValueError, match="step=-1"):
        CheckpointWriter(tmp_path, step=-1)
    assert [path.name for path in tmp_path.iterdir()] == [".writer"]


def test_an_error_that_was_swallowed_does_not_leave_half_an_array(tmp_path):
    def write() -> None:
        with CheckpointWriter(tmp_path, step=1) as writer:
            _add_all(writer)
            with contextlib.suppress(ValueError):
                writer.add_array("w", shape=(4, 6), dtype=np.float32, parts=[])

    with pytest.raises(ValueError, match="w is not complete"):
        write()
    assert checkpoint_steps(tmp_path) == []


def test_a_step_that_is_there_is_refused_whoever_wrote_it(tmp_path):
    save_steps(tmp_path, 1)
    save_axlearn_steps(tmp_path, 2)
    (tmp_path / "step_00000003").mkdir()
    before = all_files(tmp_path)
    for step in (1, 2, 3):
        with pytest.raises(FileExistsError, match="is not replaced"), CheckpointWriter(tmp_path, step=step):
            raise AssertionError("not reached")
        with pytest.raises(FileExistsError, match="is not replaced"):
            export_axlearn(_as_step(tmp_path, step), output_dir=tmp_path)
    assert all_files(tmp_path) == before


def _as_step(base_dir, step):
    reader = open_checkpoint(base_dir, step=1)
    reader.step = step
    return reader


def test_a_folder_in_which_somebody_writes_is_refused(tmp_path):
    with opened(tmp_path) as checkpointer:
        checkpointer.save(step=1, state=make_state(1))
        with pytest.raises(DirectoryInUseError), CheckpointWriter(tmp_path, step=2):
            raise AssertionError("not reached")
    with CheckpointWriter(tmp_path, step=2) as writer, opened(tmp_path) as checkpointer:
        _add_all(writer)
        with pytest.raises(DirectoryInUseError):
            checkpointer.save(step=3, state=make_state(3))
    assert checkpoint_steps(tmp_path) == [1, 2]


# Crashes.


class _Failing(Hooked):
    """Fails at one operation, counted from 0; -1: never."""

    def __init__(self, at: int = -1):
        super().__init__(self._count)
        self.num_ops = 0
        self._at = at

    def _count(self, kind, path):
        if kind == "remove_tree":
            return
        self.num_ops += 1
        if self.num_ops - 1 == self._at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def _write_natively(source, target, files):
    with CheckpointWriter(target, step=1, files=files) as writer:
        _add_all(writer)


def _export(source, target, files):
    export_axlearn(open_checkpoint(source), output_dir=target, files=files)


@pytest.mark.parametrize("write", [_write_natively, _export])
def test_a_full_disk_at_any_moment_leaves_nothing(tmp_path, write):
    save_steps(tmp_path / "source", 1)
    counting = _Failing()
    write(tmp_path / "source", tmp_path / "count", counting)
    # The last operation makes a name durable that is there already.
    for at in range(counting.num_ops - 1):
        target = tmp_path / str(at)
        with pytest.raises(OSError, match="No space left"):
            write(tmp_path / "source", target, _Failing(at))
        assert {path.name for path in target.iterdir()} <= {".writer"}
    assert counting.num_ops > 20


@pytest.mark.parametrize("kind", ["write", "export"])
def test_a_killed_writer_leaves_nothing_that_looks_like_a_checkpoint(tmp_path, kind):
    save_steps(tmp_path / "source", 1)
    script = f"""
        import os, pathlib, signal, sys
        import numpy as np
        from axlearn.common.checkpointer import CheckpointWriter, export_axlearn, open_checkpoint
        from axlearn.common.checkpointer._file_ops import FileOps

        class Deadly(FileOps):
            def rename(self, source, target):
                os.kill(os.getpid(), signal.SIGKILL)

        target = {str(tmp_path / "target")!r}
        if {kind!r} == "export":
            export_axlearn(open_checkpoint({str(tmp_path / "source")!r}), output_dir=target, files=Deadly())
        with CheckpointWriter(target, step=1, files=Deadly()) as writer:
            writer.add_array("w", shape=(2,), dtype=np.float32, parts=[((slice(0, 2),), np.zeros(2, np.float32))])
    """
    env = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).resolve().parents[3])}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=env, check=False)
    assert done.returncode == -signal.SIGKILL
    assert checkpoint_steps(tmp_path / "target") == []
    assert list((tmp_path / "target").glob("step_*.tmp-*"))
    # The next writer finds the folder free, and clears it.
    with CheckpointWriter(tmp_path / "target", step=1) as writer:
        _add_all(writer)
    assert [path.name for path in (tmp_path / "target").glob("step_*")] == ["step_00000001"]


# From one layout to the other.


def test_the_reference_s_own_checkpoints_come_back_byte_for_byte(tmp_path):
    """AXLearn's files, into our layout, and out again: the same names, and the same bytes in every one of them."""
    folder = ReferenceRun.unpack(tmp_path).folder / "checkpoints"
    for step in (0, 3):
        imported = export_native(open_checkpoint(folder, step=step), output_dir=tmp_path / "ours")
        verify_checkpoint(imported.path)
        assert open_checkpoint(imported.path).writer == "ours"
        exported = export_axlearn(open_checkpoint(imported.path), output_dir=tmp_path / "theirs")
        theirs = folder / f"step_{step:08d}"
        files = {str(path.relative_to(theirs)): path.read_bytes() for path in all_files(theirs)}
        copies = {str(p.relative_to(exported.path)): p.read_bytes() for p in all_files(exported.path)}
        assert sorted(copies) == sorted(files)
        assert [name for name in files if copies[name] != files[name]] == []
        assert (exported.num_arrays, exported.left_out) == (31, {})
    # Nothing but the steps: no lock, no manifest, no leftovers.
    assert sorted(path.name for path in (tmp_path / "theirs").iterdir()) == ["step_00000000", "step_00000003"]


def test_a_checkpoint_of_ours_is_exported_and_says_what_is_left_out(tmp_path):
    state = save_steps(tmp_path / "ours", 5)[5]
    exported = export_axlearn(open_checkpoint(tmp_path / "ours"), output_dir=tmp_path / "theirs")
    assert list(exported.left_out) == ["input_iter"]
    text = (exported.path / "index").read_text()
    assert text == (
        '[["step", 5], ["learner/count", {"dtype": "int32", "shape": "()"}], '
        '["learner/mu", {"dtype": "bfloat16", "shape": "(6,)"}], '
        '["model/w", {"dtype": "float32", "shape": "(4, 6)"}], '
        '["prng_key", {"dtype": "uint32", "shape": "(2,)"}]]'
    )
    verify_checkpoint(exported.path)
    state.pop("input_iter")
    with one_device():
        assert_same(load_checkpoint(tmp_path / "theirs", state=specs_of(state)).state, state)
    metadata = json.loads((exported.path / "gda/learner/mu/.zarray").read_text())
    assert (metadata["dtype"], metadata["chunks"], metadata["fill_value"]) == ("bfloat16", [6], None)


def test_their_chunks_may_have_any_shape(tmp_path):
    value = np.arange(35, dtype=np.float32).reshape(5, 7)
    write_checkpoint(tmp_path / "theirs", step=1, arrays={"w": value}, chunks=(2, 3))
    imported = export_native(open_checkpoint(tmp_path / "theirs"), output_dir=tmp_path / "ours")
    np.testing.assert_array_equal(open_checkpoint(imported.path).read("w"), value)


def test_tiles_cover_every_element_once():
    for shape, tile in [((), ()), ((5, 7), (2, 3)), ((0, 3), (1, 3)), ((4,), (9,))]:
        counts = np.zeros(shape, int)
        for index in tiles(shape, tile):
            counts[index] += 1
        assert (counts == 1).all()
