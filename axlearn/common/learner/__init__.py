"""Learners: from a forward pass to new parameters, and what has to be remembered between steps."""

from axlearn.common.learner._base import BaseLearner as BaseLearner
from axlearn.common.learner._base import UpdateType as UpdateType
from axlearn.common.learner._composite import CompositeLearner as CompositeLearner
from axlearn.common.learner._learner import Learner as Learner
