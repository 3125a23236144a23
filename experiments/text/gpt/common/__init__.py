"""What recipes for decoder-only language models share: mesh axes, layer stack, learner, the trainer's frame."""

from axlearn.experiments.text.gpt.common._flash import flash_attention_config as flash_attention_config
from axlearn.experiments.text.gpt.common._learner import learner_config as learner_config
from axlearn.experiments.text.gpt.common._mesh import BATCH_AXIS_NAMES as BATCH_AXIS_NAMES
from axlearn.experiments.text.gpt.common._mesh import MESH_AXIS_NAMES as MESH_AXIS_NAMES
from axlearn.experiments.text.gpt.common._mesh import WEIGHT_AXIS_NAMES as WEIGHT_AXIS_NAMES
from axlearn.experiments.text.gpt.common._mesh import mesh_shape_from_axes as mesh_shape_from_axes
from axlearn.experiments.text.gpt.common._mesh_rules import MeshRule as MeshRule
from axlearn.experiments.text.gpt.common._mesh_rules import accumulate as accumulate
from axlearn.experiments.text.gpt.common._mesh_rules import keep as keep
from axlearn.experiments.text.gpt.common._mesh_rules import mesh_rule_config as mesh_rule_config
from axlearn.experiments.text.gpt.common._mesh_rules import save_names as save_names
from axlearn.experiments.text.gpt.common._model import attention_config as attention_config
from axlearn.experiments.text.gpt.common._model import layer_config as layer_config
from axlearn.experiments.text.gpt.common._model import model_config as model_config
from axlearn.experiments.text.gpt.common._model import rms_norm_config as rms_norm_config
from axlearn.experiments.text.gpt.common._model import scale_fn as scale_fn
from axlearn.experiments.text.gpt.common._model import scaled_hidden_dim as scaled_hidden_dim
from axlearn.experiments.text.gpt.common._model import weight_init as weight_init
from axlearn.experiments.text.gpt.common._sources import input_configs as input_configs
from axlearn.experiments.text.gpt.common._sources import (
    mixture_train_input_source as mixture_train_input_source,
)
from axlearn.experiments.text.gpt.common._sources import tfds_input as tfds_input
from axlearn.experiments.text.gpt.common._trainer import evaler_config as evaler_config
from axlearn.experiments.text.gpt.common._trainer import trainer_config as trainer_config
from axlearn.experiments.text.gpt.common._trainium import trainium_layout as trainium_layout
