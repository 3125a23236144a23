"""Damage is seen, named, set aside and survived; no bit can change without anybody noticing."""

import os
import pathlib
import random
import shutil

import pytest

from axlearn.common.checkpointer import (
    CorruptCheckpointError,
    NoUsableCheckpointError,
    load_checkpoint,
    verify_checkpoint,
)
from axlearn.common.checkpointer import _manifest as manifest_lib
from tests.common.checkpointer.harness import (
    all_files,
    assert_same,
    make_state,
    one_device,
    opened,
    save_steps,
    specs_of,
)

_NEWEST = "step_00000002"


@pytest.fixture(name="run", scope="module")
def _run(tmp_path_factory):
    """A folder with checkpoints of steps 1 and 2, not to be changed."""
    path = tmp_path_factory.mktemp("run")
    save_steps(path, 1, 2)
    return path


@pytest.fixture(name="base_dir")
def _base_dir(run, tmp_path):
    """A copy of it."""
    return pathlib.Path(shutil.copytree(run, tmp_path / "copy"))


def _falls_back(base_dir: pathlib.Path, damaged: str, caplog) -> None:
    """Asserts that step 1 is restored in the place of step 2, and that the damaged file is named."""
    caplog.clear()
    state = make_state(1)
    with opened(base_dir) as checkpointer:
        step, restored = checkpointer.restore(state=specs_of(state))
        assert step == 1, f"damage of {damaged} was not seen"
        assert_same(restored, state)
    assert f"{base_dir / _NEWEST / damaged}: " in caplog.text
    assert len(list(base_dir.glob(f"{_NEWEST}.corrupt-*"))) == 1
    assert not (base_dir / _NEWEST).exists()


def _undo(base_dir: pathlib.Path) -> None:
    (aside,) = base_dir.glob(f"{_NEWEST}.corrupt-*")
    aside.rename(base_dir / _NEWEST)


def _flip_bits(base_dir: pathlib.Path, *, num_flips: int, seed: int, caplog) -> int:
    """Flips one bit at a time, half of them in a file chosen first; returns how many were silent."""
    rng = random.Random(seed)
    files = all_files(base_dir / _NEWEST)
    num_silent = 0
    for i in range(num_flips):
        weights = [path.stat().st_size if i % 2 else 1 for path in files]
        path = rng.choices(files, weights=weights)[0]
        original = path.read_bytes()
        data = bytearray(original)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            _falls_back(base_dir, str(path.relative_to(base_dir / _NEWEST)), caplog)
            _undo(base_dir)
        except AssertionError:
            num_silent += 1
        path.write_bytes(original)
    return num_silent


def test_no_flipped_bit_stays_silent(base_dir, caplog):
    assert _flip_bits(base_dir, num_flips=100, seed=1, caplog=caplog) == 0


@pytest.mark.slow
def test_no_flipped_bit_of_many_stays_silent(base_dir, caplog):
    assert _flip_bits(base_dir, num_flips=400, seed=2, caplog=caplog) == 0


def test_flipped_bits_would_be_silent_without_hashes(base_dir, caplog, monkeypatch):
    """The negative control: what finds damage is what is claimed to find it."""
    monkeypatch.setattr(manifest_lib, "_checked_hash", lambda *args, **kwargs: None)
    chunk = base_dir / _NEWEST / "python_0/input_iter"
    chunk.write_bytes(chunk.read_bytes().replace(b"2", b"3"))
    with pytest.raises(AssertionError, match="was not seen"):
        _falls_back(base_dir, "python_0/input_iter", caplog)


