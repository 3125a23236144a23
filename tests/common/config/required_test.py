"""REQUIRED may be compared with `is`, copied and printed, and nothing else."""

import copy
import operator
import pickle

import pytest

from axlearn.common.config import REQUIRED

OPERATIONS = {
    "add": lambda x: x + 1,
    "subtract": lambda x: 1 - x,
    "multiply": lambda x: x * 2,
    "divide": lambda x: x / 2,
    "floor-divide": lambda x: 7 // x,
    "modulo": lambda x: x % 2,
    "exponentiate": lambda x: x**2,
    "negate": operator.neg,
    "apply unary +": operator.pos,
    "apply abs() to": abs,
    "compare": lambda x: x < 1,
    "convert to int": int,
    "convert to float": float,
    "subscript": lambda x: x[0],
    "iterate over": list,
    "check membership of": lambda x: 1 in x,
    "get length of": len,
    "call": lambda x: x(),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_using_it_says_what_was_attempted(operation):
    with pytest.raises(TypeError) as error:
        OPERATIONS[operation](REQUIRED)
    assert str(error.value) == (
        f"Cannot use a required config field before setting its value (attempted: {operation})."
    )


def test_attributes_can_neither_be_read_nor_set():
    with pytest.raises(
        AttributeError,
        match=r"Cannot access attribute 'shape' on a required config field before setting its value\.",
    ):
        _ = REQUIRED.shape
    with pytest.raises(AttributeError, match="Cannot set attribute 'shape'"):
        REQUIRED.shape = 3


def test_it_is_false_prints_its_name_and_stays_one_object():
    assert not REQUIRED
    assert repr(REQUIRED) == str(REQUIRED) == "REQUIRED"
    assert copy.deepcopy(REQUIRED) is copy.copy(REQUIRED) is type(REQUIRED)() is REQUIRED
    assert pickle.loads(pickle.dumps(REQUIRED)) is REQUIRED
    assert REQUIRED == REQUIRED
