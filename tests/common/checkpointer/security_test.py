"""A checkpoint is data from anywhere: reading it runs nothing, stays in its folder, believes no size."""

import json
import os
import pickle
import resource
import shutil
import subprocess
import sys

import pytest

from axlearn.common.checkpointer import CorruptCheckpointError, read_state_spec, verify_checkpoint
from axlearn.common.checkpointer._file_ops import FileEntry
from axlearn.common.checkpointer._manifest import Manifest, encode_manifest, read_manifest
from tests.common.checkpointer.harness import (
    all_files,
    assert_same,
    make_state,
    opened,
    save_steps,
    specs_of,
)

_NEWEST = "step_00000002"


@pytest.fixture(name="base_dir")
def _base_dir(tmp_path):
    save_steps(tmp_path, 1, 2)
    return tmp_path


def _sign(ckpt_dir, **entries: FileEntry) -> None:
    """Writes a manifest that is right about every file, and says `entries` too."""
    import hashlib

    files = {}
    for path in all_files(ckpt_dir):
        name = str(path.relative_to(ckpt_dir))
        if name != "MANIFEST.json" and not path.is_symlink():
            files[name] = FileEntry(path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
    manifest = Manifest(step=2, files={**files, **entries})
    (ckpt_dir / "MANIFEST.json").write_bytes(encode_manifest(manifest))


def _is_set_aside(base_dir, reason: str) -> None:
    """Asserts that step 1 is restored, that step 2 was refused, and that neither took much memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with opened(base_dir) as checkpointer:
        assert checkpointer.restore(state=specs_of(make_state(1))).step == 1
    used_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert used_kib < 200 * 1024
    assert (base_dir / f"{_NEWEST}.corrupt-{reason}").is_dir()


def test_a_signed_manifest_is_accepted(base_dir):
    """The control: what the tests below change is what is refused."""
    _sign(base_dir / _NEWEST)
    with opened(base_dir) as checkpointer:
        assert checkpointer.restore(state=specs_of(make_state(2))).step == 2


def test_nothing_is_unpickled(base_dir, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("something was unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, fail)
    with opened(base_dir) as checkpointer:
        assert_same(checkpointer.restore(state=specs_of(make_state(2))).state, make_state(2))


@pytest.mark.parametrize(
    "name", ["../step_00000001/index", "/etc/passwd", "gda//x", "a/./b", "a\\..\\b", "x\0y"]
)
def test_paths_that_leave_the_checkpoint_are_refused(base_dir, name):
    _sign(base_dir / _NEWEST, **{name: FileEntry(4, "0" * 64)})
    with pytest.raises(CorruptCheckpointError, match="not a path inside the checkpoint"):
        verify_checkpoint(base_dir / _NEWEST)
    _is_set_aside(base_dir, "bad-manifest")


def test_links_are_not_followed(base_dir, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    for name in ("index", "gda/model"):
        target = outside / name.replace("/", "-")
        (base_dir / _NEWEST / name).rename(target)
        (base_dir / _NEWEST / name).symlink_to(target)
        with pytest.raises(CorruptCheckpointError, match=r"is not a (regular file|folder)"):
            verify_checkpoint(base_dir / _NEWEST)
        (base_dir / _NEWEST / name).unlink()
        target.rename(base_dir / _NEWEST / name)
    verify_checkpoint(base_dir / _NEWEST)


def test_a_pipe_in_the_place_of_a_file_does_not_hang(base_dir):
    (base_dir / _NEWEST / "index").unlink()
    os.mkfifo(base_dir / _NEWEST / "index")
    _is_set_aside(base_dir, "not-a-file")


def test_a_size_that_is_claimed_is_not_allocated(base_dir):
    _sign(base_dir / _NEWEST, index=FileEntry(10 * 2**30, "0" * 64))
    _is_set_aside(base_dir, "bad-manifest")


def test_a_manifest_that_is_huge_is_not_read(base_dir):
    with open(base_dir / _NEWEST / "MANIFEST.json", "r+b") as f:
        f.truncate(10 * 2**30)
    _is_set_aside(base_dir, "bad-manifest")


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "[]", "{}", '[["step", 3]]', '[["step", 2], ["w", {}]]', "\xff"]
)
def test_an_index_that_is_none_is_refused(base_dir, text):
    (base_dir / _NEWEST / "index").write_bytes(text.encode("latin-1"))
    _sign(base_dir / _NEWEST)
    _is_set_aside(base_dir, "bad-index")


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "nothing"])
def test_a_manifest_that_is_none_is_refused(base_dir, text):
    (base_dir / _NEWEST / "MANIFEST.json").write_text(text)
    _is_set_aside(base_dir, "bad-manifest")


@pytest.mark.parametrize(
    "shape",
    ["(__import__('os').system('true'),)", "(4, 6", "4, 6", "(-1, 6)", "(1e9,)", "(" + "9" * 50 + ",)"],
)
def test_a_shape_is_numbers_and_is_not_evaluated(base_dir, shape):
    path = base_dir / _NEWEST / "index"
    path.write_text(path.read_text().replace("(4, 6)", shape))
    _sign(base_dir / _NEWEST)
    _is_set_aside(base_dir, "bad-index")


@pytest.mark.parametrize("dtype", ["object", "V1000000000", "f4, f4", "key<fry>"])
def test_types_that_arrays_cannot_have_are_refused(base_dir, dtype):
    path = base_dir / _NEWEST / "index"
    path.write_text(path.read_text().replace("float32", dtype))
    _sign(base_dir / _NEWEST)
    with pytest.raises(CorruptCheckpointError, match="is not a type of arrays"):
        read_state_spec(base_dir / _NEWEST)


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [4 * 10**12, 6]},
        {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [10**12, 10**12]}}},
        {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [2, 6]}}},
        {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [0, 6]}}},
        {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": 7}}},
        {"codecs": [{"name": "gzip", "configuration": {"level": 1}}]},
        {"data_type": "float64"},
        {"storage_transformers": []},
        {"fill_value": 1.0},
    ],
)
def test_metadata_of_arrays_that_we_would_not_write_is_refused(base_dir, change):
    path = base_dir / _NEWEST / "gda/model/w/zarr.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    _sign(base_dir / _NEWEST)
    _is_set_aside(base_dir, "bad-array")


def test_a_chunk_that_is_not_listed_is_refused_rather_than_filled_with_zeros(base_dir):
    (base_dir / _NEWEST / "gda/model/w/c/0/0").unlink()
    _sign(base_dir / _NEWEST)
    _is_set_aside(base_dir, "bad-array")


def test_an_array_that_is_indexed_and_not_there_is_refused(base_dir):
    shutil.rmtree(base_dir / _NEWEST / "gda/model")
    _sign(base_dir / _NEWEST)
    _is_set_aside(base_dir, "bad-manifest")


def test_the_manifest_says_what_is_there(base_dir):
    manifest = read_manifest(base_dir / _NEWEST, step=2)
    names = {str(path.relative_to(base_dir / _NEWEST)) for path in all_files(base_dir / _NEWEST)}
    assert set(manifest.files) == names - {"MANIFEST.json"}
    text = json.loads((base_dir / _NEWEST / "MANIFEST.json").read_text())
    assert list(text) == ["format", "writer", "step", "files", "sha256"]


def test_importing_the_checkpointer_does_not_load_tensorstore():
    script = "import sys, axlearn.common.checkpointer; sys.exit('tensorstore' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