def test_every_file_that_is_missing_cut_or_replaced_is_named(base_dir, caplog):
    newest, older = base_dir / _NEWEST, base_dir / "step_00000001"
    for path in all_files(newest):
        name = str(path.relative_to(newest))
        data = path.read_bytes()
        stale = (older / name).read_bytes()
        for damaged in (None, b"", data[: len(data) // 2], data[:-1], data + b"\0", stale):
            if damaged == data:
                continue  # Both steps have the same metadata of arrays.
            if damaged is None:
                path.unlink()
            else:
                path.write_bytes(damaged)
            _falls_back(base_dir, name, caplog)
            _undo(base_dir)
            path.write_bytes(data)


def test_two_files_that_were_swapped_are_seen(base_dir, caplog):
    a, b = (base_dir / _NEWEST / "gda" / path / "zarr.json" for path in ("model/w", "learner/mu"))
    data = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(data)
    _falls_back(base_dir, "gda/learner/mu/zarr.json", caplog)


def test_a_checkpoint_under_the_name_of_another_step_is_seen(base_dir, caplog):
    shutil.rmtree(base_dir / _NEWEST)
    shutil.copytree(base_dir / "step_00000001", base_dir / _NEWEST)
    _falls_back(base_dir, "MANIFEST.json", caplog)


def test_files_that_nobody_listed_do_no_harm(base_dir):
    (base_dir / _NEWEST / "gda/model/w/.nfs0001").write_bytes(b"x")
    with opened(base_dir) as checkpointer:
        assert checkpointer.restore(state=specs_of(make_state(2))).step == 2


def test_where_no_checkpoint_can_be_used_the_run_does_not_start_from_scratch(base_dir):
    for step in (1, 2):
        (base_dir / f"step_{step:08d}" / "index").unlink()
    # The second start finds only what the first one set aside.
    for expected in ("step_00000002/index: is missing.", "set aside are step_00000001.corrupt-missing-file"):
        with opened(base_dir) as checkpointer, pytest.raises(NoUsableCheckpointError) as e:
            checkpointer.restore(state=specs_of(make_state(1)))
        assert expected in str(e.value)
        assert "to begin from scratch, move this folder away" in str(e.value)
    assert len(list(base_dir.glob("step_*.corrupt-missing-file"))) == 2


def test_the_position_is_not_moved_by_a_checkpoint_that_does_not_verify(base_dir):
    for path in base_dir.glob("step_*/gda/model/w/c/0/0"):
        path.write_bytes(path.read_bytes()[:-1])
    specs = specs_of(make_state(1))
    with opened(base_dir) as checkpointer, pytest.raises(NoUsableCheckpointError):
        checkpointer.restore(state=specs)
    assert specs["input_iter"].record == 0


def test_a_given_step_that_is_damaged_is_an_error_and_keeps_its_name(base_dir):
    (base_dir / _NEWEST / "index").unlink()
    with opened(base_dir) as checkpointer, pytest.raises(CorruptCheckpointError, match="index: is missing"):
        checkpointer.restore(step=2, state=specs_of(make_state(2)))
    assert (base_dir / _NEWEST).is_dir()


def test_two_damaged_checkpoints_of_one_step_are_both_kept(base_dir):
    for _ in range(2):
        (base_dir / _NEWEST / "index").unlink()
        with opened(base_dir) as checkpointer:
            checkpointer.restore(state=specs_of(make_state(1)))
            checkpointer.save(step=2, state=make_state(2))
    names = sorted(path.name for path in base_dir.glob(f"{_NEWEST}*"))
    assert names == [_NEWEST, f"{_NEWEST}.corrupt-missing-file", f"{_NEWEST}.corrupt-missing-file-2"]


def test_a_reader_falls_back_without_renaming(base_dir):
    (base_dir / _NEWEST / "index").unlink()
    with one_device():
        assert load_checkpoint(base_dir, state=specs_of(make_state(1))).step == 1
    assert (base_dir / _NEWEST).is_dir()


def test_a_partial_restore_needs_only_its_own_files(base_dir):
    (base_dir / _NEWEST / "gda/learner/mu/c/0").write_bytes(b"")
    with one_device():
        state = make_state(2)
        assert load_checkpoint(base_dir, state={"model": specs_of(state["model"])}).step == 2
        with pytest.raises(CorruptCheckpointError, match="gda/learner/mu/c/0: has 0 bytes"):
            load_checkpoint(base_dir, step=2, state={"learner": specs_of(state["learner"])})
    with pytest.raises(CorruptCheckpointError, match="gda/learner/mu/c/0: has 0 bytes"):
        verify_checkpoint(base_dir / _NEWEST)


def test_a_damaged_chunk_that_a_hash_missed_is_found_by_its_checksum(base_dir, monkeypatch):
    monkeypatch.setattr(manifest_lib, "_checked_hash", lambda *args, **kwargs: None)
    chunk = base_dir / _NEWEST / "gda/model/w/c/0/0"
    data = bytearray(chunk.read_bytes())
    data[5] ^= 1
    chunk.write_bytes(data)
    with one_device(), pytest.raises(CorruptCheckpointError, match=r"gda/model/w.*(?i:crc|checksum|digest)"):
        load_checkpoint(base_dir, step=2, state=specs_of(make_state(2)))


@pytest.mark.parametrize(
    "error", [PermissionError(13, "Permission denied"), OSError(24, "Too many open files")]
)
def test_an_error_that_may_pass_is_raised_and_nothing_is_renamed(base_dir, monkeypatch, error):
    real_open = os.open

    def fake_open(path, *args, **kwargs):
        if str(path).endswith(f"{_NEWEST}/index"):
            raise error
        return real_open(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", fake_open)
    with opened(base_dir) as checkpointer, pytest.raises(type(error)):
        checkpointer.restore(state=specs_of(make_state(2)))
    assert (base_dir / _NEWEST).is_dir()


def test_a_disk_that_cannot_read_a_file_counts_as_damage(base_dir, monkeypatch, caplog):
    real_open = os.open

    def fake_open(path, *args, **kwargs):
        if str(path).endswith(f"{_NEWEST}/index"):
            raise OSError(5, "Input/output error")
        return real_open(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", fake_open)
    _falls_back(base_dir, "index", caplog)
    assert (base_dir / f"{_NEWEST}.corrupt-read-error").is_dir()


def test_a_folder_that_cannot_be_renamed_is_passed_over(base_dir, monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    (base_dir / _NEWEST / "index").unlink()
    monkeypatch.setattr("axlearn.common.checkpointer._select.set_aside", fail)
    with opened(base_dir) as checkpointer:
        assert checkpointer.restore(state=specs_of(make_state(1))).step == 1
    assert "could not be renamed" in caplog.text
