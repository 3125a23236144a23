"""Two training steps to compare ours with: the same maths in bare jax, and a model as flax and optax make it plain.

Both are a decoder of the Llama family (https://arxiv.org/abs/2302.13971) with grouped-query attention over packed
rows, a tied head, and AdamW behind a clip of the global gradient norm.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

Params = Any
Batch = dict[str, jax.Array]
_EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a model and its batch measure.

    Attributes:
        remat: Whether the backward pass keeps of each layer only the projections and the attention's context.
    """

    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    ffn_dim: int
    vocab_size: int
    batch_size: int
    seq_len: int
    peak_lr: float = 1e-3
    weight_decay: float = 0.1
    max_step: int = 1000
    warmup_steps: int = 10
    remat: bool = False

    @property
    def per_head_dim(self) -> int:
        return self.dim // self.num_heads


def schedule(sizes: Sizes) -> Callable[[jax.Array], jax.Array]:
    """A cosine from 1 to 0.1 behind a linear warm-up, of the number of the update, counted from 1."""

    def scale(count: jax.Array) -> jax.Array:
        warm = count / sizes.warmup_steps
        fraction = jnp.clip((count - sizes.warmup_steps) / (sizes.max_step - sizes.warmup_steps), 0, 1)
        return jnp.where(count < sizes.warmup_steps, warm, 0.9 * 0.5 * (1 + jnp.cos(jnp.pi * fraction)) + 0.1)

    return scale


def _norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + _EPS) * scale


