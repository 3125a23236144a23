"""Where values of a config come from."""

import inspect
from typing import Any

import pytest

from axlearn.common.config import (
    REQUIRED,
    ConfigBase,
    PathError,
    Required,
    SourceLocation,
    config_class,
    dump_lines,
    origin_of,
    places_below,
    recording_callers,
)


@config_class
class Inner(ConfigBase):
    size: Required[int] = REQUIRED
    names: tuple[str, ...] = ("a", "b")


@config_class
class Outer(ConfigBase):
    inner: Inner = Inner()
    sizes: dict[str, int] = {"x": 1}
    note: Any = None


def _set_size(cfg: Outer) -> int:
    cfg.inner.size = 3
    return inspect.currentframe().f_lineno - 1


def _helper(cfg: Outer) -> tuple[int, int]:
    line = _set_size(cfg)
    return line, inspect.currentframe().f_lineno - 1


def test_a_location_knows_its_callers_only_while_they_are_recorded():
    cfg = Outer()
    inner_line, _ = _helper(cfg)
    assert cfg.inner.where_set("size") == (__file__, inner_line)
    assert cfg.inner.where_set("size").callers == ()
    with recording_callers():
        inner_line, helper_line = _helper(cfg)
    location = cfg.inner.where_set("size")
    assert location == SourceLocation(__file__, inner_line)
    assert location.callers == ((__file__, helper_line),)
    assert cfg.clone().inner.where_set("size").callers == location.callers
    _helper(cfg)
    assert cfg.inner.where_set("size").callers == ()


def test_an_import_is_no_caller(tmp_path, monkeypatch):
    (tmp_path / "imported_settings.py").write_text(
        "from tests.common.config.origins_test import Outer\ncfg = Outer(note=1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with recording_callers():
        import imported_settings  # type: ignore[import-not-found]
    location = imported_settings.cfg.where_set("note")
    assert location == (str(tmp_path / "imported_settings.py"), 2)
    assert location.callers == ()


def test_an_origin_has_value_default_and_who_set_it():
    cfg = Outer()
    cfg.inner.names = ("c",)
    line = inspect.currentframe().f_lineno - 1
    origin = origin_of(cfg, "inner.names.0")
    assert origin.path == "inner.names[0]"
    assert (origin.value, origin.has_default, origin.default) == ("c", True, "a")
    assert origin.declared_by == f"{__name__}.Inner"
    assert origin.location == (__file__, line)


@pytest.mark.parametrize(
    ("path", "value", "default"),
    [("note", None, None), ("inner.size", REQUIRED, REQUIRED), ("sizes.x", 1, 1), ("sizes['x']", 1, 1)],
)
def test_what_nobody_has_set_has_its_default(path, value, default):
    origin = origin_of(Outer(), path)
    assert origin.location is None
    assert origin.has_default
    assert (origin.value, origin.default) == (value, default)


def test_a_part_that_the_default_lacks_has_none():
    cfg = Outer(sizes={"x": 1, "y": 2})
    assert not origin_of(cfg, "sizes.y").has_default
    with pytest.raises(PathError, match="there is no 'z'"):
        origin_of(cfg, "sizes.z")


def test_lines_of_a_part_are_those_of_the_dump_and_a_silent_default_has_a_line_of_its_own():
    cfg = Outer(sizes={"x": 1, "y": 2})
    cfg.inner.size = 4
    dump = dict(line.split(": ") for line in cfg.debug_string().splitlines())
    assert dump_lines(cfg) == dump
    assert dump_lines(cfg, "sizes") == {"sizes['x']": "1", "sizes['y']": "2"}
    assert dump_lines(cfg, "inner") == {k: v for k, v in dump.items() if k.startswith("inner.")}
    assert dump_lines(cfg, "note") == {"note": "None"}
    assert "note" not in dump


def test_places_are_those_of_the_dump_with_what_holds_them():
    paths = [place.path for place in places_below(Outer())]
    assert paths == [
        "inner", "inner.names", "inner.names[0]", "inner.names[1]", "inner.size", "note", "sizes", "sizes['x']",
    ]  # fmt: skip
    assert [place.path for place in places_below(Outer(), closed=("inner",))] == [
        "inner", "note", "sizes", "sizes['x']",
    ]  # fmt: skip
