"""Flash attention as recipes use it: how its operands lie on the mesh."""

from jax.sharding import PartitionSpec

from axlearn.common.flash_attention.layer import FlashAttention
from axlearn.experiments.text.gpt.common._mesh import BATCH_AXIS_NAMES


def flash_attention_config() -> FlashAttention.Config:
    """Returns attention by a fused kernel.

    Inside of the kernel each device has whole sequences and some of the heads: where sequences are divided over
    "seq", heads are too while attention runs. Outside of it activations lie as everywhere in the model.
    """
    heads_spec = PartitionSpec(BATCH_AXIS_NAMES, None, ("seq", "model"), None)
    return FlashAttention.default_config().set(
        causal=True,
        mha_dim_to_partition_spec={
            "btnh": heads_spec,
            "bsnh": heads_spec,
            "bnts": PartitionSpec(BATCH_AXIS_NAMES, None, None, None),
        },
        output_dim_to_partition_spec={
            "btnh": PartitionSpec(BATCH_AXIS_NAMES, "seq", "model", None),
            "bnts": PartitionSpec(BATCH_AXIS_NAMES, "model", "seq", None),
        },
    )
