"""FLOPs per token against hand counts, and the table of peaks."""

import pytest

from axlearn.common.flops import peak_flops, transformer_flops_per_token


def test_llama_7b_equals_the_hand_count_at_4k_and_at_128k():
    # 32 layers of 4 * 4096**2 (attention) and 3 * 4096 * 11008 (feed-forward), and a head of 32000 * 4096.
    num_params = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 32000 * 4096
    assert num_params == 6_607_077_376
    at_4k = transformer_flops_per_token(
        num_matmul_params=num_params, total_attention_dim=32 * 4096, seq_len=4096
    )
    assert at_4k.full == 6 * 6_607_077_376 + 12 * 32 * 32 * 128 * 4096
    # The ratios between the conventions that the comparison of trainers states for these shapes.
    assert at_4k.causal / at_4k.full == pytest.approx(0.930, abs=1e-3)
    at_128k = transformer_flops_per_token(
        num_matmul_params=num_params, total_attention_dim=32 * 4096, seq_len=128 * 1024
    )
    assert at_128k.causal / at_128k.full == pytest.approx(0.581, abs=1e-3)


@pytest.mark.parametrize(
    ("device_kind", "bfloat16", "float32"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12, 494.7e12),
        ("NVIDIA H100 PCIe", 756e12, 378e12),
        ("NVIDIA H100 NVL", 835.5e12, 417.5e12),
        ("NVIDIA H200", 989.4e12, 494.7e12),
        ("NVIDIA H200 NVL", 835.5e12, 417.5e12),
        ("NVIDIA GH200 480GB", 989.4e12, 494.7e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 156e12),
        ("NVIDIA B200", 2250e12, 1125e12),
        ("NVIDIA GB200", 2500e12, 1250e12),
        ("TPU v4", 275e12, None),
        ("TPU v5 lite", 197e12, None),
        ("TPU v5", 459e12, None),
        ("TPU v5p", 459e12, None),
        ("TPU v6 lite", 918e12, None),
        ("TPU7x", 1153.5e12, None),
    ],
)
def test_known_devices_have_their_vendor_s_rate(device_kind, bfloat16, float32):
    assert peak_flops(device_kind) == bfloat16
    assert peak_flops(device_kind, "float16") == bfloat16
    assert peak_flops(device_kind, "float32") == float32


@pytest.mark.parametrize(
    "device_kind",
    [
        "cpu",
        "",
        "AMD MI300X",
        "NVIDIA GeForce RTX 4090",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "TPU v2",
        "TPU v4 lite",
        "TPU v9",
    ],
)
def test_an_unknown_device_has_no_rate_rather_than_another_s(device_kind):
    assert peak_flops(device_kind) is None


def test_an_unknown_type_has_no_rate():
    assert peak_flops("NVIDIA H100 80GB HBM3", "int8") is None
