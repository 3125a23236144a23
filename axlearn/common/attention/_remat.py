"""What transformer layers save for the backward pass, by the names they give to intermediate values."""

import enum
from typing import Optional, Union

from axlearn.common.attention._stack import BaseStackedTransformerLayer, StackedTransformerLayer
from axlearn.common.base_layer import RematSpec
from axlearn.common.config import config_for_function
from axlearn.common.utils import RematPolicy, save_and_offload_only_these_names_regex


class RematRegexSavePatterns(enum.Enum):
    """Regular expressions over the names `ClassName.name` of intermediate values."""

    # Queries, keys and values, after position embeddings and before scaling.
    QKV_PROJ = r".*[kqv]_proj"
    # The outputs of attention.
    O_PROJ = r".*o_proj"
    # The values averaged by attention, before the output projection.
    CONTEXT = r".*context"
    # What goes into the activation of a feed-forward layer: all of it, or the branch without the gate.
    LINEAR1_X = r".*linear1_[01]"
    LINEAR1_0 = r".*linear1_0"
    # The outputs of a feed-forward layer.
    LINEAR2_X = r".*linear2(_[01])?"
    # All products of matrices in attention except for the logits.
    NATIVE_ATTENTION = r".*([qkvo]_proj|context)"
    # All products of matrices in a feed-forward layer.
    FEED_FORWARD = r".*linear1_[01]|.*linear2(_[01])?"


def _save_and_offload_only_these_names_regex(
    *,
    names_which_can_be_saved: Optional[str],
    names_which_can_be_offloaded: Optional[str],
    offload_src: str,
    offload_dst: str,
) -> RematPolicy:
    """The policy that `build_remat_spec` configures, under the name that dumps show.

    See `axlearn.common.utils.save_and_offload_only_these_names_regex`.
    """
    return save_and_offload_only_these_names_regex(
        names_which_can_be_saved=names_which_can_be_saved,
        names_which_can_be_offloaded=names_which_can_be_offloaded,
        offload_src=offload_src,
        offload_dst=offload_dst,
    )


def build_remat_spec(
    stack_cfg: BaseStackedTransformerLayer.Config,
    *,
    save_pattern: Union[str, RematRegexSavePatterns, None] = RematRegexSavePatterns.NATIVE_ATTENTION,
    offload_pattern: Union[str, RematRegexSavePatterns, None] = None,
    offload_dst: str = "pinned_host",
) -> RematSpec:
    """How to rematerialise the layers of a stack.

    Args:
        stack_cfg: The config of the stack; its class tells whether its layers run in a loop.
        save_pattern: Regular expression over the names of what is saved on the device. None: nothing.
        offload_pattern: Regular expression over the names of what is moved to `offload_dst` until the
            backward pass. None: nothing.
        offload_dst: Memory kind that offloaded values go to.

    Returns:
        The spec, for the `remat_spec` of the stack's layers.
    """
    policy = config_for_function(_save_and_offload_only_these_names_regex).set(
        names_which_can_be_saved=_pattern(save_pattern),
        names_which_can_be_offloaded=_pattern(offload_pattern),
        offload_src="device",
        offload_dst=offload_dst,
    )
    # Only outside of a loop can the compiler find the recomputation equal to the first computation, and undo
    # it.
    return RematSpec(prevent_cse=stack_cfg.klass is StackedTransformerLayer, policy=policy)


def _pattern(pattern: Union[str, RematRegexSavePatterns, None]) -> Optional[str]:
    return pattern.value if isinstance(pattern, RematRegexSavePatterns) else pattern
