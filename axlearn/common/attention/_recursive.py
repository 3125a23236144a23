"""Finding attention layers in a tree of configs."""

from collections.abc import Callable
from typing import Any

from axlearn.common.attention._multihead import MultiheadAttention
from axlearn.common.config import ConfigBase


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
