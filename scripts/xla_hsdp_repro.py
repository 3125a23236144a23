"""Shows whether this jax multiplies wrongly when a batch and a weight are split over the same axis.

    .venv/bin/python scripts/xla_hsdp_repro.py

On a CPU mesh (data 2, fsdp 2, model 2), jax 0.10.2 and 0.12.0.1 give a product that is wrong by O(1) when rows
are split over (data, fsdp), the weight over (model, fsdp), and the result is asked for in rows over (data, fsdp)
and columns over model: a collective permute of the partitioner is never undone (seen 2026-11-20).
`axlearn.common.layers.gather_weight` avoids the layout by gathering the weight first, as the second line shows.
When both lines print an error near 1e-6, it can go.
"""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("data", "fsdp", "model"))
rows = P(("data", "fsdp"), None, "model")
rng = np.random.default_rng(0)
hidden = rng.normal(size=(4, 6, 24)).astype(np.float32)
weight = rng.normal(size=(24, 16)).astype(np.float32)


def constrain(x, spec):
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def product(x, w, *, gather: bool):
    return constrain(jnp.einsum("btd,do->bto", x, constrain(w, P("model", None)) if gather else w), rows)


print(f"jax {jax.__version__}")
for gather in (False, True):
    result = jax.jit(product, static_argnames="gather")(
        jax.device_put(hidden, NamedSharding(mesh, rows)),
        jax.device_put(weight, NamedSharding(mesh, P("model", "fsdp"))),
        gather=gather,
    )
    error = np.abs(np.asarray(result) - hidden @ weight).max()
    print(f"weight {'gathered first' if gather else 'left as it is'}: largest error {error:.1e}")
