"""The families of decoders, and which of them can express a given decoder."""

import enum
from typing import Optional

from axlearn.common.config import error_message
from axlearn.common.hf._facts import DecoderFacts


class Family(enum.Enum):
    """A family, by the `model_type` of its config.json."""

    LLAMA = "llama"
    QWEN2 = "qwen2"
    QWEN3 = "qwen3"
    MISTRAL = "mistral"

    @property
    def architecture(self) -> str:
        """The class in transformers that has a head for the next token."""
        return {
            Family.LLAMA: "LlamaForCausalLM",
            Family.QWEN2: "Qwen2ForCausalLM",
            Family.QWEN3: "Qwen3ForCausalLM",
            Family.MISTRAL: "MistralForCausalLM",
        }[self]


def obstacles(family: Family, facts: DecoderFacts) -> list[str]:
    """Says what of a decoder a family has no words for.

    Args:
        family: The family.
        facts: The decoder.

    Returns:
        Fields of our config with their values; empty where the family can express the decoder.
    """
    found = []
    if facts.qk_norm != (family is Family.QWEN3):
        found.append(f"{'a' if facts.qk_norm else 'no'} norm in input_linear.query_scale")
    biases = (facts.qkv_bias, facts.output_bias)
    if biases not in _LEGAL_BIASES[family]:
        found.append(f"input_linear.layer.bias={biases[0]} with output_linear.bias={biases[1]}")
    if facts.feed_forward_bias and family is not Family.LLAMA:
        found.append("feed_forward.linear1.bias=True")
    return found + _window_obstacles(family, facts.windows)


# Biases of the projections to queries, keys and values, and of the one from the heads.
_LEGAL_BIASES = {
    Family.LLAMA: [(False, False), (True, True)],
    Family.QWEN2: [(True, False)],
    Family.QWEN3: [(False, False), (True, True)],
    Family.MISTRAL: [(False, False)],
}


def _window_obstacles(family: Family, windows: tuple[Optional[int], ...]) -> list[str]:
    sizes = sorted({window for window in windows if window is not None})
    # In terms of our config, which does not count the query's own position.
    text = "sliding_window_size=" + " and ".join(str(size - 1) for size in sizes)
    if sizes and family is Family.LLAMA:
        return [text]
    if len(sizes) > 1:
        return [f"{text} in one model"]
    if sizes and family is Family.MISTRAL and None in windows:
        return [f"{text} in some layers only"]
    return []


def family_for(facts: DecoderFacts, *, family: Optional[Family] = None) -> Family:
    """Chooses the family in which a decoder is written.

    Args:
        facts: The decoder.
        family: The only one to consider. None: the first that can express it of Llama, Qwen3, Qwen2, Mistral.

    Returns:
        The family.

    Raises:
        ValueError: No family that is considered can express the decoder; the message says what of it is too
            much for each.
    """
    candidates = [Family.LLAMA, Family.QWEN3, Family.QWEN2, Family.MISTRAL] if family is None else [family]
    found = {candidate: obstacles(candidate, facts) for candidate in candidates}
    for candidate, reasons in found.items():
        if not reasons:
            return candidate
    raise ValueError(
        error_message(
            where="model",
            what="no Hugging Face family can express it: "
            + ", ".join(f"not {candidate.value} ({'; '.join(why)})" for candidate, why in found.items()),
            expected="a decoder of the families " + ", ".join(x.value for x in Family),
        )
    )
