"""What each path of attention takes, forward and backward, beside the plain maths: time, and memory for temporaries.

The reference, in the same run, is `GroupedQueryAttention`. Every path that runs on this machine is timed, in turns; the
median counts. Where libtpu is installed (the extra `tpu-aot`), the paths of a TPU are compiled for one that is not
there: the compiler's own sum of temporary memory, and no times.

Where a sequence is split over devices, the best kernel that takes gathered keys stands beside ring attention: the same,
and what each device sends. On CPU the devices are made of one.

    python benchmarks/attention_benchmark.py [--steps 10] [--seq_len 2048] [--split_only]

Results are kept in `attention_benchmark.md`.
"""

import argparse
import dataclasses
import datetime
import importlib.util
import os
import platform
import statistics
import time
from collections.abc import Iterator
from typing import Any, Optional

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from axlearn.common.aot_compilation import topology_devices
from axlearn.common.attention import GroupedQKVLinear, GroupedQueryAttention
from axlearn.common.attention_kernels import TABLE
from axlearn.common.compiled_program import collectives_of
from axlearn.common.flash_attention.layer import FlashAttention
from axlearn.common.machines import Machine
from axlearn.common.module import functional
from axlearn.common.utils import build_mesh, use_mesh

_MIB = 2**20
_NUM_HEADS, _NUM_KV_HEADS = 16, 4
# Of a small model on CPU; of an 8B one on what kernels are made for.
_PER_HEAD_DIMS = {"cpu": 64, "gpu": 128, "tpu": 128}
_TOPOLOGY = "v5p:2x2x1"
# How a sequence is split, by who computes it: keys gathered, or round a ring. On each of so many devices.
_NUM_SHARDS = 4
_SPLIT, _WHOLE = P(None, "seq", None, None), P(None, None, None, None)
_SPLIT_BY = {
    "cpu": {"xla": _WHOLE, "ring": _SPLIT},
    "gpu": {"gpu_cudnn_bias": _WHOLE, "ring": _SPLIT},
    "tpu": {"tpu_splash": _WHOLE, "ring": _SPLIT},
}


@dataclasses.dataclass
class _Path:
    """A path, compiled, and the seconds of its steps."""

    name: str
    temp_mib: float
    compile_seconds: float
    step: Optional[Any] = None
    seconds: list[float] = dataclasses.field(default_factory=list)
    # What a device sends, by kind of collective.
    sent_mib: dict[str, float] = dataclasses.field(default_factory=dict)


def _layer(implementation: Optional[str], *, dim: int, **kwargs: Any) -> GroupedQueryAttention:
    cls = GroupedQueryAttention if implementation is None else FlashAttention
    cfg = cls.default_config().set(
        name="attention",
        query_dim=dim,
        key_dim=dim,
        value_dim=dim,
        num_heads=_NUM_HEADS,
        input_linear=GroupedQKVLinear.default_config().set(num_kv_heads=_NUM_KV_HEADS),
        causal=True,
        dtype=jnp.bfloat16,
        **kwargs,
    )
    if implementation is not None:
        cfg.backend_overrides = {"implementation": implementation}
    return cfg.instantiate(parent=None)


def _compile(implementation: Optional[str], *, on: str, seq_len: int, packed: bool) -> tuple[_Path, Any, Any]:
    """Compiles the gradients of a layer; returns it, and the shapes of its parameters and inputs."""
    dim = _NUM_HEADS * _PER_HEAD_DIMS[on]
    layer = _layer(implementation, dim=dim)
    specs = layer.create_parameter_specs_recursively()
    params = jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.bfloat16), specs)
    inputs = {"query": jax.ShapeDtypeStruct((1, seq_len, dim), jnp.bfloat16)}
    if packed:
        inputs["segment_ids"] = jax.ShapeDtypeStruct((1, seq_len), jnp.int32)

    def loss(params: Any, inputs: Any) -> jax.Array:
        output, _ = functional(layer, None, params, inputs, is_training=True)
        return jnp.sum(jnp.square(output.data.astype(jnp.float32)))

    start = time.perf_counter()
    compiled = jax.jit(jax.grad(loss)).lower(params, inputs).compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis().temp_size_in_bytes / _MIB
    return _Path(implementation or "plain", memory, seconds, step=compiled), params, inputs


