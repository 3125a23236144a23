"""Whether a run directory can be written is known without leaving anything there."""

import pytest

from axlearn.common.run_dir import check_run_dir, default_run_dir, make_run_dir


def test_a_new_directory_passes_and_is_not_made(tmp_path):
    check_run_dir(str(tmp_path / "a" / "b"))
    assert list(tmp_path.iterdir()) == []
    make_run_dir(str(tmp_path / "a" / "b"))
    assert (tmp_path / "a" / "b").is_dir()
    make_run_dir(str(tmp_path / "a" / "b"))


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(NotADirectoryError, match=f"{tmp_path}/file is a file"):
            check_run_dir(str(path))


def test_a_place_that_cannot_be_written_is_named():
    # Also root cannot write there.
    with pytest.raises(OSError, match="run directory /proc/run: /proc: "):
        check_run_dir("/proc/run")


def test_runs_have_a_default_place():
    assert default_run_dir("fuji-tiny") == "runs/fuji-tiny"
