"""Model FLOPs per token by the two usual conventions, and the peak rate of known accelerators.

A quoted model FLOPs utilization means little without its convention: at long context the two below differ by
up to a factor of two. Rematerialized work counts in neither.
"""

from typing import NamedTuple


class FlopsPerToken(NamedTuple):
    """Floating-point operations of one training step, forward and backward, per token of the batch.

    Attributes:
        full: Every query attends to every key, as if there were no mask.
        causal: Each query attends to half of the keys.
    """

    full: float
    causal: float


def transformer_flops_per_token(
    *, num_matmul_params: int, total_attention_dim: int, seq_len: int
) -> FlopsPerToken:
    """Counts a decoder's FLOPs per token: `6 N + 12 L H Q T`; the causal convention halves the last term.

    Args:
        num_matmul_params: N: the parameters that multiply every token: those of all linear maps and of the
            output head, also where it shares its weight with the embedding. An embedding table alone does not
            count.
        total_attention_dim: L H Q: query heads times the dimension of one, summed over all attention layers.
        seq_len: T: tokens per row of the batch.

    Returns:
        The count by both conventions.

    Reference:
        Chowdhery et al., PaLM, 2022, appendix B (https://arxiv.org/abs/2204.02311).
    """
    # Per parameter a multiplication and an addition, once forward and twice backward.
    linear = 6 * num_matmul_params
    # Scores and weighted values: 2 * 2 * H * Q * T forward, twice that backward.
    attention = 12 * total_attention_dim * seq_len
    return FlopsPerToken(full=float(linear + attention), causal=float(linear + attention / 2))


class _Peak(NamedTuple):
    """Dense peak rates of one jax device in FLOPs per second; None where the vendor states none."""

    bfloat16: float
    float32: float | None = None


# Matched against the device kind in lower case, in this order; the first whose words are all in it wins.
# Dense rates, without structured sparsity: half of what a data sheet states with it. "float32" is
# TensorFloat-32 on NVIDIA, which is what jax's default precision uses there.
_PEAKS: tuple[tuple[tuple[str, ...], _Peak | None], ...] = (
    # https://docs.cloud.google.com/tpu/docs/v3 , .../v4 , .../v5e , .../v5p , .../v6e , .../tpu7x (2025) state
    # the rate of a chip. A chip is one device to jax, except for v3 and 7x, where it is two.
    (("tpu7x",), _Peak(2307e12 / 2)),
    (("tpu v6",), _Peak(918e12)),
    (("tpu v5", "lite"), _Peak(197e12)),
    (("tpu v5e",), _Peak(197e12)),
    (("tpu v5",), _Peak(459e12)),
    # Not v4 lite, which is another chip.
    (("tpu v4", "lite"), None),
    (("tpu v4",), _Peak(275e12)),
    (("tpu v3",), _Peak(123e12 / 2)),
    # A slice of a GPU has a fraction of its rate.
    ((" mig ",), None),
    # NVIDIA's data sheets: "GB200 NVL72", "HGX B200", "H200" (SXM, also of GH200, and NVL), "H100" (PCIe, NVL),
    # "A100", "L40S"; for the H100 SXM the H100 architecture white paper, which states the dense rate in full.
    (("gb200",), _Peak(2500e12, 1250e12)),
    (("b200",), _Peak(2250e12, 1125e12)),
    (("h200", "nvl"), _Peak(835.5e12, 417.5e12)),
    (("h200",), _Peak(989.4e12, 494.7e12)),
    (("h100", "pcie"), _Peak(756e12, 378e12)),
    (("h100", "nvl"), _Peak(835.5e12, 417.5e12)),
    (("h100",), _Peak(989.4e12, 494.7e12)),
    (("a100",), _Peak(312e12, 156e12)),
    (("l40s",), _Peak(362e12, 183e12)),
)


def peak_flops(device_kind: str, dtype: str = "bfloat16") -> float | None:
    """The vendor's dense peak rate of one device.

    Args:
        device_kind: As in `jax.Device.device_kind`, such as "NVIDIA H100 80GB HBM3" or "TPU v5 lite".
        dtype: The type that matrices are multiplied in, by its name: "bfloat16", "float16" or "float32".

    Returns:
        FLOPs per second of one jax device, or None where the device or its rate in this type is not known:
        another device's rate would only look like an answer.
    """
    kind = device_kind.lower()
    for words, peak in _PEAKS:
        if all(word in kind for word in words):
            if peak is None:
                return None
            if dtype in ("bfloat16", "float16"):
                return peak.bfloat16
            return peak.float32 if dtype == "float32" else None
    return None
