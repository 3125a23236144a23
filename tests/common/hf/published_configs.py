"""What the config.json of published models say, with the number of parameters that their model cards state."""

from typing import Any

_LLAMA3_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def _config(model_type: str, *sizes: int, **fields: Any) -> dict[str, Any]:
    names = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
        *("num_attention_heads", "num_key_value_heads"),
    )
    return {
        "model_type": model_type,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6 if model_type.startswith("qwen") else 1e-5,
        **dict(zip(names, sizes, strict=True)),
        **fields,
    }


_NO_WINDOW = {"use_sliding_window": False, "sliding_window": None}

PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "Llama-2-7b": (
        _config("llama", 32000, 4096, 11008, 32, 32, 32, rope_scaling=None, pretraining_tp=1),
        6_738_415_616,
    ),
    "Llama-3.1-8B": (
        _config("llama", 128256, 4096, 14336, 32, 32, 8, rope_theta=500000.0, rope_scaling=_LLAMA3_ROPE),
        8_030_261_248,
    ),
    "Llama-3.2-1B": (
        _config(
            *("llama", 128256, 2048, 8192, 16, 32, 8),
            head_dim=64,
            rope_theta=500000.0,
            rope_scaling=_LLAMA3_ROPE | {"factor": 32.0},
            tie_word_embeddings=True,
        ),
        1_235_814_400,
    ),
    "Qwen2.5-7B": (
        _config(
            *("qwen2", 152064, 3584, 18944, 28, 28, 4),
            rope_theta=1000000.0,
            use_sliding_window=False,
            sliding_window=131072,
            max_window_layers=28,
            use_mrope=False,
        ),
        7_615_616_512,
    ),
    "Qwen2.5-0.5B": (
        _config(
            "qwen2", 151936, 896, 4864, 24, 14, 2, rope_theta=1e6, tie_word_embeddings=True, **_NO_WINDOW
        ),
        494_032_768,
    ),
    "Qwen3-8B": (
        _config("qwen3", 151936, 4096, 12288, 36, 32, 8, rope_theta=1000000, head_dim=128, **_NO_WINDOW),
        8_190_735_360,
    ),
    "Qwen3-0.6B": (
        _config(
            *("qwen3", 151936, 1024, 3072, 28, 16, 8),
            rope_theta=1000000,
            head_dim=128,
            tie_word_embeddings=True,
            **_NO_WINDOW,
        ),
        596_049_920,
    ),
    "Mistral-7B-v0.1": (
        _config("mistral", 32000, 4096, 14336, 32, 32, 8, sliding_window=4096),
        7_241_732_096,
    ),
    "Mistral-Nemo-2407": (
        _config("mistral", 131072, 5120, 14336, 40, 32, 8, head_dim=128, sliding_window=None, rope_theta=1e6),
        12_247_782_400,
    ),
}
