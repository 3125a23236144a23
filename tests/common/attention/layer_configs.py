"""Small configs and a plain numpy transformer layer that the tests of attention share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from axlearn.common.attention import (
    FusedGroupedQKVLinear,
    FusedQKVLinear,
    GroupedQueryAttention,
    Llama3SinusoidalPositionalEmbedding,
    NormPosition,
    ParallelTransformerLayer,
    PerDimScale,
    PipelinedTransformerLayer,
    RepeatedTransformerLayer,
    RoFormerQKVLinear,
    ScaleKey,
    StackedTransformerLayer,
    TransformerAttentionLayer,
    TransformerLayer,
    YaRNSinusoidalPositionalEmbedding,
    build_remat_spec,
)
from axlearn.common.base_layer import BaseLayer
from axlearn.common.kv_cache.kv_cache import KVCache
from axlearn.common.layers import RMSNorm, set_bias_recursively, set_norm_recursively
from axlearn.common.module import functional
from axlearn.common.pipeline import StreamSchedule

DIM, NUM_HEADS, NUM_KV_HEADS, HIDDEN_DIM = 16, 4, 2, 24
# Size of what cross-attention attends to.
SOURCE_DIM = 12
EPS, THETA = 1e-5, 100.0


def llama_attention_config(**kwargs) -> GroupedQueryAttention.Config:
    """Causal grouped-query attention with rotary positions and no biases."""
    input_linear = RoFormerQKVLinear.default_config().set(
        rotary_value=False, input_linear=FusedGroupedQKVLinear.default_config().set(num_kv_heads=NUM_KV_HEADS)
    )
    input_linear.rope_pos_emb_layer.theta = THETA
    cfg = GroupedQueryAttention.default_config().set(
        num_heads=NUM_HEADS,
        causal=True,
        input_linear=input_linear,
        kv_cache=KVCache.default_config().set(cache_dtype=jnp.float32),
    )
    set_bias_recursively(cfg, False)
    return cfg.set(**kwargs)


def llama_layer_config() -> TransformerLayer.Config:
    """A layer of Llama's kind."""
    cfg = TransformerLayer.default_config()
    cfg.self_attention.attention = llama_attention_config()
    cfg.feed_forward.set(hidden_dim=HIDDEN_DIM, activation=("nn.silu", "linear"))
    set_norm_recursively(cfg, RMSNorm.default_config().set(eps=EPS, forward_dtype=None))
    set_bias_recursively(cfg, False)
    return cfg


def llama_stack_config(num_layers: int = 2) -> RepeatedTransformerLayer.Config:
    """Layers of Llama's kind, repeated."""
    return RepeatedTransformerLayer.default_config().set(
        name="stack", input_dim=DIM, num_layers=num_layers, layer=llama_layer_config()
    )


def _norm_config() -> RMSNorm.Config:
    return RMSNorm.default_config().set(eps=EPS, forward_dtype=None)


def v2_layer_config() -> TransformerLayer.Config:
    """Norms where structure "v2" allows them, learned factors and sinks, and biases of the projections only."""
    cfg = llama_layer_config()
    norm = cfg.feed_forward.norm
    cfg.feed_forward.set(structure="v2", residual_gate_init=0.5, residual_weight=0.5)
    cfg.self_attention.set(
        structure="v2", norm={NormPosition.IN_NORM: norm.clone(), NormPosition.OUT_NORM: norm.clone()}
    )
    attention = cfg.self_attention.attention.set(logit_sink=True)
    attention.query_scale.set(per_dim_scale=PerDimScale.default_config())
    attention.input_linear.input_linear.layer.bias = True
    return cfg


def qk_norm_layer_config() -> TransformerLayer.Config:
    """Queries and keys normalised before a rotation, with scaled frequencies, of a part of each head."""
    cfg = llama_layer_config()
    cfg.self_attention.attention.input_linear.set(
        query_scale=ScaleKey.default_config().set(norm=_norm_config()),
        key_scale=ScaleKey.default_config().set(norm=_norm_config()),
        partial_rope_factor=0.5,
        rope_pos_emb_layer=Llama3SinusoidalPositionalEmbedding.default_config().set(
            theta=THETA, original_max_seq_length=32
        ),
    )
    return cfg


def fused_layer_config() -> TransformerLayer.Config:
    """Gala's layer: three stacked projections, and norms of queries and keys after the rotation."""
    cfg = llama_layer_config()
    attention = cfg.self_attention.attention
    attention.input_linear.set(
        input_linear=FusedQKVLinear.default_config(),
        rope_pos_emb_layer=YaRNSinusoidalPositionalEmbedding.default_config().set(
            theta=THETA, original_max_seq_length=8, scaling_factor=4.0, beta_fast=4.0
        ),
    )
    attention.query_scale.norm = attention.key_scale.norm = _norm_config()
    cfg.self_attention.set(structure="hybridnorm")
    cfg.feed_forward.set(structure="postnorm", activation="exact_gelu")
    return cfg


def cross_attention_layer_config() -> TransformerLayer.Config:
    """A layer that attends to a source of another size too."""
    cfg = llama_layer_config()
    cfg.cross_attention = TransformerAttentionLayer.default_config().set(
        source_dim=SOURCE_DIM, norm=_norm_config()
    )
    cfg.cross_attention.attention.set(num_heads=NUM_HEADS)
    set_bias_recursively(cfg.cross_attention, False)
    return cfg


def parallel_layer_config() -> ParallelTransformerLayer.Config:
    """Attention and feed-forward side by side."""
    llama = llama_layer_config()
    cfg = ParallelTransformerLayer.default_config().set(norm=_norm_config())
    cfg.self_attention.attention = llama.self_attention.attention
    cfg.feed_forward = llama.feed_forward.set(structure="nonorm")
    return cfg


