"""Tests of axlearn.common.attention_kernels: which kernel is taken, and the reasons for which others are not."""

import dataclasses

import jax.numpy as jnp
import pytest

from axlearn.common.attention_bias import causal_mask, truncated_key_mask
from axlearn.common.attention_kernels import (
    TABLE,
    AttentionTask,
    Window,
    choose_kernel,
    collect_attention_choices,
    describe_attention_choice,
)
from axlearn.common.attention_kernels._refusals import largest_block

# A layer of an 8B model in training.
_TASK = AttentionTask(
    platform="tpu",
    dtype=jnp.bfloat16,
    target_len=8192,
    source_len=8192,
    num_heads=32,
    num_kv_heads=8,
    per_head_dim=128,
    window=Window(right=0),
)
# Its sequence is four times as long, on four devices.
_RING = {
    "target_len": 16384,
    "source_len": 16384,
    "num_target_shards": 4,
    "num_source_shards": 4,
    "target_axes": ("seq",),
    "source_axes": ("seq",),
}
_CAUSAL, _SLIDING, _TWO_SIDED = Window(right=0), Window(1024, 0), Window(1024, 128)


def _task(platform: str, **changes) -> AttentionTask:
    return dataclasses.replace(_TASK, platform=platform, **changes)


@pytest.mark.parametrize(
    ("changes", "on_tpu", "on_gpu"),
    [
        ({}, "tpu_splash", "gpu_cudnn"),
        ({"window": Window()}, "tpu_splash", "gpu_cudnn"),
        ({"has_segment_ids": True}, "tpu_splash", "gpu_pallas"),
        ({"window": _SLIDING}, "tpu_splash", "gpu_cudnn"),
        ({"window": _SLIDING, "has_segment_ids": True}, "tpu_splash", "gpu_cudnn_bias"),
        ({"window": _TWO_SIDED}, "tpu_splash", "gpu_cudnn_bias"),
        ({"mask_fns": (causal_mask,), "target_len": 512, "source_len": 512}, "tpu_splash", "gpu_cudnn_bias"),
        ({"explicit": ("ALiBiAttentionBias",)}, "tpu_flash", "gpu_cudnn_bias"),
        ({"logit_cap": 50.0}, "tpu_splash", "xla"),
        ({"has_sink": True}, "tpu_splash", "xla"),
        ({"has_sink": True, "explicit": ("ALiBiAttentionBias",)}, "xla", "xla"),
        ({"dropout_rate": 0.1}, "xla", "xla"),
        ({"need_probs": True}, "xla", "xla"),
        ({"is_placed": False}, "xla", "xla"),
        ({"num_source_shards": 2, "source_len": 4096}, "xla", "xla"),
        ({**_RING}, "ring", "ring"),
        ({**_RING, "mask_fns": (causal_mask,), "logit_cap": 50.0, "has_sink": True}, "ring", "ring"),
        ({**_RING, "has_segment_ids": True, "dtype": jnp.float32}, "ring", "ring"),
        ({**_RING, "explicit": ("ALiBiAttentionBias",)}, "xla", "xla"),
        ({**_RING, "dropout_rate": 0.1}, "xla", "xla"),
        ({**_RING, "need_probs": True}, "xla", "xla"),
        ({"num_target_shards": 2, "target_len": 4096}, "tpu_splash", "gpu_cudnn_bias"),
        ({"num_chunks": 4}, "tpu_splash", "gpu_cudnn_bias"),
        ({"num_chunks": 4, "window": Window(), "has_segment_ids": True}, "tpu_splash", "gpu_pallas"),
        ({"num_chunks": 4, "explicit": ("ALiBiAttentionBias",)}, "tpu_flash", "gpu_cudnn_bias"),
        ({"has_segment_ids": True, "is_self_segmented": False}, "xla", "gpu_cudnn_bias"),
        ({"dtype": jnp.float32}, "tpu_splash", "xla"),
        ({"per_head_dim": 256}, "tpu_splash", "xla"),
        ({"per_head_dim": 192, "explicit": ("TensorAttentionBias",)}, "xla", "xla"),
        ({"target_len": 100, "source_len": 100}, "xla", "gpu_cudnn"),
        ({"target_len": 101, "source_len": 101}, "xla", "xla"),
    ],
)
def test_the_first_kernel_that_honours_everything_is_taken(changes, on_tpu, on_gpu):
    assert choose_kernel(_task("tpu", **changes)).name == on_tpu
    assert choose_kernel(_task("gpu", **changes)).name == on_gpu
    assert choose_kernel(_task("cpu", **changes)).name == ("ring" if on_tpu == "ring" else "xla")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"source_axes": ("fsdp",)}, "needs queries and keys that are split over the same axes"),
        (
            {"num_target_shards": 1, "target_axes": ()},
            "needs queries and keys that are split over the same axes",
        ),
        ({"dtype": jnp.float64}, "computes in float32 or bfloat16 or float16, not in float64"),
        ({"explicit": ("ALiBiAttentionBias",)}, "takes no array of biases, as needed for ALiBiAttentionBias"),
        (
            {"target_len": 1000},
            "needs at most 512 or a multiple of 128, and there are 1000 queries and 16384 keys on a device",
        ),
        (
            {"mask_fns": (truncated_key_mask(0),), "window": Window()},
            "needs a mask that is a window of indices",
        ),
        ({"is_self_segmented": False, "has_segment_ids": True}, "needs segment ids that are the same"),
    ],
)
def test_ring_attention_says_why_not(changes, reason):
    choice = choose_kernel(_task("gpu", **(_RING | changes)))
    assert choice.name == "xla"
    assert dict(choice.refused)["ring"].startswith(reason)


