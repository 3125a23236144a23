"""What two processes make of two outcomes of one step: the same one."""

import errno
import pathlib
import threading

import pytest

from axlearn.common.checkpointer import CheckpointMismatchError, CorruptCheckpointError, _peers


def _corrupt(file: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        ckpt_dir=pathlib.Path("/x/step_00000001"), file=file, reason="hash-mismatch", detail="is bad."
    )


_MISMATCH = CheckpointMismatchError("other shapes")
_DENIED = PermissionError(errno.EACCES, "Permission denied", "/x/a")


@pytest.fixture
def both(monkeypatch):
    """Does a step in two threads that stand for processes; each outcome is what returned, or the error."""
    said: dict[str, str] = {}
    everybody_spoke = threading.Barrier(2)

    def gather(tag: str, text: str, *, timeout_seconds: float) -> list[str]:
        said[threading.current_thread().name] = text
        everybody_spoke.wait(timeout=timeout_seconds)
        return [said["0"], said["1"]]

    monkeypatch.setattr(_peers, "all_gather_text", gather)

    def run(*outcomes):
        results = {}

        def process(index: int) -> None:
            talk = _peers.Conversation("test", index=index, count=2, timeout_seconds=10)

            def step():
                if isinstance(outcomes[index], Exception):
                    raise outcomes[index]
                return outcomes[index]

            try:
                results[index] = talk.together(step)
            except Exception as e:
                results[index] = e

        threads = [threading.Thread(target=process, args=(i,), name=str(i)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [results[0], results[1]]

    return run


def test_each_process_gets_its_own_result(both):
    assert both("a", "b") == ["a", "b"]


@pytest.mark.parametrize(
    "outcomes", [("a", _corrupt("w")), (_corrupt("w"), "a"), (_corrupt("w"), _corrupt("v"))]
)
def test_damage_that_one_process_finds_is_damage_for_both(both, outcomes):
    found = next(outcome for outcome in outcomes if isinstance(outcome, Exception))
    for error in both(*outcomes):
        assert isinstance(error, CorruptCheckpointError)
        assert (error.ckpt_dir, error.file, error.reason) == (found.ckpt_dir, "w", "hash-mismatch")
        assert "is bad." in str(error)


@pytest.mark.parametrize("other", [_MISMATCH, _DENIED])
@pytest.mark.parametrize("order", [1, -1])
def test_what_is_no_damage_comes_first_so_that_nothing_is_renamed_for_it(both, other, order):
    for error in both(*(_corrupt("w"), other)[::order]):
        assert type(error) is type(other)
        assert getattr(error, "errno", None) == getattr(other, "errno", None)


def test_what_both_find_is_raised_as_each_of_them_found_it(both):
    assert both(_MISMATCH, _MISMATCH) == [_MISMATCH, _MISMATCH]


def test_an_error_of_another_library_is_named_on_the_other_process(both):
    own, heard = both("a", KeyError("x"))[::-1]
    assert isinstance(own, KeyError)
    assert str(heard) == "KeyError: 'x' (on process 1)"


def test_a_file_that_one_process_may_not_read_is_named_on_the_other(both):
    _, heard = both(_DENIED, "b")
    assert str(heard) == "[Errno 13] Permission denied: /x/a (on process 0)"