def _rotate(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Turns adjacent pairs of [batch, seq, heads, per_head_dim] by angles that grow with the position."""
    half = x.shape[-1] // 2
    angles = positions[..., None] * 10000.0 ** (-jnp.arange(half) / half)
    sin, cos = jnp.sin(angles)[:, :, None], jnp.cos(angles)[:, :, None]
    even, odd = x[..., 0::2], x[..., 1::2]
    return jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1).reshape(x.shape)


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, batch: Batch) -> jax.Array:
    """Causal attention within segments; q [batch, seq, heads, h], k and v with fewer heads."""
    group = q.shape[2] // k.shape[2]
    q = q.reshape(*q.shape[:2], k.shape[2], group, q.shape[-1]) * q.shape[-1] ** -0.5
    logits = jnp.einsum("btkgh,bskh->bkgts", q, k)
    segments, positions = batch["input_segment_ids"], jnp.arange(k.shape[1])
    visible = (positions[:, None] >= positions[None, :]) & (segments[:, :, None] == segments[:, None, :])
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], logits, -1e15), axis=-1)
    context = jnp.einsum("bkgts,bskh->btkgh", weights, v)
    return context.reshape(*context.shape[:2], -1, context.shape[-1])


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    log_probs = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(log_probs, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    live = labels >= 0
    return -jnp.sum(picked * live) / jnp.maximum(jnp.sum(live), 1)


def bare_loss(params: Params, batch: Batch, *, sizes: Sizes) -> jax.Array:
    """The loss of our model, from its own tree of parameters."""
    decoder = params["decoder"]
    table = decoder["emb"]["token_emb"]["weight"]
    kv = sizes.num_kv_heads

    def layer(x: jax.Array, weights: Params) -> tuple[jax.Array, None]:
        attention = weights["self_attention"]
        y = _norm(x, attention["norm"]["scale"])
        qkv = jnp.einsum("btd,dnh->btnh", y, attention["attention"]["i_proj"]["i_proj"]["qkv_proj"]["weight"])
        q, k, v = qkv[:, :, : -2 * kv], qkv[:, :, -2 * kv : -kv], qkv[:, :, -kv:]
        q, k = _rotate(q, batch["input_positions"]), _rotate(k, batch["input_positions"])
        x = x + jnp.einsum(
            "btnh,dnh->btd", _attend(q, k, v, batch), attention["attention"]["o_proj"]["weight"]
        )
        ffn = weights["feed_forward"]
        y = _norm(x, ffn["norm"]["scale"])
        hidden = jax.nn.silu(y @ ffn["linear1_0"]["weight"]) * (y @ ffn["linear1_1"]["weight"])
        return x + hidden @ ffn["linear2"]["weight"], None

    body = jax.checkpoint(layer, prevent_cse=False) if sizes.remat else layer
    x, _ = jax.lax.scan(body, table[batch["input_ids"]], decoder["transformer"]["repeat"]["layer"])
    x = _norm(x, decoder["output_norm"]["scale"])
    return _cross_entropy(x @ table.T, batch["target_labels"])


def bare_step(sizes: Sizes) -> tuple[Callable[[Params], Any], Callable[..., Any]]:
    """Returns how a state begins with parameters, and one step: (state, batch) -> (state, loss)."""
    scale_at = schedule(sizes)

    def init(params: Params) -> Any:
        zeros = functools.partial(jax.tree.map, jnp.zeros_like)
        return {"params": params, "mu": zeros(params), "nu": zeros(params), "count": jnp.zeros([], jnp.int32)}

    def step(state: Any, batch: Batch) -> tuple[Any, jax.Array]:
        loss, grads = jax.value_and_grad(functools.partial(bare_loss, sizes=sizes))(state["params"], batch)
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)))
        grads = jax.tree.map(lambda g: g * jnp.minimum(1, 1 / (norm + 1e-8)), grads)
        count = state["count"] + 1
        mu = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, state["mu"], grads)
        nu = jax.tree.map(lambda n, g: 0.95 * n + 0.05 * jnp.square(g), state["nu"], grads)
        scale = scale_at(count)

        def update(p: jax.Array, m: jax.Array, n: jax.Array) -> jax.Array:
            adam = (m / (1 - 0.9**count)) / (jnp.sqrt(n / (1 - 0.95**count)) + 1e-8)
            return p - scale * (sizes.peak_lr * adam + sizes.weight_decay * p)

        params = jax.tree.map(update, state["params"], mu, nu)
        return {"params": params, "mu": mu, "nu": nu, "count": count}, loss

    return init, step


class _FlaxLayer(nn.Module):
    sizes: Sizes

    @nn.compact
    def __call__(self, x: jax.Array, batch: Batch) -> tuple[jax.Array, None]:
        sizes = self.sizes
        project = functools.partial(nn.DenseGeneral, use_bias=False)
        y = nn.RMSNorm(epsilon=_EPS)(x)
        q = project((sizes.num_heads, sizes.per_head_dim))(y)
        k = project((sizes.num_kv_heads, sizes.per_head_dim))(y)
        v = project((sizes.num_kv_heads, sizes.per_head_dim))(y)
        q, k = _rotate(q, batch["input_positions"]), _rotate(k, batch["input_positions"])
        x = x + project(sizes.dim, axis=(-2, -1))(_attend(q, k, v, batch))
        y = nn.RMSNorm(epsilon=_EPS)(x)
        hidden = nn.silu(project(sizes.ffn_dim)(y)) * project(sizes.ffn_dim)(y)
        return x + project(sizes.dim)(hidden), None


class FlaxModel(nn.Module):
    """The same model out of flax's own layers, scanned."""

    sizes: Sizes

    @nn.compact
    def __call__(self, batch: Batch) -> jax.Array:
        embed = nn.Embed(self.sizes.vocab_size, self.sizes.dim)
        layer = nn.remat(_FlaxLayer, prevent_cse=False) if self.sizes.remat else _FlaxLayer
        stack = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.sizes.num_layers,
        )(self.sizes)
        x, _ = stack(embed(batch["input_ids"]), batch)
        return _cross_entropy(embed.attend(nn.RMSNorm(epsilon=_EPS)(x)), batch["target_labels"])


def flax_step(sizes: Sizes) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Returns how a state begins with a key and a batch, and one step: (state, batch) -> (state, loss)."""
    model = FlaxModel(sizes)
    scale_at = schedule(sizes)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=0.9, b2=0.95),
        optax.scale(sizes.peak_lr),
        optax.add_decayed_weights(sizes.weight_decay),
        optax.scale_by_schedule(lambda count: -scale_at(count + 1)),
    )

    def init(key: jax.Array, batch: Batch) -> Any:
        params = model.init(key, batch)
        return {"params": params, "optimizer": optimizer.init(params)}

    def step(state: Any, batch: Batch) -> tuple[Any, jax.Array]:
        loss, grads = jax.value_and_grad(model.apply)(state["params"], batch)
        updates, optimizer_state = optimizer.update(grads, state["optimizer"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "optimizer": optimizer_state}, loss

    return init, step
