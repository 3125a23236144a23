"""What attention can be asked for, small: the cases that every path either computes or refuses."""

import dataclasses
from typing import Any, Optional

import jax
import jax.numpy as jnp
import numpy as np

from axlearn.common.attention import GroupedQKVLinear, GroupedQueryAttention
from axlearn.common.attention_bias import (
    LeftRightWindowAttentionBias,
    MaskFnAttentionBias,
    SlidingWindowAttentionBias,
    alibi_attention_bias,
    causal_mask,
    or_masks,
    truncated_key_mask,
)
from axlearn.common.config import config_for_function
from axlearn.common.flash_attention.layer import FlashAttention
from axlearn.common.module import functional

DIM, NUM_HEADS, NUM_KV_HEADS = 64, 4, 2
PER_HEAD_DIM = DIM // NUM_HEADS
# Two blocks of the smallest size that TPU kernels have; documents end within blocks and between them.
BATCH, SEQ, BLOCK = 2, 256, 128
_LENGTHS = ((100, 28, 128), (256,))

PREFIX = 140
_CAUSAL_OR_PREFIX = or_masks(causal_mask, truncated_key_mask(PREFIX))


@dataclasses.dataclass(frozen=True)
class KernelCase:
    """A config of attention, its inputs, and who computes it.

    Attributes:
        config: Fields of the layer's config.
        packed: Whether each row has several documents.
        has_bias: Whether an array is added to the logits, and its gradient is wanted.
        dtype: Of parameters and inputs.
        accepted_by: The kernels that compute it. All others refuse.
    """

    config: dict[str, Any]
    packed: bool = False
    has_bias: bool = False
    dtype: Any = jnp.float32
    accepted_by: tuple[str, ...] = ()


_WINDOW = SlidingWindowAttentionBias.default_config(sliding_window_size=70)
_TWO_SIDED = LeftRightWindowAttentionBias.default_config(left_size=90, right_size=20)
_PREFIX = MaskFnAttentionBias.default_config(mask=_CAUSAL_OR_PREFIX)
_ALL = ("tpu_splash", "tpu_flash", "gpu_pallas")

# jax.nn's cuDNN path is not among them: it does not run without a GPU, see `cudnn_test.py`.
CASES = {
    "causal, packed": KernelCase({"causal": True}, packed=True, accepted_by=_ALL),
    "bidirectional": KernelCase({}, accepted_by=_ALL),
    "causal, bfloat16": KernelCase({"causal": True}, dtype=jnp.bfloat16, accepted_by=_ALL),
    "window, packed": KernelCase({"mask": _WINDOW}, packed=True, accepted_by=("tpu_splash", "tpu_flash")),
    "two-sided window, cap, sink": KernelCase(
        {"mask": _TWO_SIDED, "atten_logit_cap": 1.5, "logit_sink": True}, accepted_by=("tpu_splash",)
    ),
    "prefix, sink, packed": KernelCase(
        {"mask": _PREFIX, "logit_sink": True}, packed=True, accepted_by=("tpu_splash",)
    ),
    "prefix": KernelCase({"mask": _PREFIX}, accepted_by=("tpu_splash", "tpu_flash")),
    "causal, ALiBi, packed": KernelCase(
        {"causal": True, "logit_bias": config_for_function(alibi_attention_bias)},
        packed=True,
        accepted_by=("tpu_flash",),
    ),
    "causal, learned bias": KernelCase({"causal": True}, has_bias=True, accepted_by=("tpu_flash",)),
}


def build(
    case: KernelCase, *, implementation: Optional[str] = None, dim: int = DIM, **kwargs: Any
) -> GroupedQueryAttention:
    """The layer, as a FlashAttention by `implementation`, or a plain one where that is None."""
    cls = GroupedQueryAttention if implementation is None else FlashAttention
    cfg = cls.default_config().set(
        name="attention",
        query_dim=dim,
        key_dim=dim,
        value_dim=dim,
        num_heads=NUM_HEADS,
        input_linear=GroupedQKVLinear.default_config().set(num_kv_heads=NUM_KV_HEADS),
        dtype=case.dtype,
        **case.config,
    )
    if implementation is not None:
        cfg.set(tpu_block_size=BLOCK, gpu_block_size=BLOCK, **kwargs)
        cfg.backend_overrides = {"implementation": implementation}
    return cfg.instantiate(parent=None)


def inputs_of(case: KernelCase, *, batch: int = BATCH) -> dict[str, Any]:
    """The arguments of `forward`, and the parameters "params" of the layer."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), case.dtype)

    layer = build(case)
    params = jax.tree.map(lambda x: normal(*x.shape) * 0.2, layer.create_parameter_specs_recursively())
    inputs = {"params": params, "query": normal(batch, SEQ, DIM)}
    if case.has_bias:
        inputs["attention_logit_biases"] = normal(NUM_HEADS, SEQ, SEQ)[None]
    if case.packed:
        rows = [np.repeat(np.arange(1, len(lengths) + 1), lengths) for lengths in _LENGTHS]
        inputs["segment_ids"] = jnp.asarray(np.stack(rows * (batch // len(rows))), jnp.int32)
    return inputs


def forward_and_grads(layer: GroupedQueryAttention, inputs: dict[str, Any]) -> tuple[jax.Array, Any]:
    """The outputs, and the gradients of a number made of them with respect to whatever is not an integer."""

    def loss(floats: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
        arguments = {**inputs, **floats}
        params = arguments.pop("params")
        output, _ = functional(layer, jax.random.PRNGKey(0), params, arguments, is_training=True)
        return jnp.sum(jnp.sin(output.data.astype(jnp.float32))), output.data

    floats = {name: x for name, x in inputs.items() if name != "segment_ids"}
    (_, outputs), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(floats)
    return outputs, grads
