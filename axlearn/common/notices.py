"""Short texts that one process of a run puts up for all others to see, who look when they like; nobody waits.

For meetings, at which everybody waits for everybody, see `processes`. Like there, texts are in the memory of process 0,
and a tag serves once. With one process there is nobody to look.
"""

from typing import Optional

from axlearn.common.jax_compat import coordination

_PREFIX = "axlearn/notices"


def post_once(tag: str, text: str) -> str:
    """Puts up a text, unless somebody was faster.

    Args:
        tag: Which notice it is.
        text: What it says.

    Returns:
        What stands there now: `text`, or that of whoever was faster.

    Raises:
        RuntimeError: If process 0 does not answer.
    """
    peers = coordination()
    if peers is None:
        return text
    try:
        peers.client.key_value_set_bytes(f"{_PREFIX}/{tag}", text.encode("utf-8"))
    except RuntimeError as e:
        if "ALREADY_EXISTS" not in str(e):
            raise
        return posted(tag) or text
    return text


def posted(tag: str) -> Optional[str]:
    """Returns what `post_once` put up in any process, None as long as there is nothing; raises as it does."""
    peers = coordination()
    if peers is None:
        return None
    try:
        text: str = peers.client.key_value_try_get_bytes(f"{_PREFIX}/{tag}").decode("utf-8")
    except RuntimeError as e:
        if "NOT_FOUND" not in str(e):
            raise
        return None
    return text


def count_up(tag: str, amount: int = 1) -> int:
    """Adds to a number that all processes share, 0 at first, and returns it; raises as `post_once` does."""
    peers = coordination()
    if peers is None:
        return amount
    return int(peers.client.key_value_increment(f"{_PREFIX}/count/{tag}", amount))