def _compile_split(implementation: str, *, on: str, seq_len: int) -> tuple[_Path, Any, Any]:
    """As `_compile`, of a sequence that is split over the current mesh; gradients of its hidden states alone.

    Those of the parameters would be summed over the devices, which has nothing to do with attention.
    """
    dim = _NUM_HEADS * _PER_HEAD_DIMS[on]
    specs = {"btnh": _SPLIT, "bsnh": _SPLIT_BY[on][implementation]}
    layer = _layer(implementation, dim=dim, mha_dim_to_partition_spec=specs)
    mesh = jax.sharding.get_mesh()

    def shape_of(*shape: int, spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))

    params = jax.tree.map(
        lambda spec: shape_of(*spec.shape, spec=P()), layer.create_parameter_specs_recursively()
    )
    query = shape_of(1, seq_len, dim, spec=P(None, "seq", None))

    def loss(query: Any, params: Any) -> jax.Array:
        output, _ = functional(layer, None, params, {"query": query}, is_training=True)
        return jnp.sum(jnp.square(output.data.astype(jnp.float32)))

    start = time.perf_counter()
    compiled = jax.jit(jax.grad(loss)).lower(query, params).compile()
    path = _Path(
        implementation,
        compiled.memory_analysis().temp_size_in_bytes / _MIB,
        time.perf_counter() - start,
        step=compiled,
    )
    for collective in collectives_of(compiled.as_text(), mesh_shape=mesh.shape):
        sent = path.sent_mib.get(collective.kind, 0.0) + collective.sent_bytes / _MIB
        path.sent_mib[collective.kind] = sent
    return path, query, params


def _split_mesh(devices: Any) -> Any:
    return use_mesh(
        build_mesh(mesh_shape=(_NUM_SHARDS,), mesh_axis_names=("seq",), devices=devices[:_NUM_SHARDS])
    )


def _run_split(*, seq_len: int, num_steps: int) -> list[_Path]:
    on = jax.default_backend()
    with _split_mesh(jax.devices()):
        compiled = [_compile_split(name, on=on, seq_len=seq_len) for name in _SPLIT_BY[on]]
        arguments = jax.tree.map(
            lambda x, shape: jax.device_put(x, shape.sharding), _fill(compiled[0][1:]), compiled[0][1:]
        )
        return _time([path for path, *_ in compiled], arguments, num_steps=num_steps)


def _names(on: str, *, packed: bool) -> Iterator[Optional[str]]:
    yield None
    yield "xla"
    for kernel in TABLE:
        # cuDNN has an array of biases only where there is something to put there, and segments nowhere else.
        if kernel.platform == on and ("cudnn" not in kernel.name or packed == kernel.name.endswith("bias")):
            yield kernel.name


