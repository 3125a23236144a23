"""Finding attention layers in a tree of configs, and telling them what they have in common."""

from collections.abc import Callable
from typing import Any, Optional

from axlearn.common.attention._multihead import MultiheadAttention
from axlearn.common.config import ConfigBase, error_message


def for_each_self_attention(cfg: ConfigBase, fn: Callable[[MultiheadAttention.Config], Any]) -> None:
    """Calls `fn` on the config of every attention layer at or below `cfg`, except in `cross_attention`.

    What attends to another sequence has no use for positions in its own.

    Args:
        cfg: A config; also in dicts and lists below it, attention layers are found.
        fn: The function; it may change what it is given.
    """

    def enter_fn(path: str, value: Any, default_items: Any) -> Any:
        if path.rpartition(".")[2] == "cross_attention":
            return []
        if isinstance(value, MultiheadAttention.Config):
            fn(value)
        return default_items

    cfg.visit(visit_fn=lambda path, value: None, enter_fn=enter_fn)


def set_num_seq_chunks(cfg: ConfigBase, num_seq_chunks: Optional[int], *, where: str) -> None:
    """Tells every self-attention layer at or below `cfg` in which order the positions of a row lie.

    Args:
        cfg: A config with attention layers below it, such as that of a stack; changed in place.
        num_seq_chunks: See `MultiheadAttention.Config`.
        where: The path of who says so, for the message.

    Raises:
        ValueError: If a layer says otherwise itself.
    """

    def set_order(attention: MultiheadAttention.Config) -> None:
        if attention.num_seq_chunks not in (None, num_seq_chunks):
            raise ValueError(
                error_message(
                    where=f"{where}.num_seq_chunks",
                    what=f"{num_seq_chunks}, and an attention layer has num_seq_chunks={attention.num_seq_chunks}",
                    expected="one order for all layers, set here only",
                )
            )
        attention.num_seq_chunks = num_seq_chunks

    for_each_self_attention(cfg, set_order)
