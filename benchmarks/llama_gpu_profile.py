"""Where the time of a step goes, by kind of kernel, from the trace that jax's or torch's profiler wrote.

Both write Chrome traces: complete events ("ph": "X") with a name, a duration in microseconds, and the process and
thread that they belong to.
"""

import collections
import gzip
import json
import pathlib
import re
from typing import Any

# The first kind whose pattern is in the name counts. Kernels go by the names of cuBLAS, cuDNN, CUTLASS, Triton, XLA and
# Inductor on GPUs, operations by those of HLO on a CPU.
_KINDS = (
    ("attention", r"flash|fmha|sdpa|attention|mha_"),
    ("matrix products", r"gemm|cublas|cutlass|nvjet|xmma|matmul|\bdot\b|^dot|_mm_|::mm\b|convolution"),
    ("communication", r"nccl|all-?reduce|all-?gather|reduce-?scatter|all-?to-?all|permute"),
    ("optimizer", r"adam|multi_tensor|foreach"),
    ("copies", r"memcpy|memset|copy|transpose|scatter|gather|slice|concatenate"),
    ("reductions", r"reduce|softmax|norm"),
    (
        "elementwise",
        r"fusion|triton|elementwise|vectorized|loop_|wrapped|convert|broadcast|add|multiply|select",
    ),
)
OTHER = "other"


def kind_of(name: str) -> str:
    """The kind of a kernel or operation, by its name."""
    return next((kind for kind, pattern in _KINDS if re.search(pattern, name.lower())), OTHER)


def read_trace(path: pathlib.Path) -> list[tuple[str, float]]:
    """Names and seconds of all that ran on a device: on a GPU's streams, else in the threads that run XLA on a CPU.

    Args:
        path: A Chrome trace, or a folder with one below it, gzipped or not.
    """
    if path.is_dir():
        path = max([*path.rglob("*.trace.json.gz"), *path.rglob("*.json")], key=lambda p: p.stat().st_mtime)
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text()
    return _device_events(json.loads(text)["traceEvents"])


def _device_events(events: list[dict[str, Any]]) -> list[tuple[str, float]]:
    complete = [event for event in events if event.get("ph") == "X"]
    # torch says what an event is; "kernel", "gpu_memcpy" and "gpu_memset" ran on the GPU.
    kernels = [e for e in complete if str(e.get("cat", "")) in ("kernel", "gpu_memcpy", "gpu_memset")]
    if not kernels:
        processes = {e["pid"]: e["args"]["name"] for e in events if e.get("name") == "process_name"}
        threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e.get("name") == "thread_name"}
        on_gpu = [
            e
            for e in complete
            if "/device:GPU" in processes.get(e["pid"], "")
            and threads.get((e["pid"], e["tid"]), "").startswith("Stream")
        ]
        # On a CPU jax names the operation that an event is for; torch has operators, of which the innermost count.
        kernels = on_gpu or [e for e in complete if "hlo_op" in e.get("args", {})]
        kernels = kernels or [e for e in complete if e.get("cat") == "cpu_op"]
    return [(str(event["name"]), float(event.get("dur", 0)) / 1e6) for event in kernels]


def profile_lines(path: pathlib.Path, *, num_steps: int, num_names: int = 12) -> list[str]:
    """A table of the time of a step by kind, and of its longest kernels by name.

    Args:
        path: As for `read_trace`.
        num_steps: Steps in the trace.
        num_names: Kernels to list.
    """
    by_kind: collections.Counter[str] = collections.Counter()
    by_name: collections.Counter[str] = collections.Counter()
    for name, seconds in read_trace(path):
        by_kind[kind_of(name)] += seconds / num_steps
        by_name[name] += seconds / num_steps
    total = sum(by_kind.values()) or 1.0
    lines = [
        f"    {kind:16s} {seconds * 1e3:10.3f} ms {seconds / total:6.1%}"
        for kind, seconds in by_kind.most_common()
    ]
    lines.append(f"    {'in all':16s} {total * 1e3:10.3f} ms of kernels a step")
    lines += [
        f"      {seconds * 1e3:10.3f} ms {kind_of(name):16s} {name[:90]}"
        for name, seconds in by_name.most_common(num_names)
    ]
    return lines
