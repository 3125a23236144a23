"""Variants of multi-head attention."""

from axlearn.common.attention._multihead import MultiheadAttention
from axlearn.common.config import config_class, error_message


class GroupedQueryAttention(MultiheadAttention):
    """Attention in which several query heads share a key and a value head.

    Query head j attends to key head `j // (num_heads / num_kv_heads)`. The number of key heads is that of
    `input_linear`.

    Reference: Ainslie et al., GQA, https://arxiv.org/abs/2305.13245, section 2.2.
    """

    @config_class
    class Config(MultiheadAttention.Config):
        """Configures `GroupedQueryAttention`."""

    def _check_heads(self) -> None:
        num_heads, num_kv_heads = self.config.num_heads, self.num_kv_heads
        if num_heads % num_kv_heads:
            raise ValueError(
                error_message(
                    where=self.path(),
                    what=f"num_kv_heads={num_kv_heads}",
                    expected=f"a divisor of num_heads={num_heads}",
                )
            )
