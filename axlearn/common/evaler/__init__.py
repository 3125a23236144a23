"""Evaluation: the whole of a finite input, through the model as it is at a step, into one set of numbers."""

from axlearn.common.evaler._calculators import BaseMetricCalculator as BaseMetricCalculator
from axlearn.common.evaler._calculators import BatchOutputs as BatchOutputs
from axlearn.common.evaler._calculators import GlobalMetricCalculator as GlobalMetricCalculator
from axlearn.common.evaler._calculators import ModelSummaryAccumulator as ModelSummaryAccumulator
from axlearn.common.evaler._composite import CompositeMetricCalculator as CompositeMetricCalculator
from axlearn.common.evaler._composite import Dependency as Dependency
from axlearn.common.evaler._evaler import SpmdEvaler as SpmdEvaler
from axlearn.common.evaler._fields import maybe_set_fields as maybe_set_fields
from axlearn.common.evaler._fields import set_writer_fields as set_writer_fields
from axlearn.common.evaler._policy import EvalPolicy as EvalPolicy
from axlearn.common.evaler._policy import every_n_steps_policy as every_n_steps_policy
