"""Writes tests/fixtures/hf: tiny models of the Hugging Face families with the logits that transformers computes.

Run with an interpreter that has torch and transformers (made with torch 2.13.0, transformers 5.23.0, CPU, float32):

    HF_HUB_OFFLINE=1 python scripts/make_hf_reference.py

Every folder holds config.json and safetensors as transformers saves them, and reference.npz with `input_ids`
[2, 24] and `logits` [2, 24, 96]. Norms are drawn around 1 and biases around 0, so that nothing can be mixed up
unseen.

The other direction: models of ours, exported to folders of the same kind, whose logits transformers is to compute.

    python -m tests.parity.hf_models EXPORTED
    HF_HUB_OFFLINE=1 python scripts/make_hf_reference.py --exported EXPORTED

writes tests/fixtures/hf_export/<name>.npz: `input_ids`, `logits`, and `sha256`, the sum of the tensors' bytes.
"""

import argparse
import hashlib
import pathlib

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file

FIXTURES = pathlib.Path(__file__).resolve().parents[1] / "tests" / "fixtures"

VOCAB_SIZE, BATCH_SIZE, SEQ_LEN = 96, 2, 24

SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _rope(kind: str = "default", theta: float = 10000.0, **fields: float) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **fields}}


# Lengths of the first training are shorter than the sequences, so that scaled positions matter.
MODELS = {
    # Llama 1: as many key heads as query heads.
    "llama1": ("llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-6}),
    # Llama 2 (70B): grouped heads.
    "llama2": ("llama", {"rms_norm_eps": 1e-5}),
    # Llama 3.2: scaled positions, a tied head.
    "llama3": (
        "llama",
        {
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            **_rope(
                "llama3",
                theta=500.0,
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=16,
            ),
        },
    ),
    "llama-linear": ("llama", _rope("linear", factor=4.0)),
    "llama-yarn": (
        "llama",
        {
            "head_dim": 16,
            # Of 8 frequencies one is kept, three are stretched, the others lie between.
            **_rope(
                "yarn",
                theta=100.0,
                factor=4.0,
                beta_fast=2.0,
                beta_slow=0.2,
                original_max_position_embeddings=16,
            ),
        },
    ),
    "llama-bias": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 12}),
    "qwen2": ("qwen2", {"rms_norm_eps": 1e-6, **_rope(theta=1e6)}),
    "qwen2-sliding": (
        "qwen2",
        {
            "num_hidden_layers": 3,
            "use_sliding_window": True,
            "sliding_window": 7,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3": ("qwen3", {"head_dim": 12, **_rope(theta=1e6)}),
    "qwen3-tied": ("qwen3", {"head_dim": 8, "tie_word_embeddings": True, **_rope(theta=1e6)}),
    "mistral": ("mistral", {"head_dim": 12, "sliding_window": 5, "rms_norm_eps": 1e-5}),
}
# The model that is saved in several files.
SHARDED = "qwen3"


def _draw_weights(model: torch.nn.Module, *, seed: int) -> None:
    """Draws weights such that logits have a standard deviation of about 2, and attention is far from even."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, param in model.named_parameters():
            noise = torch.randn(param.shape, generator=generator)
            if "norm" in name:
                param.copy_(1 + 0.3 * noise)
            elif name.endswith("bias"):
                param.copy_(0.3 * noise)
            elif "embed" in name or "lm_head" in name:
                param.copy_(0.4 * noise)
            else:
                gain = 1.5 if "q_proj" in name or "k_proj" in name else 1.0
                param.copy_(gain * noise / param.shape[1] ** 0.5)


def _logits(model: torch.nn.Module, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    ids = np.random.RandomState(seed).randint(3, VOCAB_SIZE, size=(BATCH_SIZE, SEQ_LEN)).astype(np.int32)
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(ids).long(), use_cache=False).logits
    print(f"  logits: std {logits.std():.2f}, largest {logits.abs().max():.2f}")
    return ids, logits.numpy().astype(np.float32)


def make_fixtures() -> None:
    """Writes tests/fixtures/hf."""
    for seed, (name, (model_type, fields)) in enumerate(MODELS.items()):
        print(name)
        config = transformers.AutoConfig.for_model(model_type, **{**SIZES, **fields})
        model = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation="eager", dtype=torch.float32
        ).eval()
        _draw_weights(model, seed=seed)
        folder = FIXTURES / "hf" / name
        model.save_pretrained(folder, max_shard_size="40KB" if name == SHARDED else "5GB")
        # It would only say how to sample.
        (folder / "generation_config.json").unlink(missing_ok=True)
        for path in folder.glob("*.safetensors"):
            path.chmod(0o644)
        # The numbers are those of the saved files.
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="eager", dtype=torch.float32
        ).eval()
        ids, logits = _logits(loaded, seed=seed)
        np.savez(folder / "reference.npz", input_ids=ids, logits=logits)


def check_exported(root: pathlib.Path) -> None:
    """Loads folders that we exported, and writes the logits of transformers to tests/fixtures/hf_export."""
    (FIXTURES / "hf_export").mkdir(exist_ok=True)
    for seed, folder in enumerate(sorted(path for path in root.iterdir() if path.is_dir())):
        print(folder.name)
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
        )
        print(f"  {type(model).__name__}")
        trouble = {key: value for key, value in info.items() if value}
        if trouble:
            raise SystemExit(f"{folder}: {trouble}")
        tensors = load_file(folder / "model.safetensors")
        digest = hashlib.sha256()
        for name in sorted(tensors):
            digest.update(name.encode() + tensors[name].tobytes())
        ids, logits = _logits(model.eval(), seed=seed)
        np.savez(
            FIXTURES / "hf_export" / f"{folder.name}.npz",
            input_ids=ids,
            logits=logits,
            sha256=np.array(digest.hexdigest()),
        )


def main() -> None:
    """Runs what the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--exported", type=pathlib.Path, help="A folder of folders that we exported.")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    if args.exported is None:
        make_fixtures()
    else:
        check_exported(args.exported)


if __name__ == "__main__":
    main()
