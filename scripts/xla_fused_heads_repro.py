"""Shows whether this jax multiplies wrongly where queries and keys are cut out of one product that is split by heads.

    .venv/bin/python scripts/xla_fused_heads_repro.py

On a CPU mesh (seq 2, model 4), jax 0.10.2 gives a gradient that is wrong by O(1) when hidden states are split over seq,
a weight of 4 query heads, 2 key heads and 2 more is split over model, and queries and keys are slices of their product
(seen 2026-11-21). `axlearn.common.attention.FusedGroupedQKVLinear` avoids it by saying where the heads of each slice
lie, as the second line shows. When both lines print an error near 1e-6, that can go.
"""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("seq", "model"))
rng = np.random.default_rng(0)
hidden = rng.normal(size=(8, 16, 32)).astype(np.float32)
weight = rng.normal(size=(32, 8, 8)).astype(np.float32)


def constrain(x, *spec):
    return jax.lax.with_sharding_constraint(
        x, NamedSharding(mesh, P(P.UNCONSTRAINED, P.UNCONSTRAINED, *spec))
    )


def gradient(x, w, *, is_placed: bool):
    def loss(w):
        heads = jnp.einsum("btd,dnh->btnh", x, w)
        q, k = heads[:, :, :4], heads[:, :, 4:6]
        if is_placed:
            q, k = constrain(q, "model"), constrain(k, None)
        logits = jnp.einsum("btkgh,bskh->bkgts", q.reshape(8, 16, 2, 2, 8), k)
        return jnp.mean(jnp.sin(logits))

    return jax.grad(loss)(w)


expected = np.asarray(jax.jit(gradient, static_argnames="is_placed")(hidden, weight, is_placed=False))
print(f"jax {jax.__version__}")
for is_placed in (False, True):
    result = jax.jit(gradient, static_argnames="is_placed")(
        jax.device_put(hidden, NamedSharding(mesh, P(None, "seq", None))),
        jax.device_put(weight, NamedSharding(mesh, P("seq", "model", None))),
        is_placed=is_placed,
    )
    error = np.abs(np.asarray(result) - expected).max() / np.abs(expected).max()
    print(f"heads {'placed' if is_placed else 'left to the compiler'}: largest relative error {error:.1e}")
