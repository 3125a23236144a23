"""AXLearn's checkpoints are read in all forms that they take, and nothing of them is ever changed."""

import json
import pathlib
import shutil
import zlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from axlearn.common.checkpointer import (
    CheckpointMismatchError,
    CheckpointSaveError,
    CorruptCheckpointError,
    NoUsableCheckpointError,
    checkpoint_steps,
    load_checkpoint,
    open_checkpoint,
    read_state_spec,
    verify_checkpoint,
)
from axlearn.common.checkpointer._zarr2 import _claimed_size
from axlearn.common.utils import TensorSpec, build_mesh, use_mesh
from tests.common.checkpointer.axlearn_harness import (
    ZSTD,
    arrays_of,
    save_axlearn_steps,
    stepped_specs,
    write_array,
    write_checkpoint,
    write_index,
)
from tests.common.checkpointer.harness import (
    Position,
    all_files,
    assert_same,
    make_state,
    one_device,
    opened,
    save_steps,
    specs_of,
)

_BLOSC = {"id": "blosc", "cname": "lz4", "clevel": 5, "shuffle": 1, "blocksize": 0}
_COMPRESSORS = (ZSTD, _BLOSC, {"id": "gzip", "level": 5}, {"id": "zlib", "level": 1}, None)
_DTYPES = (
    *("bool", "int8", "uint16", "int32", "uint32", "int64", "float16", "bfloat16", "float32", "float64"),
    *("complex64", "float8_e4m3fn", "float8_e5m2"),
)


def _content(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in all_files(folder)}


def _arrays():
    """Any array, with any chunks that metadata may have."""
    dims = st.lists(st.tuples(st.integers(1, 7), st.integers(1, 9)), max_size=3)
    return st.tuples(dims, st.sampled_from(_DTYPES), st.sampled_from(_COMPRESSORS), st.sampled_from("./"))


