"""Whether a run directory can be written is known without leaving anything there."""

import os

import pytest

from axlearn.common.config import REQUIRED, ConfigBase, ConfigJsonError, Required, config_class
from axlearn.common.run_dir import check_run_dir, default_run_dir, make_run_dir, read_run_config, set_run_dir


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


@config_class
class _Tokenizer(ConfigBase):
    directory: str = ""


@config_class
class _Trainer(ConfigBase):
    dir: Required[str] = REQUIRED
    tokenizer: _Tokenizer = _Tokenizer()
    evalers: dict[str, _Tokenizer] = {}
    layers: list[_Tokenizer] = []


def _trainer(run_dir: str) -> _Trainer:
    def inside(path: str) -> _Tokenizer:
        return _Tokenizer().set(directory=os.path.join(run_dir, path))

    return _Trainer().set(
        dir=run_dir, tokenizer=inside("a/b"), evalers={"e": inside("c")}, layers=[inside("d")]
    )


@pytest.mark.parametrize(("before", "after"), [("runs/x", "/data/y"), ("/data/x", "x"), ("x", "x")])
def test_paths_inside_of_a_run_move_with_it(before, after):
    cfg = _trainer(before)
    set_run_dir(cfg, after)
    assert cfg == _trainer(after)


def test_paths_outside_of_a_run_stay_where_they_are():
    cfg = _trainer("elsewhere").set(dir="runs/x")
    cfg.tokenizer.directory = "runs/xy/tokenizer"
    expected = cfg.clone(dir="runs/z")
    set_run_dir(cfg, "runs/z")
    assert cfg == expected
    for nothing in (REQUIRED, ""):
        unset = _trainer("runs/x").set(dir=nothing)
        set_run_dir(unset, "runs/z")
        assert unset == _trainer("runs/x").set(dir="runs/z")


def test_a_config_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "trainer_config.json").write_text('{"format"')
    with pytest.raises(ConfigJsonError, match=rf"^{tmp_path}/trainer_config\.json: not JSON"):
        read_run_config(str(tmp_path))
