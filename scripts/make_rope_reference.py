"""Writes tests/fixtures/rope_reference.json: rotary sines and cosines as transformers computes them.

Run with an interpreter that has torch and transformers (made with torch 2.13.0, transformers 5.23.0):

    HF_HUB_OFFLINE=1 python scripts/make_rope_reference.py

Each case holds the config of a Llama model, the positions, and for each position the sines and cosines of the pairs,
one of each pair (transformers repeats them for the second half of a head).
"""

import json
import pathlib

import torch
import transformers
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

OUTPUT = pathlib.Path(__file__).resolve().parents[1] / "tests" / "fixtures" / "rope_reference.json"

POSITIONS = [0, 1, 17, 300, 5000]

# Sizes of a head with its `rope_parameters`.
CASES = {
    "default": (8, {"rope_type": "default", "rope_theta": 10000.0}),
    "default-theta": (16, {"rope_type": "default", "rope_theta": 500000.0}),
    "linear": (8, {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}),
    "llama3": (
        32,
        {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "llama3-short": (
        16,
        {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 32.0,
            "low_freq_factor": 2.0,
            "high_freq_factor": 16.0,
            "original_max_position_embeddings": 512,
        },
    ),
    "yarn": (
        32,
        {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 4096,
        },
    ),
    # The ramp's ends are pairs 3.93 and 8.44: rounding to the nearest would give another one at both.
    "yarn-rounding": (
        24,
        {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "original_max_position_embeddings": 4096,
        },
    ),
    "yarn-betas": (
        16,
        {
            "rope_type": "yarn",
            "rope_theta": 1000000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 1024,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
        },
    ),
    # The whole ramp lies outside of the pairs, and the factor of sines and cosines is given.
    "yarn-short": (
        8,
        {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 2.0,
            "original_max_position_embeddings": 64,
            "attention_factor": 1.5,
        },
    ),
}


def main() -> None:
    cases = {}
    for name, (head_dim, rope_parameters) in CASES.items():
        config = LlamaConfig(
            hidden_size=2 * head_dim,
            num_attention_heads=2,
            head_dim=head_dim,
            max_position_embeddings=65536,
            rope_parameters=rope_parameters,
        )
        rotary = LlamaRotaryEmbedding(config)
        cos, sin = rotary(torch.zeros([1, len(POSITIONS), head_dim]), torch.tensor([POSITIONS]))
        half = head_dim // 2
        cases[name] = {
            "head_dim": head_dim,
            "rope_parameters": rope_parameters,
            "inv_freq": rotary.inv_freq.tolist(),
            "sin": sin[0, :, :half].tolist(),
            "cos": cos[0, :, :half].tolist(),
        }
    content = {
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "positions": POSITIONS,
        "cases": cases,
    }
    OUTPUT.write_text(_dumps(content) + "\n", encoding="utf-8")
    print(f"wrote {len(cases)} cases to {OUTPUT}")


def _dumps(content: dict) -> str:
    """JSON with one line for each case and, in it, nine digits: enough to tell float32 numbers apart."""
    rounded = json.loads(json.dumps(content), parse_float=lambda text: float(f"{float(text):.9g}"))
    lines = ",\n".join(
        f"{json.dumps(name)}: {json.dumps(case)}" for name, case in rounded.pop("cases").items()
    )
    return json.dumps(rounded)[:-1] + ', "cases": {\n' + lines + "\n}}"


if __name__ == "__main__":
    main()
