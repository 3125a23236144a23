"""The half of `llama_gpu_benchmark.py` that is Hugging Face's Llama under `torch.compile` with fused AdamW."""

import contextlib
import pathlib
import time
from typing import Any

import torch
from llama_gpu_benchmark import Result, Setting, median, token_ids
from transformers import LlamaConfig, LlamaForCausalLM


def run(setting: Setting, *, weights: str, profile_dir: str | None) -> Result:
    """Trains for the steps of a setting, on random ids.

    Args:
        setting: What to train, and for how long.
        weights: "float32", computed with in bfloat16 by autocast, as ours are; or "bfloat16" throughout, optimizer too.
        profile_dir: Where to write a trace of a few more steps; None: nowhere.
    """
    device = torch.device("cpu" if setting.platform == "cpu" else "cuda")
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    model = LlamaForCausalLM(_config(setting)).to(device).train()
    if weights == "bfloat16":
        model = model.to(torch.bfloat16)
    if setting.remat:
        model.gradient_checkpointing_enable()
    num_params = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    autocast: Any = contextlib.nullcontext()
    if weights == "float32":
        autocast = torch.autocast(device.type, dtype=torch.bfloat16)
    forward = model if setting.no_compile else torch.compile(model)
    ids = torch.from_numpy(token_ids(setting)).to(device).long()

    def step() -> torch.Tensor:
        with autocast:
            loss = forward(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    start = time.perf_counter()
    first_loss = float(step())
    compile_seconds = time.perf_counter() - start
    for _ in range(setting.warm_up):
        step()
    wait()
    seconds = []
    for _ in range(setting.steps):
        start = time.perf_counter()
        loss = step()
        wait()
        seconds.append(time.perf_counter() - start)
    if profile_dir is not None:
        _profile(step, wait, folder=pathlib.Path(profile_dir), setting=setting)
    return Result(
        name=f"torch, weights in {weights}",
        step_seconds=median(seconds),
        first_step_seconds=compile_seconds,
        peak_bytes=torch.cuda.max_memory_allocated() if device.type == "cuda" else 0,
        first_loss=first_loss,
        last_loss=float(loss),
        num_params=num_params,
        device=torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        versions=f"torch {torch.__version__}",
    )


def _config(setting: Setting) -> LlamaConfig:
    sizes = setting.sizes
    return LlamaConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.dim,
        intermediate_size=sizes.ffn_dim,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        num_key_value_heads=sizes.num_kv_heads,
        max_position_embeddings=setting.seq_len,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        tie_word_embeddings=True,
        use_cache=False,
        attn_implementation="sdpa",
    )


def _profile(step: Any, wait: Any, *, folder: pathlib.Path, setting: Setting) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with torch.profiler.profile() as profiler:
        for _ in range(setting.profile_steps):
            step()
        wait()
    profiler.export_chrome_trace(str(folder / "torch.json"))
