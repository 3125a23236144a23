"""A 1B fuji in bfloat16 on one GPU: ours against Hugging Face's Llama under `torch.compile` with fused AdamW.

Both train on the same random ids, in the same shapes (fuji-1B-v3-flash: those of Llama-3.2-1B, with a vocabulary of
131072), with float32 weights that are computed with in bfloat16, AdamW behind a clip of the global gradient norm, and
nothing recomputed unless --remat. Torch runs once more with weights and moments in bfloat16, which ours does not do:
what that saves is to be seen beside. Each runs in a process of its own, in turns; a row is the median over the turns of
the median step behind a warm-up. Our run needs jax, optax, absl and jaxtyping, torch's needs torch and transformers:
one that cannot run says so in its row.

    python benchmarks/llama_gpu_benchmark.py [--batch 8] [--seq_len 4096] [--turns 3] [--profile FOLDER]
    python benchmarks/llama_gpu_benchmark.py --toy      # a model of a few thousand weights, on a CPU: does it run?

`--profile` traces a few steps of each and prints where their time goes, by kind of kernel. Results are kept in
`llama_gpu_benchmark.md`.
"""

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any, Optional

import numpy as np

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_RECIPE = "fuji-1B-v3-flash"
_HALVES = ("ours", "torch-float32", "torch-bfloat16")
_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a model measures."""

    dim: int = 2048
    num_layers: int = 16
    num_heads: int = 32
    num_kv_heads: int = 8
    ffn_dim: int = 8192
    vocab_size: int = 131072


_TOY = Sizes(dim=64, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=128, vocab_size=512)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is run, the same for all.

    Attributes:
        sizes: Of the model.
        batch_size: Rows.
        seq_len: Tokens a row.
        warm_up: Steps that are not timed, after the first, which compiles.
        steps: Steps that are timed, each by itself.
        profile_steps: Steps in a trace.
        remat: Whether activations are recomputed: ours by the recipe's policy, torch's by gradient checkpointing.
        scan_chunk: Ours alone: positions per chunk of the loss; None: all at once.
        no_compile: Torch's alone: without `torch.compile`.
        platform: "gpu" or "cpu".
    """

    sizes: Sizes
    batch_size: int
    seq_len: int
    warm_up: int
    steps: int
    profile_steps: int
    remat: bool
    scan_chunk: Optional[int]
    no_compile: bool
    platform: str

    @classmethod
    def from_json(cls, text: str) -> "Setting":
        """Returns the setting that `dataclasses.asdict` made the JSON of."""
        values = json.loads(text)
        return cls(**{**values, "sizes": Sizes(**values["sizes"])})


@dataclasses.dataclass(frozen=True)
class Result:
    """What a process measured.

    Attributes:
        name: Which half.
        step_seconds: The median step.
        first_step_seconds: The first call, which compiles.
        peak_bytes: The most that the framework's allocator held on the device; 0: not known.
        first_loss: In nats per token.
        last_loss: Likewise.
        num_params: Of the model.
        device: Its name.
        versions: Of the framework.
    """

    name: str
    step_seconds: float
    first_step_seconds: float
    peak_bytes: int
    first_loss: float
    last_loss: float
    num_params: int
    device: str
    versions: str


def median(seconds: Sequence[float]) -> float:
    """The median of a list."""
    return float(statistics.median(seconds))


def token_ids(setting: Setting) -> np.ndarray:
    """The ids of the one batch that every step trains on, [batch, seq_len] int64."""
    shape = (setting.batch_size, setting.seq_len)
    return np.random.default_rng(0).integers(0, setting.sizes.vocab_size, size=shape)


def our_config(setting: Setting) -> Any:
    """The recipe's trainer with this setting's model and shapes, and without its data, evaluation and mesh."""
    import jax.numpy as jnp

    from axlearn.common.input_fake import FakeLmInput
    from axlearn.experiments.registry import find_trainer_config

    sizes = setting.sizes
    cfg = find_trainer_config(_RECIPE)(data_dir="FAKE")
    stack = cfg.model.decoder.transformer
    # The numbers of the recipe itself, unless this is the toy: what is compared must be it.
    found = (cfg.model.decoder.dim, stack.num_layers, cfg.model.decoder.vocab_size)
    assert sizes == _TOY or found == (sizes.dim, sizes.num_layers, sizes.vocab_size), found
    cfg.model.decoder.set(dim=sizes.dim, vocab_size=sizes.vocab_size)
    stack.num_layers = sizes.num_layers
    attention = stack.layer.self_attention.attention
    attention.num_heads = sizes.num_heads
    attention.input_linear.input_linear.num_kv_heads = sizes.num_kv_heads
    stack.layer.feed_forward.hidden_dim = sizes.ffn_dim
    if not setting.remat:
        stack.layer.remat_spec = None
    cfg.model.scan_chunk = setting.scan_chunk
    cfg.set(dir="unused", evalers={}, mesh_shape=(1,) * len(cfg.mesh_axis_names), train_dtype=jnp.bfloat16)
    cfg.input = FakeLmInput.default_config().set(
        global_batch_size=setting.batch_size, source_length=setting.seq_len, vocab_size=sizes.vocab_size
    )
    return cfg