def _fill(shapes: Any) -> Any:
    """Numbers for floats, documents of 1000 tokens for segment ids."""
    rng = np.random.default_rng(0)

    def fill(x: jax.ShapeDtypeStruct) -> jax.Array:
        if jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.asarray(0.05 * rng.standard_normal(x.shape), x.dtype)
        return jnp.broadcast_to(1 + jnp.arange(x.shape[-1]) // 1000, x.shape)

    return jax.tree.map(fill, shapes)


def _run(*, packed: bool, seq_len: int, num_steps: int) -> list[_Path]:
    on = jax.default_backend()
    compiled = [_compile(name, on=on, seq_len=seq_len, packed=packed) for name in _names(on, packed=packed)]
    return _time([path for path, *_ in compiled], _fill(compiled[0][1:]), num_steps=num_steps)


def _time(paths: list[_Path], arguments: Any, *, num_steps: int) -> list[_Path]:
    """Runs paths in turns, and keeps their times but for the first two."""
    for i in range(num_steps + 2):
        for path in paths:
            start = time.perf_counter()
            jax.block_until_ready(path.step(*arguments))
            if i >= 2:
                path.seconds.append(time.perf_counter() - start)
    return paths


def _tpu_devices() -> Any:
    machine = Machine("", "tpu", "", num_slices=1, devices_per_slice=0, memory_bytes=0, topology=_TOPOLOGY)
    return topology_devices(machine)


def _compile_for_tpu(*, packed: bool, seq_len: int) -> list[_Path]:
    devices = _tpu_devices()[:1]
    with use_mesh(build_mesh(mesh_shape=(1,), mesh_axis_names=("data",), devices=devices)):
        return [
            _compile(name, on="tpu", seq_len=seq_len, packed=packed)[0]
            for name in _names("tpu", packed=packed)
        ]


def _print(title: str, paths: list[_Path]) -> None:
    plain = paths[0]
    print(title)
    sends = "  sends" if plain.sent_mib else ""
    print(f"{'':>16}{'time':>12}{'ratio':>8}{'temporary memory':>20}{'ratio':>8}{'compiled in':>14}{sends}")
    for path in paths:
        timing = f"{'':>20}"
        if path.seconds:
            median = statistics.median(path.seconds)
            timing = f"{1e3 * median:>9.1f} ms{median / statistics.median(plain.seconds):>8.2f}"
        memory = f"{path.temp_mib:>16.1f} MiB{path.temp_mib / plain.temp_mib:>8.2f}"
        sent = "; ".join(f"{kind} {mib:.1f} MiB" for kind, mib in path.sent_mib.items())
        print(f"{path.name:>16}{timing}{memory}{path.compile_seconds:>12.1f} s{'  ' if sent else ''}{sent}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10, help="steps to measure, of each path")
    parser.add_argument("--seq_len", type=int, default=2048, help="tokens of a sequence on this machine")
    parser.add_argument("--tpu_seq_len", type=int, default=8192, help="tokens of a sequence compiled for TPU")
    parser.add_argument("--split_only", action="store_true", help="nothing but sequences split over devices")
    args = parser.parse_args()
    on = jax.default_backend()
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(
        f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {datetime.date.today()}, {args.steps} steps; "
        f"bfloat16, {_NUM_HEADS} heads ({_NUM_KV_HEADS} of keys), causal"
    )
    for packed in () if args.split_only else (False, True):
        what = "packed documents" if packed else "one document"
        paths = _run(packed=packed, seq_len=args.seq_len, num_steps=args.steps)
        _print(
            f"\n{on}, {args.seq_len} tokens, heads of {_PER_HEAD_DIMS[on]}, {what}",
            paths,
        )
    if len(jax.devices()) >= _NUM_SHARDS:
        _print(
            f"\n{on}, {args.seq_len} tokens on {_NUM_SHARDS} devices, heads of {_PER_HEAD_DIMS[on]}",
            _run_split(seq_len=args.seq_len, num_steps=args.steps),
        )
    if importlib.util.find_spec("libtpu") is None:
        print("\nno libtpu: nothing is compiled for TPU")
        return
    for packed in () if args.split_only else (False, True):
        what = "packed documents" if packed else "one document"
        paths = _compile_for_tpu(packed=packed, seq_len=args.tpu_seq_len)
        _print(
            f"\n{_TOPOLOGY}, compiled, {args.tpu_seq_len} tokens, heads of {_PER_HEAD_DIMS['tpu']}, {what}",
            paths,
        )
    for seq_len in (2 * args.tpu_seq_len, 4 * args.tpu_seq_len):
        with _split_mesh(_tpu_devices()):
            paths = [_compile_split(name, on="tpu", seq_len=seq_len)[0] for name in _SPLIT_BY["tpu"]]
        heads = f"heads of {_PER_HEAD_DIMS['tpu']}"
        _print(f"\n{_TOPOLOGY}, compiled, {seq_len} tokens on {_NUM_SHARDS} devices, {heads}", paths)


if __name__ == "__main__":
    main()
