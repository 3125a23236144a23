"""Pipeline parallelism: one layer per stage, the stages on different devices, micro-batches flowing through them."""

from axlearn.common.pipeline._gpipe import GPipeSchedule as GPipeSchedule
from axlearn.common.pipeline._pipeline import Pipeline as Pipeline
from axlearn.common.pipeline._schedule import BaseSchedule as BaseSchedule
from axlearn.common.pipeline._schedule import StageInputs as StageInputs
from axlearn.common.pipeline._stream import StreamSchedule as StreamSchedule