def our_batch(setting: Setting) -> dict[str, np.ndarray]:
    """The ids as our model takes them; without segments, as torch has none either: attention is causal, no more."""
    ids = token_ids(setting).astype(np.int32)
    labels = np.concatenate([ids[:, 1:], np.full_like(ids[:, :1], -1)], axis=1)
    return {"input_ids": ids, "target_labels": labels}


def run_ours(setting: Setting, *, profile_dir: Optional[str]) -> Result:
    """Trains for the steps of a setting.

    Args:
        setting: What to train, and for how long.
        profile_dir: Where to write a trace of a few more steps; None: nowhere.
    """
    import jax

    jax.config.update("jax_platforms", "cpu" if setting.platform == "cpu" else "cuda")
    jax.config.update("jax_enable_compilation_cache", False)
    trainer = our_config(setting).instantiate(parent=None, devices=np.array(jax.devices()[:1]))
    trainer.init(jax.random.PRNGKey(0))
    device = jax.devices()[0]
    with trainer.mesh():
        batch = jax.device_put(our_batch(setting), device)
        state = trainer.trainer_state
        start = time.perf_counter()
        step = trainer.compile_train_step(input_batch=batch)
        state, outputs = step(state, batch)
        first_loss = float(outputs["loss"])
        first_seconds = time.perf_counter() - start
        for _ in range(setting.warm_up):
            state, outputs = step(state, batch)
        jax.block_until_ready(state)
        seconds = []
        for _ in range(setting.steps):
            start = time.perf_counter()
            state, outputs = step(state, batch)
            jax.block_until_ready(state)
            seconds.append(time.perf_counter() - start)
        if profile_dir is not None:
            with jax.profiler.trace(profile_dir):
                for _ in range(setting.profile_steps):
                    state, outputs = step(state, batch)
                jax.block_until_ready(state)
    return Result(
        name="ours",
        step_seconds=median(seconds),
        first_step_seconds=first_seconds,
        peak_bytes=int((device.memory_stats() or {}).get("peak_bytes_in_use", 0)),
        first_loss=first_loss,
        last_loss=float(outputs["loss"]),
        num_params=sum(x.size for x in jax.tree.leaves(state.model)),
        device=device.device_kind,
        versions=f"jax {jax.__version__}",
    )


def _run_half(half: str, setting: Setting, profile_dir: Optional[str]) -> Result:
    if half == "ours":
        return run_ours(setting, profile_dir=profile_dir)
    import llama_gpu_torch

    return llama_gpu_torch.run(setting, weights=half.removeprefix("torch-"), profile_dir=profile_dir)


def _in_own_process(half: str, setting: Setting, profile_dir: Optional[str]) -> Result | str:
    """What a half measured in a fresh process, or the last line of why it did not."""
    command = [sys.executable, __file__, "--half", half, "--setting", json.dumps(dataclasses.asdict(setting))]
    if profile_dir is not None:
        command += ["--profile", profile_dir]
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "result.json"
        paths = os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            [*command, "--out", str(out)],
            env={**os.environ, "PYTHONPATH": paths},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode == 0:
            return Result(**json.loads(out.read_text()))
    return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]


def _flops_per_token(setting: Setting, *, num_params: int) -> dict[str, float]:
    """Operations of training per token, by both conventions; the head shares the table, which so counts once."""
    from axlearn.common.flops import transformer_flops_per_token

    full, causal = transformer_flops_per_token(
        num_matmul_params=num_params,
        total_attention_dim=setting.sizes.num_layers * setting.sizes.dim,
        seq_len=setting.seq_len,
    )
    return {"full": full, "causal": causal}


