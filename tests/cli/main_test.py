"""The `axlearn` command itself: its help, unknown verbs, and what becomes of errors."""

import subprocess
import sys
import types

import pytest

from axlearn.cli import main as cli


def test_help_lists_every_verb_with_the_first_line_of_its_docstring(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    for verb, summary in cli.verb_summaries().items():
        assert f"  {verb} " in out
        assert summary in out
    assert {"generate", "report"} <= set(cli.verb_summaries())
    assert "main" not in cli.verb_summaries()


def test_help_loads_neither_jax_nor_numpy():
    code = (
        "import sys; from axlearn.cli.main import main; main(['--help']); "
        "assert not {'jax', 'numpy', 'absl'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_no_verb_shows_the_help_as_an_error(capsys):
    assert cli.main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("usage: axlearn VERB")


def test_an_unknown_verb_is_answered_with_the_nearest(capsys):
    assert cli.main(["genrate"]) == 2
    assert capsys.readouterr().err.startswith(
        "axlearn: unknown verb 'genrate'. Did you mean 'generate'? Verbs: "
    )


@pytest.fixture
def failing_verb(monkeypatch):
    """Replaces the module of a verb by one that raises what it is told to."""

    def install(error: BaseException) -> None:
        def fail(argv):
            raise error

        monkeypatch.setitem(sys.modules, "axlearn.cli.report", types.SimpleNamespace(main=fail))

    return install


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("not that"), 2),
        (TypeError("not that"), 2),
        (FileNotFoundError(2, "not that"), 2),
        (RuntimeError("not that"), 1),
    ],
)
def test_an_error_is_a_short_message_and_a_status(error, status, failing_verb, capsys):
    error.add_note("Where it was.")
    failing_verb(error)
    assert cli.main(["report", "x"]) == status
    err = capsys.readouterr().err
    assert err.startswith("axlearn report: ")
    assert "not that\nWhere it was." in err
    assert "Traceback" not in err


def test_a_traceback_can_be_had(failing_verb, monkeypatch, capsys):
    monkeypatch.setenv("AXLEARN_TRACEBACK", "1")
    failing_verb(ValueError("not that"))
    assert cli.main(["report", "x"]) == 2
    err = capsys.readouterr().err
    assert "raise error" in err
    assert err.endswith("ValueError: not that\n")


def test_our_own_mistakes_keep_their_traceback(failing_verb):
    failing_verb(AssertionError("ours"))
    with pytest.raises(AssertionError, match="ours"):
        cli.main(["report", "x"])


def test_an_interrupt_has_the_shell_s_status(failing_verb):
    failing_verb(KeyboardInterrupt())
    assert cli.main(["report", "x"]) == 130
