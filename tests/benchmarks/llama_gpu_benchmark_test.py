"""What of benchmarks/llama_gpu_benchmark.py needs no GPU: its model, its arithmetic, its reading of traces."""

import gzip
import json
import pathlib
import sys

import numpy as np
import pytest

_FOLDER = pathlib.Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(_FOLDER))
    import llama_gpu_benchmark
    import llama_gpu_profile

    yield llama_gpu_benchmark, llama_gpu_profile
    for name in ("llama_gpu_benchmark", "llama_gpu_profile"):
        del sys.modules[name]


def _setting(benchmark, **fields):
    plain = {"warm_up": 1, "steps": 1, "profile_steps": 1, "remat": False, "scan_chunk": None}
    return benchmark.Setting(
        sizes=benchmark.Sizes(), batch_size=2, seq_len=8, no_compile=False, platform="gpu", **plain | fields
    )


def test_our_half_is_the_recipe_with_its_own_shapes(modules):
    benchmark, _ = modules
    cfg = benchmark.our_config(_setting(benchmark, scan_chunk=4))
    assert (cfg.model.decoder.dim, cfg.model.decoder.vocab_size) == (2048, 131072)
    assert (cfg.model.scan_chunk, cfg.model.decoder.transformer.layer.remat_spec) == (4, None)
    batch = benchmark.our_batch(_setting(benchmark))
    np.testing.assert_array_equal(batch["target_labels"][:, :-1], batch["input_ids"][:, 1:])
    assert (batch["target_labels"][:, -1] == -1).all()


def test_operations_are_counted_by_both_conventions(modules):
    benchmark, _ = modules
    setting = _setting(benchmark)
    flops = benchmark._flops_per_token(setting, num_params=10)
    # Six a weight, and of attention 12 times layers, width and positions; half of these see each other.
    assert flops["full"] == 60 + 12 * 16 * 2048 * 8
    assert 60 < flops["causal"] < flops["full"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm>", "matrix products"),
        ("nvjet_tst_256x128_64x4_1x2_h_bz_coopA_NNT", "matrix products"),
        ("pytorch_flash::flash_fwd_kernel<...>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", "attention"),
        ("ncclDevKernel_AllReduce_Sum_f32", "communication"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("loop_multiply_fusion_3", "elementwise"),
        ("mystery", "other"),
    ],
)
def test_kernels_are_told_apart_by_their_names(modules, name, kind):
    assert modules[1].kind_of(name) == kind


def test_only_what_ran_on_the_gpu_counts(modules, tmp_path):
    def event(name, pid, tid, dur, **more):
        return {"ph": "X", "name": name, "pid": pid, "tid": tid, "ts": 0, "dur": dur, **more}

    events = [
        {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "/device:GPU:0"}},
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": 7, "args": {"name": "Stream #7(Compute)"}},
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": 8, "args": {"name": "XLA Modules"}},
        event("gemm_fusion_dot", 1, 7, 3000),
        event("loop_add_fusion", 1, 7, 1000),
        event("jit_train_step", 1, 8, 9000),
        event("python", 2, 1, 9000),
    ]
    path = tmp_path / "plugins" / "x.trace.json.gz"
    path.parent.mkdir()
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    assert modules[1].read_trace(tmp_path) == [("gemm_fusion_dot", 0.003), ("loop_add_fusion", 0.001)]
    lines = modules[1].profile_lines(tmp_path, num_steps=2)
    assert lines[0].split() == ["matrix", "products", "1.500", "ms", "75.0%"]
    torch_events = [event("k", 1, 1, 5, cat="kernel"), event("aten::mm", 1, 1, 9, cat="cpu_op")]
    (tmp_path / "torch.json").write_text(json.dumps({"traceEvents": torch_events}))
    assert modules[1].read_trace(tmp_path / "torch.json") == [("k", 5e-6)]
