"""What the supported families of decoders differ in."""

import dataclasses
from typing import Optional, Union


@dataclasses.dataclass(frozen=True)
class LinearRope:
    """Positions divided by a factor.

    Reference: Chen et al., Position Interpolation, https://arxiv.org/abs/2306.15595, section 2.3.
    """

    # Divides every frequency; at least 1.
    factor: float


@dataclasses.dataclass(frozen=True)
class Llama3Rope:
    """Long wavelengths stretched, short ones kept, as Llama 3.1 does."""

    # Divides the frequencies of the longest wavelengths.
    factor: float
    # Wavelengths beyond `original_max_seq_length / low_freq_factor` are stretched in full, those below
    # `original_max_seq_length / high_freq_factor` not at all.
    low_freq_factor: float
    high_freq_factor: float
    # Positions that the model was first trained with.
    original_max_seq_length: int


@dataclasses.dataclass(frozen=True)
class YarnRope:
    """Frequencies stretched by how often they turn within the original length, and logits sharpened.

    Reference: Peng et al., YaRN, https://arxiv.org/abs/2309.00071, section 3.
    """

    # Divides the frequencies that turn less than `beta_slow` times within `original_max_seq_length`.
    factor: float
    # Frequencies that turn more often than this are kept.
    beta_fast: float
    beta_slow: float
    # Positions that the model was first trained with.
    original_max_seq_length: int
    # Factor of sines and cosines. None: `0.1 ln(factor) + 1`, the paper's equation 22.
    attention_factor: Optional[float] = None


RopeScaling = Union[LinearRope, Llama3Rope, YarnRope]


@dataclasses.dataclass(frozen=True)
class RopeFacts:
    """Rotary positions."""

    # Base of the wavelengths.
    theta: float
    # How frequencies are changed for texts longer than those of the first training. None: not.
    scaling: Optional[RopeScaling] = None


@dataclasses.dataclass(frozen=True)
class DecoderFacts:
    """All that decides the numbers of a decoder of these families, apart from its weights.

    Common to all: token embedding, pre-norm blocks with RMSNorm, grouped causal attention with rotary positions,
    a feed-forward gated by SiLU, a last RMSNorm, a head.
    """

    vocab_size: int
    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    per_head_dim: int
    feed_forward_dim: int
    # Of every norm.
    norm_eps: float
    rope: RopeFacts
    # Whether the head is the transposed token embedding.
    tied_head: bool
    # Biases of the projections to queries, keys and values; from the heads; and of the feed-forward.
    qkv_bias: bool
    output_bias: bool
    feed_forward_bias: bool
    # Whether queries and keys are normed per head, before they are rotated.
    qk_norm: bool
    # For each layer the number of positions that a query sees, itself counted. None: all that came before.
    windows: tuple[Optional[int], ...]
