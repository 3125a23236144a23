"""Whether the tensors of a Hugging Face model are those that its config promises."""

import re
from collections.abc import Callable, Mapping, Sequence

from axlearn.common.config import error_message, join_messages, nearest_names
from axlearn.common.hf._tensor_rule import TensorRule

# How many tensors a message names of each kind of trouble.
_MAX_NAMED = 8
# The frequencies of rotary positions, which old versions of transformers saved; they follow from config.json.
_INV_FREQ = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def check_tensor_names(rules: Sequence[TensorRule], available: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """Checks that a model's files hold the tensors that its rules want, and no others.

    Args:
        rules: What `tensor_rules` returned.
        available: The shape of every tensor in the files, by name.

    Returns:
        The tensors that are there without need, each with the reason why it may be left out: a copy of the token
        embedding as the head of a model whose head is tied to it, and the frequencies of rotary positions.

    Raises:
        ValueError: Tensors are missing, unknown or have another shape; the message names them.
    """
    wanted = {name: shape for rule in rules for name, shape in rule.hf_shapes.items()}
    ignored = {name: _why_ignored(name, wanted, available) for name in available if name not in wanted}
    unknown = [name for name, reason in ignored.items() if not reason]
    missing = [name for name in wanted if name not in available]
    wrong = [name for name in wanted if name in available and tuple(available[name]) != wanted[name]]
    messages = [
        *_messages(
            missing,
            lambda name: error_message(
                where=name,
                what="no such tensor in the files",
                expected=f"one of shape {wanted[name]}",
                nearest=nearest_names(name, unknown),
            ),
        ),
        *_messages(
            unknown,
            lambda name: error_message(
                where=name,
                what=f"a tensor of shape {tuple(available[name])} that this model does not have",
                nearest=nearest_names(name, missing),
            ),
        ),
        *_messages(
            wrong,
            lambda name: error_message(
                where=name,
                what=f"shape {tuple(available[name])}",
                expected=f"{wanted[name]}, from config.json",
            ),
        ),
    ]
    if messages:
        heading = (
            "The tensors are not those that config.json promises: "
            f"{len(missing)} missing, {len(unknown)} unknown, {len(wrong)} of another shape."
        )
        raise ValueError(join_messages(messages, heading=heading))
    return ignored


def _messages(names: Sequence[str], write: Callable[[str], str]) -> list[str]:
    """One message for each name, up to a number of them."""
    more = len(names) - _MAX_NAMED
    messages = [write(name) for name in names[:_MAX_NAMED]]
    return [*messages, f"... and {more} more like these."] if more > 0 else messages


def _why_ignored(
    name: str, wanted: Mapping[str, Sequence[int]], available: Mapping[str, Sequence[int]]
) -> str:
    """Returns why a tensor that no rule wants may be left out; empty where it may not."""
    if _INV_FREQ.fullmatch(name):
        return "the frequencies of rotary positions follow from config.json"
    # `wanted` has a head unless it is tied.
    if name == _HEAD and tuple(available[name]) == tuple(wanted[_EMBEDDING]):
        return "the head is tied to the token embedding"
    return ""
