"""How fast Hugging Face models are imported and exported, and in how much memory.

    python benchmarks/hf_convert_benchmark.py

The reference in the same run is a plain copy of the same files, made durable as the conversions are. Every conversion
runs in a process of its own, so that its memory is its own. Results are kept in `hf_convert_benchmark.md`.
"""

import argparse
import json
import multiprocessing
import os
import pathlib
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from importlib import metadata

import numpy as np

from axlearn.cli import _hf_export, _hf_import
from axlearn.common.file_system import fsync_dir
from axlearn.common.hf import SafetensorsWriter, TensorInfo, tensor_rules
from axlearn.experiments.text.gpt import hf


def hf_config(args: argparse.Namespace) -> dict:
    """Returns the config.json of a Llama with grouped heads and an untied head."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": args.vocab_size,
        "hidden_size": args.dim,
        "intermediate_size": 4 * args.dim,
        "num_hidden_layers": args.num_layers,
        "num_attention_heads": args.dim // 64,
        "num_key_value_heads": args.dim // 128,
        "max_position_embeddings": 4096,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }


def write_model(folder: pathlib.Path, config: dict) -> dict[str, int]:
    """Writes a model of random weights; returns the size of each tensor in bytes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    rules = tensor_rules(hf.model_config(config), config)
    infos = {
        name: TensorInfo(np.dtype(np.float32), tuple(shape))
        for rule in rules
        for name, shape in rule.hf_shapes.items()
    }
    rng = np.random.default_rng(0)
    with SafetensorsWriter(folder, tensors=infos, max_shard_bytes=10**9) as writer:
        for name, info in infos.items():
            writer.write(name, rng.normal(scale=0.02, size=info.shape).astype(np.float32))
    return {name: info.num_bytes for name, info in infos.items()}


def copy(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies the files of a folder, durably."""
    target.mkdir()
    for path in source.iterdir():
        with open(path, "rb") as read, open(target / path.name, "wb") as written:
            shutil.copyfileobj(read, written, 2**20)
            written.flush()
            os.fsync(written.fileno())
    fsync_dir(target)


def import_model(source: pathlib.Path, target: pathlib.Path) -> None:
    """Imports a model."""
    options = _hf_import.ImportOptions(
        source=str(source),
        output=str(target),
        recipe="fuji-tiny",
        data_dir="FAKE",
        dtype="float32",
        tokenizer="none",
        overrides=(),
    )
    _hf_import.import_run(options)


def export_model(source: pathlib.Path, target: pathlib.Path) -> None:
    """Exports a run."""
    options = _hf_export.ExportOptions(
        run=str(source), output=str(target), step=None, dtype=None, ema=False, max_shard_bytes=10**9
    )
    _hf_export.export_run(options)


def _measured(action: Callable, source: pathlib.Path, target: pathlib.Path, results) -> None:
    # Importing libraries takes more at times than is left of them: from here on the peak is that of the action.
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = _peak_memory()
    start = time.perf_counter()
    action(source, target)
    seconds = time.perf_counter() - start
    results.put((seconds, _peak_memory() - before))


def _peak_memory() -> int:
    """Returns the most memory that this process has had since its peak was reset, in bytes; Linux only."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024


def measure(action: Callable, source: pathlib.Path, target: pathlib.Path) -> tuple[float, int]:
    """Returns seconds and growth of the resident memory of an action in a process of its own."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_measured, args=(action, source, target, results))
    process.start()
    measured = results.get(timeout=600)
    process.join()
    return measured


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--num_layers", type=int, default=12)
    parser.add_argument("--vocab_size", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("jax", "numpy", "tensorstore"))
    print(
        f"{platform.machine()}, Python {platform.python_version()}, {versions}, {time.strftime('%Y-%m-%d')}"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        sizes = write_model(folder / "hf", hf_config(args))
        total, largest = sum(sizes.values()), max(sizes.values())
        print(f"{total / 1e6:.0f} MB in {len(sizes)} tensors, the largest of {largest / 1e6:.0f} MB, float32")
        import_model(folder / "hf", folder / "run")
        print(f"{'':16} {'MB/s':>8} {'times the copy':>16} {'memory, MB':>12}")
        reference = None
        for label, action, source in (
            ("copy", copy, folder / "hf"),
            ("import", import_model, folder / "hf"),
            ("export", export_model, folder / "run"),
        ):
            results = []
            for i in range(args.repeats):
                results.append(measure(action, source, folder / f"{label}{i}"))
                shutil.rmtree(folder / f"{label}{i}")
            seconds = sorted(seconds for seconds, _ in results)[len(results) // 2]
            reference = reference or seconds
            memory = max(memory for _, memory in results)
            print(
                f"{label:16} {total / 1e6 / seconds:8.0f} {seconds / reference:16.2f} {memory / 1e6:12.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
