"""Durable writes and private folders."""

import os
import stat

import pytest

from axlearn.common import file_system


def test_a_text_is_written_whole_and_replaces_the_old_one(tmp_path):
    path = tmp_path / "config.txt"
    file_system.write_text_durably(path, "old\n")
    file_system.write_text_durably(path, "größer\r\n")
    assert path.read_bytes() == "größer\r\n".encode()
    assert os.listdir(tmp_path) == ["config.txt"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failing):
    path = tmp_path / "config.txt"
    file_system.write_bytes_durably(path, b"old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="No space left"):
        file_system.write_bytes_durably(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["config.txt"]


def test_the_file_is_durable_before_its_name_and_the_name_before_the_return(tmp_path, monkeypatch):
    events = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *args, name=name, original=original: events.append(name) or original(*args)
        )
    file_system.write_bytes_durably(tmp_path / "x", b"data")
    assert events == ["fsync", "replace", "fsync"]


def test_the_cache_is_private_and_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("AXLEARN_CACHE_DIR", str(tmp_path / "outer" / "cache"))
    path = file_system.cache_dir()
    assert path == tmp_path / "outer" / "cache"
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert file_system.cache_dir() == path
    monkeypatch.delenv("AXLEARN_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert file_system.cache_dir() == tmp_path / ".cache" / "axlearn"


def test_a_file_in_the_way_of_a_private_folder_is_an_error(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(OSError, match="exists"):
        file_system.make_private_dir(tmp_path / "x")
