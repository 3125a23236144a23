"""What recipes for decoder-only language models share: mesh axes, layer stack, learner, the trainer's frame."""

from axlearn.experiments.text.gpt.common._frame import BATCH_AXIS_NAMES as BATCH_AXIS_NAMES
from axlearn.experiments.text.gpt.common._frame import MESH_AXIS_NAMES as MESH_AXIS_NAMES
from axlearn.experiments.text.gpt.common._frame import WEIGHT_AXIS_NAMES as WEIGHT_AXIS_NAMES
from axlearn.experiments.text.gpt.common._frame import attention_config as attention_config
from axlearn.experiments.text.gpt.common._frame import evaler_config as evaler_config
from axlearn.experiments.text.gpt.common._frame import layer_config as layer_config
from axlearn.experiments.text.gpt.common._frame import learner_config as learner_config
from axlearn.experiments.text.gpt.common._frame import mesh_shape_from_axes as mesh_shape_from_axes
from axlearn.experiments.text.gpt.common._frame import model_config as model_config
from axlearn.experiments.text.gpt.common._frame import rms_norm_config as rms_norm_config
from axlearn.experiments.text.gpt.common._frame import scale_fn as scale_fn
from axlearn.experiments.text.gpt.common._frame import scaled_hidden_dim as scaled_hidden_dim
from axlearn.experiments.text.gpt.common._frame import trainer_config as trainer_config
from axlearn.experiments.text.gpt.common._frame import weight_init as weight_init