def test_nobody_asks_ring_attention_where_keys_are_not_split():
    assert "ring" not in dict(choose_kernel(_task("cpu")).refused)
    with pytest.raises(ValueError, match=r"'ring', which needs keys that are split over devices"):
        choose_kernel(_task("cpu"), name="ring")


def test_a_choice_says_how_many_of_the_keys_are_on_a_device():
    text = describe_attention_choice(choose_kernel(_task("tpu", **_RING)))
    assert text.startswith("attention by ring on tpu: 16384 queries, 16384 of 65536 keys and 32 heads of 128")


def test_whoever_is_passed_over_says_why():
    choice = choose_kernel(_task("gpu", has_segment_ids=True, window=_SLIDING, logit_cap=30.0))
    assert choice.refused == (
        ("gpu_cudnn", "has no soft cap, and atten_logit_cap is 30.0"),
        ("gpu_pallas", "has no soft cap, and atten_logit_cap is 30.0"),
        ("gpu_cudnn_bias", "has no soft cap, and atten_logit_cap is 30.0"),
    )
    choice = choose_kernel(_task("gpu", has_segment_ids=True, window=_SLIDING))
    assert choice.refused == (
        ("gpu_cudnn", "knows segments only as an array of biases"),
        ("gpu_pallas", "has no masks but the causal one and segment ids"),
    )


def test_a_kernel_that_counts_positions_as_they_lie_refuses_another_order_and_says_so():
    assert dict(choose_kernel(_task("gpu", num_chunks=4)).refused) == {
        "gpu_cudnn": "counts positions in the order in which they lie, which is not that of the text",
        "gpu_pallas": "needs positions in the order of the text where there is a mask",
    }


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        # A prefix that nobody but itself sees: the queries behind it see no key of their document.
        (
            {"mask_fns": (truncated_key_mask(128),), "has_segment_ids": True},
            "needs masks in which every query sees its own key",
        ),
        ({"mask_fns": (truncated_key_mask(0),)}, "needs masks in which every query sees any key"),
        # A short look back from queries far behind the last key.
        ({"target_len": 4096, "window": _SLIDING}, "needs masks in which every query sees any key"),
        (
            {"has_segment_ids": True, "target_len": 1024},
            "needs segment ids that are the same for queries and keys, so that every query sees a key",
        ),
    ],
)
def test_a_query_that_could_see_no_key_is_refused(changes, reason):
    lengths = {"target_len": 1024, "source_len": 1024}
    task = _task("tpu", **({**lengths, "window": Window()} | changes))
    if "target_len" in changes:
        task = dataclasses.replace(task, source_len=512)
    assert dict(choose_kernel(task).refused)["tpu_splash"] == reason


def test_a_mask_of_too_many_pairs_is_not_looked_at():
    changes = {"target_len": 2**17, "source_len": 2**17, "mask_fns": (causal_mask,)}
    reason = dict(choose_kernel(_task("tpu", **changes)).refused)["tpu_splash"]
    assert reason == "needs a mask that is a window of indices where there are 131072 x 131072 pairs"


def test_a_kernel_of_another_platform_is_never_forced_on_one_that_cannot_interpret_it():
    with pytest.raises(ValueError, match=r"here: implementation='gpu_pallas', which runs on gpu\."):
        choose_kernel(_task("tpu"), name="gpu_pallas", where="here")
    with pytest.raises(
        ValueError, match=r"implementation='gpu_cudnn', which is no kernel that can be interpreted"
    ):
        choose_kernel(_task("cpu"), name="gpu_cudnn")


def test_blocks_that_do_not_fit_are_refused():
    task = _task("tpu", splash_blocks=(("block_kv", 384),))
    reason = dict(choose_kernel(task).refused)["tpu_splash"]
    assert reason == "needs a block_kv that is a multiple of 128 and divides 8192, not 384"


def test_choices_are_collected_once_each_and_for_the_platform_that_is_asked_about():
    with collect_attention_choices(platform="gpu") as choices:
        for _ in range(2):
            choose_kernel(_task("cpu"))
        choose_kernel(_task("cpu", has_sink=True))
    choose_kernel(_task("cpu", logit_cap=1.0))
    assert [(choice.name, choice.task.platform) for choice in choices] == [
        ("gpu_cudnn", "gpu"),
        ("xla", "gpu"),
    ]


def test_every_kernel_has_a_name_of_its_own_that_says_where_it_runs():
    assert len({kernel.name for kernel in TABLE}) == len(TABLE)
    assert all(kernel.name.startswith(kernel.platform or "ring") for kernel in TABLE)


@pytest.mark.parametrize(
    ("length", "limit", "expected"),
    [
        (8192, 512, 512),
        (8192, 1000, 512),
        (640, 512, 128),
        (768, 512, 384),
        (100, 512, None),
        (128, 64, None),
    ],
)
def test_blocks_divide_the_sequence(length, limit, expected):
    assert largest_block(length, limit=limit, unit=128) == expected


def test_windows_intersect():
    assert Window(5, 0).intersect(Window(3, 2)) == Window(3, 0)
    assert Window().intersect(Window(None, 0)) == Window(None, 0)
    assert Window().is_full
    assert _CAUSAL.is_causal
    assert not _SLIDING.is_causal
