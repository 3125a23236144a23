"""Variants of multi-head attention."""

import math
from typing import Optional

import jax
from jaxtyping import Array

from axlearn.common.attention._logits import biased_logits
from axlearn.common.attention._multihead import MultiheadAttention
from axlearn.common.attention_bias import BaseAttentionBias
from axlearn.common.base_layer import BaseLayer
from axlearn.common.config import REQUIRED, Required, config_class, error_message


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


class SigmoidAttention(GroupedQueryAttention):
    """Attention whose weights are sigmoids: each key is weighed by itself, not against the others.

    The weight of a key is `sigmoid(logit - log(seq_len))`: at logits around 0 the weights of `seq_len` keys add
    up to about 1, as those of a softmax do.

    Reference: Ramapuram et al., Theory, Analysis, and Best Practices for Sigmoid Self-Attention,
    https://arxiv.org/abs/2409.04431 (the bias b = -log n).
    """

    @config_class
    class Config(GroupedQueryAttention.Config):
        """Configures `SigmoidAttention`."""

        # Number of positions that the model is trained with, at least 1.
        seq_len: Required[int] = REQUIRED

    def __init__(self, cfg: Config, *, parent: Optional[BaseLayer]):
        super().__init__(cfg, parent=parent)
        if cfg.seq_len < 1:
            raise ValueError(
                error_message(where=self.path(), what=f"seq_len={cfg.seq_len}", expected="at least 1")
            )
        if cfg.logit_sink:
            raise ValueError(
                error_message(
                    where=self.path(),
                    what="logit_sink=True",
                    expected="none: weights that do not compete need no sink",
                )
            )

    def _compute_probs(self, logits: Array, bias: BaseAttentionBias) -> Array:
        cfg: SigmoidAttention.Config = self.config
        logits = biased_logits(logits, bias, logit_cap=cfg.atten_logit_cap)
        return jax.nn.sigmoid(logits - math.log(cfg.seq_len))
