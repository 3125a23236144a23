"""Changes to a trainer's config that go with a kind of machine: what `mesh_rules` hold besides plain mesh shapes."""

from axlearn.common.trainer_config_modifier._context_parallel import (
    ContextParallelMethod as ContextParallelMethod,
)
from axlearn.common.trainer_config_modifier._context_parallel import (
    ContextParallelModifier as ContextParallelModifier,
)
from axlearn.common.trainer_config_modifier._fp8 import FP8ConfigModifier as FP8ConfigModifier
from axlearn.common.trainer_config_modifier._modifiers import ChainConfigModifier as ChainConfigModifier
from axlearn.common.trainer_config_modifier._modifiers import (
    GradientAccumulationModifier as GradientAccumulationModifier,
)
from axlearn.common.trainer_config_modifier._modifiers import MeshShapeModifier as MeshShapeModifier
from axlearn.common.trainer_config_modifier._modifiers import ModuleConfigModifier as ModuleConfigModifier
from axlearn.common.trainer_config_modifier._modifiers import PartitionSpecModifier as PartitionSpecModifier
from axlearn.common.trainer_config_modifier._modifiers import RematSpecModifier as RematSpecModifier
from axlearn.common.trainer_config_modifier._modifiers import (
    ReplaceLayerConfigModifier as ReplaceLayerConfigModifier,
)
from axlearn.common.trainer_config_modifier._modifiers import ScanChunkModifier as ScanChunkModifier
