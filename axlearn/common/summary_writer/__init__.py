"""Where summaries go: TensorBoard files, Weights & Biases, several places at once, or nowhere."""

from axlearn.common.summary_writer._base import BaseWriter as BaseWriter
from axlearn.common.summary_writer._base import CompositeWriter as CompositeWriter
from axlearn.common.summary_writer._base import NoOpWriter as NoOpWriter
from axlearn.common.summary_writer._modifier import WandBModifier as WandBModifier
from axlearn.common.summary_writer._periodic import PeriodicWriter as PeriodicWriter
from axlearn.common.summary_writer._tensorboard import SummaryWriter as SummaryWriter
from axlearn.common.summary_writer._wandb import WandBWriter as WandBWriter