def alternating_stack_config() -> RepeatedTransformerLayer.Config:
    """Two other kinds of layer in turn, the second one skipped more often in training."""
    layers = [qk_norm_layer_config(), parallel_layer_config()]
    pair = StackedTransformerLayer.default_config().set(
        num_layers=2, layer=layers, peak_stochastic_depth_rate=0.5
    )
    return RepeatedTransformerLayer.default_config().set(num_layers=2, layer=pair)


def repeated_cross_attention_config() -> RepeatedTransformerLayer.Config:
    """Equal layers that all attend to the same source, rematerialised."""
    cfg = RepeatedTransformerLayer.default_config().set(num_layers=2, layer=cross_attention_layer_config())
    cfg.layer.remat_spec = build_remat_spec(cfg)
    return cfg


def pipelined_stack_config() -> PipelinedTransformerLayer.Config:
    """Two stages of two layers, and two micro-batches."""
    return PipelinedTransformerLayer.default_config().set(
        num_layers=4, num_stages=2, num_microbatches=2, layer=llama_layer_config()
    )


def pipelined_cross_attention_config() -> PipelinedTransformerLayer.Config:
    """The same with a source for each row, with streaming, and with stages that are loops, rematerialised."""
    cfg = pipelined_stack_config().set(
        stage=RepeatedTransformerLayer.default_config().set(layer=None), layer=cross_attention_layer_config()
    )
    cfg.layer.remat_spec = build_remat_spec(cfg)
    cfg.pipeline.schedule = StreamSchedule.default_config()
    return cfg


# Every kind of layer, for the tests of what all of them keep to. (Llama's has tests of its own for it.)
LAYERS = {
    "v2": v2_layer_config,
    "fused": fused_layer_config,
    "alternating": alternating_stack_config,
    "repeated-cross-attention": repeated_cross_attention_config,
    "pipelined": pipelined_stack_config,
    "pipelined-cross-attention": pipelined_cross_attention_config,
}


def random_params(layer: BaseLayer, *, seed: int = 0):
    """Parameters of unit scale, norm scales and biases included, so that nothing hides behind a 0 or a 1."""
    rng = np.random.default_rng(seed)

    def draw(spec):
        noise = rng.normal(size=spec.shape)
        value = 1 + 0.3 * noise if spec.fan_axes is None else noise / np.sqrt(spec.fans()["fan_in"])
        return jnp.asarray(value, jnp.float32)

    return jax.tree.map(draw, layer.create_parameter_specs_recursively())


def equations(jaxpr) -> list:
    """All equations of a jaxpr, those of inner ones included."""
    found = []
    for eqn in jaxpr.eqns:
        found.append(eqn)
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found.extend(equations(inner))
    return found


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def jit_method(layer: BaseLayer, *, method: str = "forward", is_training: bool = False):
    """`fn(params, **inputs) -> outputs` of one method, compiled."""
    call = jax.jit(functools.partial(functional, layer, None, method=method, is_training=is_training))

    def fn(params, **inputs):
        return call(params, inputs)[0]

    return fn


def numpy_rope(x: np.ndarray, positions: np.ndarray, theta: float = THETA) -> np.ndarray:
    """Rotates adjacent pairs as complex numbers; x is [batch, seq, heads, per_head_dim]."""
    dim = x.shape[-1]
    angles = np.asarray(positions)[..., None] * theta ** (-np.arange(0, dim, 2) / dim)
    rotated = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)[:, :, None]
    return np.stack([rotated.real, rotated.imag], axis=-1).reshape(x.shape)


def numpy_attention(q, k, v, mask) -> np.ndarray:
    """Attention one head at a time, key head j // group for query head j; mask is [batch, target, source]."""
    group = q.shape[2] // k.shape[2]
    outputs = np.zeros(q.shape)
    for j in range(q.shape[2]):
        logits = q[:, :, j] @ k[:, :, j // group].swapaxes(1, 2) * q.shape[-1] ** -0.5
        logits = np.where(mask, logits, -np.inf)
        probs = np.exp(logits - logits.max(-1, keepdims=True))
        outputs[:, :, j] = probs / probs.sum(-1, keepdims=True) @ v[:, :, j // group]
    return outputs


def numpy_rms_norm(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * scale


def numpy_attention_branch(params, x, *, mask, positions) -> np.ndarray:
    """What `llama_attention_config` adds to its residual stream, from normalised inputs."""
    z = np.einsum("btd,dnh->btnh", x, params["i_proj"]["i_proj"]["qkv_proj"]["weight"])
    q, k, v = np.split(z, [NUM_HEADS, NUM_HEADS + NUM_KV_HEADS], axis=2)
    context = numpy_attention(numpy_rope(q, positions), numpy_rope(k, positions), v, mask)
    return np.einsum("btnh,dnh->btd", context, params["o_proj"]["weight"])


def numpy_feed_forward_branch(params, x) -> np.ndarray:
    """What the feed-forward block of `llama_layer_config` adds, from normalised inputs."""
    gate = x @ params["linear1_0"]["weight"]
    return (gate / (1 + np.exp(-gate)) * (x @ params["linear1_1"]["weight"])) @ params["linear2"]["weight"]


def numpy_llama_layer(params, x, *, mask, positions) -> np.ndarray:
    """The layer of `llama_layer_config` in float64."""
    p = jax.tree.map(lambda w: np.asarray(w, np.float64), params)
    attention, ffn = p["self_attention"], p["feed_forward"]
    y = numpy_rms_norm(x, attention["norm"]["scale"])
    x = x + numpy_attention_branch(attention["attention"], y, mask=mask, positions=positions)
    return x + numpy_feed_forward_branch(ffn, numpy_rms_norm(x, ffn["norm"]["scale"]))
