"""How a model lies on Trainium machines, whose compiler unrolls layers and splits sequences over "model".

Between layers activations are divided over the sequence, in attention and feed-forward over heads and hidden units:
sequence parallelism of Korthikanti et al., https://arxiv.org/abs/2205.05198, section 4.2.2.
"""

from axlearn.common.attention import GroupedQKVLinear, StackedTransformerLayer
from axlearn.common.config import ConfigModifier
from axlearn.common.trainer_config_modifier import ModuleConfigModifier, PartitionSpecModifier
from axlearn.experiments.text.gpt.common._mesh import WEIGHT_AXIS_NAMES
from axlearn.experiments.text.gpt.common._mesh_rules import LAYER_PATH

_BATCH = ("data", "fsdp")
_WHOLE_SEQ = (_BATCH, None, None)
_NORM = {"input_partition_spec": (_BATCH, "model", None), "output_partition_spec": _WHOLE_SEQ}
# An embedding, and a head of its own: vocabulary over "model", width over the axes of all weights.
_VOCAB_WEIGHT = ("model", WEIGHT_AXIS_NAMES)


def trainium_layout(*, grouped_qkv: bool, lm_head: bool) -> list[ConfigModifier.Config]:
    """Returns the modifiers that lay a model out for Trainium.

    Args:
        grouped_qkv: Whether fused projections to grouped queries, keys and values become three. The fused one
            splits query, key and value heads unevenly over "model".
        lm_head: Whether the model has a head of its own.
    """
    modifiers: list[ConfigModifier.Config] = [
        ModuleConfigModifier.default_config().set(
            target_config="model.decoder.transformer", modification=StackedTransformerLayer.default_config()
        )
    ]
    if grouped_qkv:
        modifiers.append(
            ModuleConfigModifier.default_config().set(
                target_config=f"{LAYER_PATH}.self_attention.attention.input_linear.input_linear",
                modification=GroupedQKVLinear.default_config(),
            )
        )
    specs = {
        "model.decoder.emb.token_emb": {
            "param_partition_spec": _VOCAB_WEIGHT,
            "input_partition_spec": (_BATCH, None),
            "output_partition_spec": _WHOLE_SEQ,
            "embedding_partition_spec": ("model", None),
        },
        f"{LAYER_PATH}.self_attention.norm": _NORM,
        f"{LAYER_PATH}.feed_forward.norm": _NORM,
        "model.decoder.output_norm": _NORM,
        f"{LAYER_PATH}.feed_forward.linear2": {"output_partition_spec": _WHOLE_SEQ},
    }
    modifiers.append(PartitionSpecModifier.default_config().set(partition_specs=specs))
    if lm_head:
        head = {"model.decoder.lm_head": {"param_partition_spec": _VOCAB_WEIGHT}}
        modifiers.append(PartitionSpecModifier.default_config().set(partition_specs=head))
    return modifiers