@settings(max_examples=60, deadline=None)
@given(_arrays(), st.integers(0, 2**32))
def test_arrays_of_any_chunks_types_and_compressors_are_read(tmp_path_factory, array, seed):
    dims, dtype, compressor, separator = array
    shape, chunks = (tuple(sizes) for sizes in zip(*dims, strict=True)) if dims else ((), ())
    rng = np.random.default_rng(seed)
    value = np.asarray(rng.integers(0, 2, size=shape)).astype(np.dtype(dtype))
    base_dir = tmp_path_factory.mktemp("any")
    ckpt_dir = write_checkpoint(
        base_dir,
        step=7,
        arrays={"a/b": value},
        chunks=chunks,
        compressor=compressor,
        dimension_separator=separator,
    )
    verify_checkpoint(ckpt_dir)
    reader = open_checkpoint(base_dir)
    assert (reader.step, reader.writer) == (7, "AXLearn's")
    assert reader.arrays["a/b"] == (shape, np.dtype(dtype))
    assert reader.read("a/b").tobytes() == value.tobytes()
    part = tuple(slice(n // 3, n) for n in shape)
    np.testing.assert_array_equal(reader.read("a/b", part), value[part])
    copy = np.zeros_like(value)
    for index, piece in reader.parts("a/b"):
        copy[index] = piece
    assert copy.tobytes() == value.tobytes()


def test_an_array_written_without_tensorstore_is_read(tmp_path):
    """Bytes and JSON by hand: big-endian, column-major, in chunks that do not divide the array."""
    value = np.arange(35, dtype=">f4").reshape(5, 7)
    folder = tmp_path / "step_00000002" / "gda" / "w"
    folder.mkdir(parents=True)
    metadata = {"zarr_format": 2, "shape": [5, 7], "chunks": [3, 4], "dtype": ">f4", "order": "F"}
    metadata |= {"compressor": {"id": "zlib", "level": 1}, "filters": None, "fill_value": 0}
    (folder / ".zarray").write_text(json.dumps(metadata))
    for i, j in np.ndindex(2, 2):
        chunk = np.zeros((3, 4), ">f4")
        piece = value[3 * i : 3 * i + 3, 4 * j : 4 * j + 4]
        chunk[: piece.shape[0], : piece.shape[1]] = piece
        (folder / f"{i}.{j}").write_bytes(zlib.compress(chunk.tobytes(order="F")))
    write_index(tmp_path / "step_00000002", step=2, arrays={"w": value.astype(np.float32)}, documents={})
    np.testing.assert_array_equal(open_checkpoint(tmp_path).read("w"), value)


# Restoring.


def test_a_state_is_restored_from_their_files(tmp_path, caplog):
    save_axlearn_steps(tmp_path, 3, documents={"input_iter": "<class 'grain.PyGrainDatasetIterator'>"})
    before = _content(tmp_path / "step_00000003")
    state = make_state(3)
    with opened(tmp_path) as checkpointer:
        step, restored = checkpointer.restore(state=stepped_specs(specs_of(state)))
    assert step == 3
    position = restored.pop("input_iter")
    state.pop("input_iter")
    assert_same(restored, state)
    assert position.record == 3
    assert "input_iter is stored as <class 'grain.PyGrainDatasetIterator'>" in caplog.text
    assert "input_iter continues behind step 3" in caplog.text
    assert _content(tmp_path / "step_00000003") == before


def test_a_position_that_does_not_follow_from_the_step_is_missing(tmp_path):
    save_axlearn_steps(tmp_path, 3)
    with opened(tmp_path) as checkpointer, pytest.raises(CheckpointMismatchError, match="input_iter"):
        checkpointer.restore(state=specs_of(make_state(3)))


def test_chunks_of_several_devices_restore_on_another_mesh(tmp_path):
    arrays = {
        "w": np.arange(8 * 12, dtype=np.float32).reshape(8, 12),
        "b": np.arange(24).astype(ml_dtypes.bfloat16).reshape(2, 12),
        "key": np.array([1, 2**32 - 1, 3, 4], np.uint32),
    }
    for path, value in arrays.items():
        chunks = tuple(max(1, n // 2) for n in value.shape)
        write_array(tmp_path / "step_00000001/gda" / path, value, chunks=chunks)
    write_index(tmp_path / "step_00000001", step=1, arrays=arrays, documents={})
    mesh = build_mesh(mesh_shape=(4, 2), mesh_axis_names=("a", "b"))
    with use_mesh(mesh):
        specs = {
            "w": TensorSpec((8, 12), jnp.float32, P("a", "b")),
            "b": TensorSpec((2, 12), jnp.bfloat16, P("b", "a")),
            "key": TensorSpec((4,), jnp.uint32, P()),
        }
        restored = load_checkpoint(tmp_path, state=specs).state
    for path, value in arrays.items():
        assert np.asarray(restored[path]).tobytes() == value.tobytes()
        assert restored[path].sharding == jax.NamedSharding(mesh, specs[path].mesh_axes)


def test_their_arrays_are_listed(tmp_path):
    save_axlearn_steps(tmp_path, 1)
    spec = read_state_spec(tmp_path / "step_00000001")
    assert spec["learner"]["mu"] == TensorSpec((6,), np.dtype("bfloat16"))


def test_a_partial_restore_reads_only_its_own_files(tmp_path):
    save_axlearn_steps(tmp_path, 2)
    (tmp_path / "step_00000002/gda/learner/mu/0").unlink()
    with one_device():
        model = {"model": specs_of(make_state(2)["model"])}
        assert_same(load_checkpoint(tmp_path, state=model).state, {"model": make_state(2)["model"]})


def test_a_mismatch_is_the_usual_error(tmp_path):
    save_axlearn_steps(tmp_path, 2)
    with one_device(), pytest.raises(CheckpointMismatchError, match=r"model/w: \(4, 6\) in the checkpoint"):
        load_checkpoint(tmp_path, state={"model": {"w": TensorSpec((4, 7), jnp.float32)}})


# What is nobody's to change.


def test_their_checkpoints_are_never_deleted_and_cost_none_of_ours(tmp_path):
    save_axlearn_steps(tmp_path, 1, 2, 3)
    before = _content(tmp_path / "step_00000001")
    with opened(tmp_path, keep_last_n=2) as checkpointer:
        checkpointer.restore(state=stepped_specs(specs_of(make_state(3))))
        for step in (4, 5, 6):
            checkpointer.save(step=step, state=make_state(step))
    assert checkpoint_steps(tmp_path) == [1, 2, 3, 5, 6]
    assert _content(tmp_path / "step_00000001") == before


def test_a_damaged_one_keeps_its_name_and_the_one_before_is_used(tmp_path, caplog):
    save_steps(tmp_path, 1)
    save_axlearn_steps(tmp_path, 2)
    (tmp_path / "step_00000002/gda/model/w/0.0").unlink()
    with opened(tmp_path) as checkpointer:
        assert checkpointer.restore(state=stepped_specs(specs_of(make_state(1)))).step == 1
        assert f"{tmp_path / 'step_00000002' / 'gda/model/w/0.0'}: is missing." in caplog.text
        assert "step 2 cannot be saved until you move it away" in caplog.text
        checkpointer.save(step=2, state=make_state(2))
        with pytest.raises(CheckpointSaveError, match="in AXLearn's layout already, which we do not replace"):
            checkpointer.wait_until_finished()
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_00000001", "step_00000002"]
    assert not (tmp_path / "step_00000002/MANIFEST.json").exists()


def test_where_all_of_theirs_are_damaged_the_run_does_not_start_from_scratch(tmp_path):
    save_axlearn_steps(tmp_path, 1, 2)
    for path in tmp_path.glob("step_*/gda/model/w/.zarray"):
        path.write_text("{}")
    for _ in range(2):
        with (
            opened(tmp_path) as checkpointer,
            pytest.raises(NoUsableCheckpointError, match="is not the meta"),
        ):
            checkpointer.restore(state=stepped_specs(specs_of(make_state(1))))
    assert checkpoint_steps(tmp_path) == [1, 2]


def test_one_of_ours_that_lost_its_manifest_is_ours_and_damaged(tmp_path):
    save_steps(tmp_path, 1, 2, 3)
    (tmp_path / "step_00000003/MANIFEST.json").unlink()
    for name in ("MANIFEST.json", "index"):
        (tmp_path / "step_00000002" / name).unlink()
    with opened(tmp_path) as checkpointer:
        assert checkpointer.restore(state=specs_of(make_state(1))).step == 1
    names = sorted(path.name for path in tmp_path.glob("step_*"))
    assert names == [
        "step_00000001",
        "step_00000002.corrupt-missing-file",
        "step_00000003.corrupt-missing-file",
    ]


def test_where_theirs_are_only_linked_the_run_does_not_start_from_scratch(tmp_path):
    save_axlearn_steps(tmp_path / "theirs", 1, 2)
    base_dir = tmp_path / "run"
    base_dir.mkdir()
    (base_dir / "step_00000002").symlink_to(tmp_path / "theirs/step_00000002")
    with (
        opened(base_dir) as checkpointer,
        pytest.raises(
            NoUsableCheckpointError, match=r"only links to checkpoints \(step_00000002\), .* not foll"
        ),
    ):
        checkpointer.restore(state=stepped_specs(specs_of(make_state(1))))
    with pytest.raises(NoUsableCheckpointError, match="Copy them here"):
        open_checkpoint(base_dir)
    # The folder of all of them may be a link.
    (tmp_path / "link").symlink_to(tmp_path / "theirs")
    assert open_checkpoint(tmp_path / "link").step == 2


def test_one_without_index_is_not_there_until_it_has_one(tmp_path):
    save_axlearn_steps(tmp_path, 1, 2)
    index = tmp_path / "step_00000002/index"
    text = index.read_text()
    index.unlink()
    assert checkpoint_steps(tmp_path) == [1]
    assert open_checkpoint(tmp_path).step == 1
    shutil.rmtree(tmp_path / "step_00000002/gda/model")
    assert checkpoint_steps(tmp_path) == [1]
    index.write_text(text)
    assert checkpoint_steps(tmp_path) == [1, 2]


def test_what_they_began_and_did_not_finish_makes_room_and_is_kept(tmp_path, caplog):
    save_axlearn_steps(tmp_path, 1, 2)
    (tmp_path / "step_00000002/index").unlink()
    before = _content(tmp_path / "step_00000002")
    with opened(tmp_path) as checkpointer:
        checkpointer.restore(state=stepped_specs(specs_of(make_state(1))))
        checkpointer.save(step=2, state=make_state(2))
    assert "was begun and not finished by somebody else" in caplog.text
    with opened(tmp_path) as checkpointer:
        assert checkpointer.restore(state=specs_of(make_state(2))).step == 2
    (kept,) = tmp_path.glob("step_00000002.uncommitted-*")
    assert _content(kept) == before


# Damage.


@pytest.fixture(name="ckpt_dir")
def _ckpt_dir(tmp_path):
    arrays = {**arrays_of(1), "big": np.random.default_rng(0).normal(size=(16, 16)).astype(np.float32)}
    return write_checkpoint(tmp_path, step=1, arrays=arrays, chunks=None)


@pytest.mark.parametrize(
    "change",
    [
        {"zarr_format": 3},
        {"shape": [16, 17]},
        {"shape": [4 * 10**12, 16]},
        {"dtype": "<f8"},
        {"dtype": "|V1000000000"},
        {"dtype": [["a", "<f4"]]},
        {"chunks": [16]},
        {"chunks": [0, 16]},
        {"chunks": [10**9, 10**9]},
        {"chunks": [8, 16]},
        {"chunks": 7},
        {"compressor": {"id": "lzma"}},
        {"compressor": "zstd"},
        {"filters": [{"id": "delta"}]},
        {"dimension_separator": "_"},
    ],
)
def test_metadata_that_does_not_fit_is_refused(ckpt_dir, change):
    path = ckpt_dir / "gda/big/.zarray"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CorruptCheckpointError, match=r"gda/big/(\.zarray: is not the metadata|\d\.\d: )"):
        verify_checkpoint(ckpt_dir)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000])
def test_metadata_that_is_none_is_refused(ckpt_dir, text):
    (ckpt_dir / "gda/big/.zarray").write_text(text)
    with pytest.raises(CorruptCheckpointError, match="is not the metadata of a float32 array"):
        verify_checkpoint(ckpt_dir)


@pytest.mark.parametrize(
    "text", ["", "[]", '[["step", 2]]', '[["step", 1], ["../x", {"dtype": "bool", "shape": "()"}]]']
)
def test_an_index_that_is_none_is_refused(ckpt_dir, text):
    (ckpt_dir / "index").write_text(text)
    with pytest.raises(CorruptCheckpointError, match="index: "):
        verify_checkpoint(ckpt_dir)


def test_every_chunk_that_is_missing_empty_cut_or_another_s_is_named(ckpt_dir):
    for path in (path for path in all_files(ckpt_dir) if path.name not in ("index", ".zarray")):
        data = path.read_bytes()
        other = (ckpt_dir / "gda" / ("model/w" if "big" in str(path) else "big") / "0.0").read_bytes()
        for damaged in (None, b"", data[:-1], other):
            if damaged is None:
                path.unlink()
            else:
                path.write_bytes(damaged)
            with pytest.raises(CorruptCheckpointError) as e:
                verify_checkpoint(ckpt_dir)
            assert str(path.parent.relative_to(ckpt_dir)) in str(e.value)
            path.write_bytes(data)
    verify_checkpoint(ckpt_dir)


def test_links_and_pipes_are_not_followed(ckpt_dir, tmp_path_factory):
    chunk = ckpt_dir / "gda/big/0.0"
    target = tmp_path_factory.mktemp("outside") / "chunk"
    chunk.rename(target)
    chunk.symlink_to(target)
    with pytest.raises(CorruptCheckpointError, match="is not a regular file"):
        verify_checkpoint(ckpt_dir)


def test_the_size_that_a_chunk_claims_is_read_from_its_header(tmp_path):
    for size in (1, 200, 256, 300, 70_000, 2**20):
        for compressor, name in ((ZSTD, "zstd"), (_BLOSC, "blosc")):
            folder = tmp_path / f"{name}-{size}"
            write_array(folder, np.zeros(size, np.int8), compressor=compressor)
            assert _claimed_size((folder / "0").read_bytes()[:18], compressor=name) == size
    # A frame with a window and a dictionary (RFC 8878, section 3.1.1.1), and one that does not say its size.
    frame = bytes.fromhex("28b52ffd") + bytes([0b10_0_00_0_01, 0x10, 7]) + (123).to_bytes(4, "little")
    assert _claimed_size(frame, compressor="zstd") == 123
    assert _claimed_size(bytes.fromhex("28b52ffd") + bytes([0, 0x10]) + b"x" * 12, compressor="zstd") is None


@pytest.mark.parametrize("compressor", [ZSTD, _BLOSC, None])
def test_a_chunk_that_claims_another_size_is_refused_before_it_is_decoded(tmp_path, monkeypatch, compressor):
    """A few bytes of zstd can claim, and become, gigabytes."""
    value = np.zeros(16, np.float32)
    ckpt_dir = write_checkpoint(tmp_path, step=1, arrays={"w": value}, compressor=compressor)
    write_array(tmp_path / "large", np.zeros(2**20, np.float32), compressor=compressor)
    shutil.copy(tmp_path / "large/0", ckpt_dir / "gda/w/0")

    def fail(*args):
        raise AssertionError("something was decoded")

    monkeypatch.setattr("axlearn.common.checkpointer._axlearn.ArrayReader", fail)
    with pytest.raises(CorruptCheckpointError, match=r"holds 4194304. Expected a chunk of 64 bytes."):
        verify_checkpoint(ckpt_dir)


@pytest.mark.parametrize(("compressor", "is_seen"), [({"id": "gzip", "level": 1}, True), (ZSTD, False)])
def test_flipped_bits_are_seen_where_the_compressor_has_a_checksum_and_else_not(
    tmp_path, compressor, is_seen
):
    """What the documentation admits: AXLearn compresses with zstd, which it does not ask for a checksum."""
    value = np.random.default_rng(0).normal(size=64).astype(np.float32)
    ckpt_dir = write_checkpoint(tmp_path, step=1, arrays={"w": value}, compressor=compressor)
    chunk = ckpt_dir / "gda/w/0"
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(data)
    if is_seen:
        with pytest.raises(CorruptCheckpointError, match="cannot be read"):
            verify_checkpoint(ckpt_dir)
    else:
        verify_checkpoint(ckpt_dir)


def test_a_leaf_that_moves_by_the_step_still_takes_a_position_that_was_saved(tmp_path):
    save_steps(tmp_path, 5)
    position = stepped_specs({})["input_iter"]
    with opened(tmp_path) as checkpointer:
        checkpointer.save(step=6, state={**make_state(6), "input_iter": Position(41)})
        checkpointer.wait_until_finished()
        checkpointer.restore(state={**specs_of(make_state(6)), "input_iter": position})
    assert position.record == 41
