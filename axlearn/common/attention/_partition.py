"""How the weights and activations of transformer layers lie on the mesh."""

from collections.abc import Sequence
from typing import Any, Union

from axlearn.common.attention._feed_forward import TransformerFeedForwardLayer
from axlearn.common.attention._self_attention import TransformerAttentionLayer
from axlearn.common.config import ConfigBase, error_message

# A mesh axis, several, or None for "not split".
MeshAxes = Union[str, Sequence[str], None]


def set_attention_partition_specs(
    cfg: TransformerAttentionLayer.Config,
    *,
    batch_axis_names: MeshAxes = ("data", "fsdp"),
    fsdp_axis_names: MeshAxes = "fsdp",
    tp_axis_names: MeshAxes = "model",
    seq_axis_names: MeshAxes = "seq",
    set_attn_activation_specs: bool = False,
) -> None:
    """Splits the weights of an attention block over the model dim (fsdp) and the heads (tp).

    Args:
        cfg: The config of the block, changed in place.
        batch_axis_names: Axes that split the batch.
        fsdp_axis_names: Axes that split the model dim of weights.
        tp_axis_names: Axes that split heads.
        seq_axis_names: Axes that split sequences.
        set_attn_activation_specs: Whether to constrain the outputs of the projections too.
    """
    weight_spec = (fsdp_axis_names, tp_axis_names, None)
    attention: Any = cfg.attention
    input_linear = _innermost_input_linear(attention.input_linear)
    input_linear.layer.param_partition_spec = weight_spec
    attention.output_linear.param_partition_spec = weight_spec
    if set_attn_activation_specs:
        input_linear.layer.output_partition_spec = (batch_axis_names, seq_axis_names, tp_axis_names, None)
        attention.output_linear.output_partition_spec = (batch_axis_names, seq_axis_names, tp_axis_names)


def _innermost_input_linear(cfg: Any) -> Any:
    """The projection inside of wrappers such as `RoFormerQKVLinear`."""
    while "input_linear" in cfg:
        cfg = cfg.input_linear
    return cfg


def set_feed_forward_partition_specs(
    cfg: TransformerFeedForwardLayer.Config,
    *,
    batch_axis_names: MeshAxes = ("data", "fsdp"),
    fsdp_axis_names: MeshAxes = "fsdp",
    tp_axis_names: MeshAxes = "model",
    seq_axis_names: MeshAxes = "seq",
) -> None:
    """Splits the weights of a feed-forward block over model dim (fsdp) and hidden dim (tp); also activations.

    Args:
        cfg: The config of the block, changed in place.
        batch_axis_names: Axes that split the batch.
        fsdp_axis_names: Axes that split the model dim of weights.
        tp_axis_names: Axes that split the hidden dim, and the model dim of outputs.
        seq_axis_names: Axes that split sequences.
    """
    activation_spec = (batch_axis_names, seq_axis_names, tp_axis_names)
    linear1: Any = cfg.linear1
    linear2: Any = cfg.linear2
    linear1.param_partition_spec = (fsdp_axis_names, tp_axis_names)
    linear2.param_partition_spec = (tp_axis_names, fsdp_axis_names)
    linear1.output_partition_spec = activation_spec
    linear2.output_partition_spec = activation_spec


def set_double_shard_weights_config(
    cfg: Union[ConfigBase, Sequence[ConfigBase]],
    *,
    batch_axis_names: MeshAxes = ("data", "fsdp"),
    fsdp_axis_names: MeshAxes = "fsdp",
    tp_axis_names: MeshAxes = "model",
    seq_axis_names: MeshAxes = "seq",
    set_attn_activation_specs: bool = False,
) -> None:
    """Splits every weight matrix of transformer layers over two groups of mesh axes.

    Args:
        cfg: The config of a `TransformerLayer` or `ParallelTransformerLayer`, or of several, changed in
            place. Feed-forward blocks of other kinds than `TransformerFeedForwardLayer` stay as they are.
        batch_axis_names: Axes that split the batch.
        fsdp_axis_names: Axes that split the model dim of weights.
        tp_axis_names: Axes that split heads and hidden dims.
        seq_axis_names: Axes that split sequences.
        set_attn_activation_specs: See `set_attention_partition_specs`.

    Raises:
        TypeError: If `cfg` is something else.

    Reference:
        Xu et al., GSPMD, https://arxiv.org/abs/2105.04663, section 4.1.
    """
    for layer_cfg in cfg if isinstance(cfg, list | tuple) else [cfg]:
        if not (
            isinstance(layer_cfg, ConfigBase)
            and "self_attention" in layer_cfg
            and "feed_forward" in layer_cfg
        ):
            raise TypeError(
                error_message(
                    what=f"cannot shard the weights of a {type(layer_cfg).__name__}",
                    expected="a TransformerLayer.Config, or a sequence of them",
                    advice="pass the config of the layer in the stack, such as stack_cfg.layer",
                )
            )
        axes: dict[str, MeshAxes] = {
            "batch_axis_names": batch_axis_names,
            "fsdp_axis_names": fsdp_axis_names,
            "tp_axis_names": tp_axis_names,
            "seq_axis_names": seq_axis_names,
        }
        blocks: Any = layer_cfg
        for name in ("self_attention", "cross_attention"):
            if name in layer_cfg and getattr(blocks, name) is not None:
                set_attention_partition_specs(
                    getattr(blocks, name), **axes, set_attn_activation_specs=set_attn_activation_specs
                )
        feed_forward = blocks.feed_forward
        if isinstance(feed_forward, TransformerFeedForwardLayer.Config):
            set_feed_forward_partition_specs(feed_forward, **axes)
