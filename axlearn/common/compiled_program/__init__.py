"""What a compiled program does between devices, read from its text: collectives, with the loops around them counted."""

from axlearn.common.compiled_program._collectives import Collective as Collective
from axlearn.common.compiled_program._collectives import collectives_of as collectives_of
from axlearn.common.compiled_program._computations import Computation as Computation
from axlearn.common.compiled_program._computations import Instruction as Instruction
from axlearn.common.compiled_program._computations import parse_program as parse_program
from axlearn.common.compiled_program._groups import parse_groups as parse_groups
from axlearn.common.compiled_program._traffic import AccessedBytes as AccessedBytes
from axlearn.common.compiled_program._traffic import bytes_accessed as bytes_accessed
from axlearn.common.compiled_program._trips import UnknownTripCountError as UnknownTripCountError
from axlearn.common.compiled_program._trips import executions_of as executions_of
