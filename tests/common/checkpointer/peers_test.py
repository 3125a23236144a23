"""What two processes make of two outcomes of one step: the same one."""

import errno
import pathlib

import pytest

from axlearn.common.checkpointer import CheckpointMismatchError, CorruptCheckpointError
from tests.common.checkpointer.harness import in_two_threads


def _corrupt(file: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        ckpt_dir=pathlib.Path("/x/step_00000001"), file=file, reason="hash-mismatch", detail="is bad."
    )


_MISMATCH = CheckpointMismatchError("other shapes")
_DENIED = PermissionError(errno.EACCES, "Permission denied", "/x/a")


def _both(*outcomes):
    """What each of two processes gets from a step with these outcomes: results, or errors."""

    def process(talk):
        def step():
            if isinstance(outcomes[talk.index], Exception):
                raise outcomes[talk.index]
            return outcomes[talk.index]

        return talk.together(step)

    return in_two_threads(process)


def test_each_process_gets_its_own_result():
    assert _both("a", "b") == ["a", "b"]


@pytest.mark.parametrize(
    "outcomes", [("a", _corrupt("w")), (_corrupt("w"), "a"), (_corrupt("w"), _corrupt("v"))]
)
def test_damage_that_one_process_finds_is_damage_for_both(outcomes):
    found = next(outcome for outcome in outcomes if isinstance(outcome, Exception))
    for error in _both(*outcomes):
        assert isinstance(error, CorruptCheckpointError)
        assert (error.ckpt_dir, error.file, error.reason) == (found.ckpt_dir, "w", "hash-mismatch")
        assert "is bad." in str(error)


@pytest.mark.parametrize("other", [_MISMATCH, _DENIED])
@pytest.mark.parametrize("order", [1, -1])
def test_what_is_no_damage_comes_first_so_that_nothing_is_renamed_for_it(other, order):
    for error in _both(*(_corrupt("w"), other)[::order]):
        assert type(error) is type(other)
        assert getattr(error, "errno", None) == getattr(other, "errno", None)


def test_what_both_find_is_raised_as_each_of_them_found_it():
    assert _both(_MISMATCH, _MISMATCH) == [_MISMATCH, _MISMATCH]


def test_an_error_of_another_library_is_named_on_the_other_process():
    own, heard = _both("a", KeyError("x"))[::-1]
    assert isinstance(own, KeyError)
    assert str(heard) == "KeyError: 'x' (on process 1)"


def test_a_file_that_one_process_may_not_read_is_named_on_the_other():
    _, heard = _both(_DENIED, "b")
    assert str(heard) == "[Errno 13] Permission denied: /x/a (on process 0)"
