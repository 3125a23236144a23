"""Training: a model, its data and a learner on a mesh of devices, and one compiled step."""

from axlearn.common.trainer._analysis import CompiledMemory as CompiledMemory
from axlearn.common.trainer._analysis import aot_model_analysis as aot_model_analysis
from axlearn.common.trainer._analysis import compiled_memory as compiled_memory
from axlearn.common.trainer._device_memory import MemoryThere as MemoryThere
from axlearn.common.trainer._device_memory import memory_there as memory_there
from axlearn.common.trainer._memory import DoesNotFitError as DoesNotFitError
from axlearn.common.trainer._memory import MemoryNeeds as MemoryNeeds
from axlearn.common.trainer._memory import array_bytes as array_bytes
from axlearn.common.trainer._memory import format_bytes as format_bytes
from axlearn.common.trainer._memory import shard_bytes as shard_bytes
from axlearn.common.trainer._mesh_rules import MeshRule as MeshRule
from axlearn.common.trainer._mesh_rules import find_mesh_rule as find_mesh_rule
from axlearn.common.trainer._mesh_rules import select_mesh_config as select_mesh_config
from axlearn.common.trainer._metrics_file import read_metrics as read_metrics
from axlearn.common.trainer._saved_step import is_step_saved as is_step_saved
from axlearn.common.trainer._saved_step import save_train_step as save_train_step
from axlearn.common.trainer._state import StoppedBySignal as StoppedBySignal
from axlearn.common.trainer._state import TrainerState as TrainerState
from axlearn.common.trainer._state import UndefinedLossException as UndefinedLossException
from axlearn.common.trainer._trainer import SpmdTrainer as SpmdTrainer
from axlearn.common.trainer._whole import WholeParameter as WholeParameter
from axlearn.common.trainer._whole import WholeParameters as WholeParameters
from axlearn.common.trainer._whole import find_whole_parameters as find_whole_parameters
