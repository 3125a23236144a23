"""Which errors are a message, and which are a traceback."""

import json
import pathlib

import pytest

from axlearn.common.config import REQUIRED, Configurable, Required, config_class
from axlearn.common.user_errors import error_text, is_for_users


class Named(Configurable):
    """Something with one field."""

    @config_class
    class Config(Configurable.Config):
        size: Required[int] = REQUIRED


def _raise(error):
    raise error


def _error_of(fn) -> Exception:
    with pytest.raises(Exception) as e:
        fn()
    return e.value


@pytest.mark.parametrize("error", [ValueError("no"), TypeError("no"), RuntimeError("no"), OSError("no")])
def test_what_is_raised_on_purpose_is_a_message(error):
    error.add_note("Where it was.")
    assert error_text(_error_of(lambda: _raise(error))) == "no\nWhere it was."


def test_a_wrong_field_is_a_message():
    text = error_text(_error_of(lambda: Named.default_config().set(sise=3)))
    assert "Named.Config: unknown field 'sise' (set at " in text
    assert is_for_users(_error_of(lambda: setattr(Named.default_config(), "size", "x")))


@pytest.mark.parametrize(
    "slip",
    [
        lambda: len(None),
        lambda: int("x"),
        lambda: {}["x"],
        lambda: json.loads("{"),
        lambda: _raise(NotImplementedError("x")),
        lambda: _raise(AssertionError("x")),
    ],
)
def test_a_slip_keeps_its_traceback(slip):
    e = _error_of(slip)
    assert not is_for_users(e)
    assert error_text(e).startswith("Traceback (most recent call last):")


def test_what_the_system_says_comes_with_the_way_to_see_more():
    text = error_text(_error_of(lambda: pathlib.Path("/no/such/file").read_text()))
    assert text.splitlines() == [
        "[Errno 2] No such file or directory: '/no/such/file'",
        "(AXLEARN_TRACEBACK=1 shows where this was raised.)",
    ]


def test_a_traceback_can_be_had_for_all(monkeypatch):
    e = _error_of(lambda: _raise(ValueError("no")))
    assert "Traceback" not in error_text(e)
    assert "Traceback" in error_text(e, with_traceback=True)
    monkeypatch.setenv("AXLEARN_TRACEBACK", "1")
    assert "Traceback" in error_text(e)
