"""Which fields of our configs a translation has to look at."""

from collections.abc import Sequence
from typing import Any

from axlearn.common.base_layer import BaseLayer
from axlearn.common.config import REQUIRED, public_name
from axlearn.common.hf._errors import refusal

# Fields that leave the outputs of a trained model as they are: where its arrays lie, what is recomputed, how it is
# initialised, what happens in training only, in which type it computes, what is logged, how decoding caches.
_NEUTRAL = frozenset(
    (
        *(
            "klass",
            "name",
            "vlog",
            "dtype",
            "param_init",
            "param_partition_spec",
            "remat_spec",
            "param_noise",
        ),
        *("tensor_stats", "dropout", "dropout_rate", "output_dropout", "stochastic_depth"),
        *("peak_stochastic_depth_rate", "input_partition_spec", "output_partition_spec", "forward_dtype"),
        *("add_dead_neuron_summary", "add_value_rms_norm_summary", "kv_cache"),
        # Sizes that the parent fills in.
        *("input_dim", "target_dim", "source_dim", "query_dim", "key_dim", "value_dim", "output_dim"),
        *("model_dim", "per_head_dim", "dim", "num_embeddings", "embedding_dim", "vocab_size", "num_heads"),
    )
)


def check_fields(
    cfg: BaseLayer.Config, *, where: str, classes: Sequence[type], read: Sequence[str] = ()
) -> None:
    """Refuses a config that may compute something which the caller does not look at.

    Args:
        cfg: The config of a layer.
        where: Its path, for messages.
        classes: The layers that the caller understands; a subclass may compute something else.
        read: Fields that the caller looks at, or that do not matter to it.

    Raises:
        ValueError: The config is that of another class, or a field that is neither read nor neutral has not the
            value that it has by default.
    """
    layer: Any = cfg
    if layer.klass not in classes:
        raise refusal(f"{where}.klass", layer.klass, expected=" or ".join(public_name(x) for x in classes))
    defaults = dict(layer.klass.default_config().items())
    for name, value in cfg.items():
        if name in _NEUTRAL or name in read or value is REQUIRED or value == defaults[name]:
            continue
        raise refusal(f"{where}.{name}", value, expected=repr(defaults[name]))