def _rows(setting: Setting, results: dict[str, list[Result | str]]) -> list[str]:
    from axlearn.common.flops import peak_flops

    lines = [
        f"  {'':27s} {'step':>11s} {'tokens/s':>9s} {'MFU full':>9s} {'causal':>7s} {'peak':>10s} "
        f"{'first step':>10s} {'loss':>15s}"
    ]
    seconds = {}
    tokens = setting.batch_size * setting.seq_len
    for half, outcomes in results.items():
        good = [x for x in outcomes if isinstance(x, Result)]
        if not good:
            lines.append(f"  {half:27s} did not run: {outcomes[-1]}")
            continue
        one, seconds[half] = good[0], median([x.step_seconds for x in good])
        flops = _flops_per_token(setting, num_params=one.num_params)
        peak = peak_flops(one.device)
        mfu = {
            k: "-" if peak is None else f"{v * tokens / seconds[half] / peak:.1%}" for k, v in flops.items()
        }
        memory = f"{one.peak_bytes / _GIB:.2f} GiB" if one.peak_bytes else "-"
        lines.append(
            f"  {one.name:27s} {seconds[half] * 1e3:8.2f} ms {tokens / seconds[half]:9.0f} {mfu['full']:>9s} "
            f"{mfu['causal']:>7s} {memory:>10s} {one.first_step_seconds:8.1f} s "
            f"{one.first_loss:7.3f}{one.last_loss:8.3f}"
        )
    ours = seconds.get("ours")
    lines += [
        f"  {half} takes {value / ours:.3f} times as long a step as ours"
        for half, value in seconds.items()
        if ours is not None and half != "ours"
    ]
    return lines


def compare(setting: Setting, *, halves: Sequence[str], turns: int, profile_dir: Optional[str]) -> bool:
    """Runs and prints all of it; returns whether every half ran."""
    from llama_gpu_profile import profile_lines

    results: dict[str, list[Result | str]] = {half: [] for half in halves}
    for turn in range(turns):
        for half in halves:
            is_last = profile_dir is not None and turn == turns - 1
            folder = f"{profile_dir}/{half}" if is_last else None
            results[half].append(_in_own_process(half, setting, folder))
    ran = [x for outcomes in results.values() for x in outcomes if isinstance(x, Result)]
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(f"{', '.join(sorted({x.versions for x in ran}))}; {datetime.date.today()}")
    print(f"{', '.join(sorted({x.device for x in ran}))}; {turns} turns of {setting.steps} steps, {setting}")
    print("\n".join(_rows(setting, results)))
    for half in halves if profile_dir is not None else ():
        if isinstance(results[half][-1], Result):
            print(f"  {half}, by kind of kernel:")
            print(
                "\n".join(
                    profile_lines(pathlib.Path(f"{profile_dir}/{half}"), num_steps=setting.profile_steps)
                )
            )
    return len(ran) == turns * len(halves)


def _setting(args: argparse.Namespace) -> Setting:
    is_toy = args.toy
    return Setting(
        sizes=_TOY if is_toy else Sizes(),
        batch_size=args.batch or (2 if is_toy else 8),
        seq_len=args.seq_len or (64 if is_toy else 4096),
        warm_up=2 if is_toy else 5,
        steps=args.steps or (5 if is_toy else 30),
        profile_steps=3,
        remat=args.remat,
        scan_chunk=args.scan_chunk,
        no_compile=args.no_compile,
        platform="cpu" if is_toy else "gpu",
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--toy", action="store_true", help="a tiny model on the CPU, to see whether it runs")
    parser.add_argument("--batch", type=int, help="rows (8)")
    parser.add_argument("--seq_len", type=int, help="tokens a row (4096)")
    parser.add_argument("--steps", type=int, help="timed steps a turn (30)")
    parser.add_argument("--turns", type=int, default=3, help="processes of each (3)")
    parser.add_argument("--remat", action="store_true", help="recompute activations in the backward pass")
    parser.add_argument("--scan_chunk", type=int, help="ours: positions per chunk of the loss")
    parser.add_argument("--no_compile", action="store_true", help="torch without torch.compile")
    parser.add_argument("--profile", help="a folder for traces; prints time by kind of kernel")
    parser.add_argument("--only", action="append", choices=_HALVES, help="by default all")
    parser.add_argument("--half", help=argparse.SUPPRESS)
    parser.add_argument("--setting", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.half:
        result = _run_half(args.half, Setting.from_json(args.setting), args.profile)
        pathlib.Path(args.out).write_text(json.dumps(dataclasses.asdict(result)))
        return 0
    if args.turns < 1:
        parser.error("--turns is at least 1")
    ran = compare(_setting(args), halves=args.only or _HALVES, turns=args.turns, profile_dir=args.profile)
    return 0 if ran else 1


if __name__ == "__main__":
    sys.path.insert(0, str(_ROOT))
    sys.exit(main())
